"""Edited runs as ordinary forwards with hooks: the check of replay, and the way of models that cannot be replayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from vesalius.errors import InputError, NotFiniteError, SelfCheckError
from vesalius.inputs import Inputs, Pairs, Raw, Tokens
from vesalius.intervention import Freeze, Intervention, Patch, Place, Positions, joint
from vesalius.metric import Metric
from vesalius.parts import Part, Unit, places
from vesalius.patching.edits import PLAIN, Setting
from vesalius.patching.record import Recording, taken, together
from vesalius.patching.scoring import logit_range
from vesalius.patching.sources import Source
from vesalius.patching.targets import Variant, as_written, normal, writes_at
from vesalius.site import Site

TOLERANCE, ROUNDING, EPSILONS = 1e-4, 1e-5, 8
TF32 = 2.0**-10
"""Spacing of TF32's numbers at 1, to which GPUs round float32 factors when they are told that they may."""
CELLS, CELLS_ROUNDED = 2, 8
"""Cells that are run again; more where the error is reported and not only bounded."""


@dataclass(frozen=True, eq=False)
class Shift:
    """Adds an amount to a part's value."""

    part: Part
    amount: Tensor
    positions: Positions = None

    def value(self, present: Tensor, place: Place) -> Tensor:
        """What is there and the amount."""
        return present + place.here(self.amount, self.part.writes[0], present).to(present)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "shift", "part": self.part.ref}


@dataclass(frozen=True, eq=False)
class PlainRun:
    """One edited run of some examples. logits: [row, pos, vocab]; watched: site -> [row, ...] at the read position."""

    number: int
    example: Int[Tensor, " row"]
    logits: Tensor
    watched: Mapping[Site, Tensor]


def plain_runs(
    base: Recording,
    variants: Sequence[Variant],
    source: Source,
    live: Bool[Tensor, "variant example"],
    pairs: Pairs,
    watch: Sequence[Site],
    budget: int,
    setting: Setting,
    visit: Callable[[PlainRun], None],
) -> None:
    """Run every live cell, at most `budget` tokens together, and hand each run to `visit`."""
    for number, variant in enumerate(variants):
        for some in live[number].nonzero()[:, 0].split(max(1, budget // base.weight)):
            for example in together(base.model, base.inputs, some):
                inputs = taken(base.model, base.inputs, example)
                edits = common(base, setting, inputs, example) + patches(base, variant, source, example, _width(inputs))
                run = base.model.run(inputs, capture=list(watch), interventions=edits)
                watched = {site: at_read(run[site], pairs.read_at(site)[example], site) for site in watch}
                visit(PlainRun(number, example, run.logits, watched))


def _width(inputs: Inputs) -> int | None:
    """Tokens of a run; None for inputs that are none."""
    return None if isinstance(inputs, Raw) else inputs.ids.shape[1]


def at_read(values: Tensor, at: Int[Tensor, " example"], site: Site) -> Tensor:
    """A site's value at each example's read position (the query, for patterns)."""
    rows = torch.arange(len(values))
    return values[rows, :, at] if site.kind == "pattern" else values[rows, at]


def common(base: Recording, setting: Setting, inputs: Inputs, example: Int[Tensor, " row"]) -> list[Intervention]:
    """What every edited run of these examples has in common, as hooks. inputs: the run's."""
    fixed: list[Intervention] = [one.patch(base, example, _width(inputs)) for one in setting.fixed]
    if not setting.patterns:
        return fixed
    patterns = base.model.sites("layers.*.pattern")
    seen = base.model.run(inputs, capture=patterns, interventions=fixed).activations
    return [*fixed, *(Freeze(site, source=seen) for site in patterns)]


def patches(
    base: Recording, variant: Variant, source: Source, example: Int[Tensor, " row"], size: int | None = None
) -> list[Intervention]:
    """A variant's edits of some examples as hooks. size: width of the run, when it is cut."""
    units = [part for part in variant.parts if isinstance(part, Unit)]
    others = [part for part in variant.parts if not isinstance(part, Unit) and not joint(part)]
    several = [part for part in variant.parts if joint(part)]
    single = [_patch(base, part, variant.position, source, example, size) for part in [*units, *others]]
    return [*single, *(_jointly(base, several, variant.position, source, example, size) if several else ())]


def _patch(
    base: Recording, part: Part, position: int | None, source: Source, example: Tensor, size: int | None
) -> Intervention:
    site = writes_at(part)[0]
    mask = _edited_positions(base, site, position, source, example, size)
    if site.kind == "module":
        return _patch_module(site, source, example, mask, position is None, isinstance(base.inputs, Raw))
    given, part = _given(part, source, example, mask), as_written(part)
    if isinstance(part, Unit) and part.site.index is not None:
        given = given.select(2, part.site.index)
    return Shift(part, given, mask) if source.adds else Patch(part, source=given, positions=mask)


def _given(part: Part, source: Source, example: Tensor, mask: Bool[Tensor, "row pos"]) -> Tensor:
    """The source's values of some examples, [row, pos, ...]."""
    values = source.of(part)
    rows = source.example[example] if values.shape[0] > 1 else torch.zeros_like(example)
    given = values[rows, : mask.shape[1]]
    return given.expand(-1, mask.shape[1], *given.shape[2:])


def _jointly(
    base: Recording, parts: Sequence[Part], position: int | None, source: Source, example: Tensor, size: int | None
) -> list[Intervention]:
    """Parts of several sites, written onto the base run: the same change reaches all of their sites."""
    at = {site: base[site][example, :size] for site in places(parts)}
    masks = {site: _edited_positions(base, normal(site)[0], position, source, example, size) for site in at}
    for part in parts:
        given = _given(part, source, example, masks[part.writes[0].whole])
        at |= part.written(at, part.value(at) + given if source.adds else given)
    written = dict.fromkeys(site.whole for part in parts for site in part.writes)
    return [Patch(site, source=at[site], positions=masks[site]) for site in written]


def _edited_positions(
    base: Recording, site: Site, position: int | None, source: Source, example: Tensor, size: int | None
) -> Bool[Tensor, "row pos"]:
    decoded = isinstance(base.inputs, Tokens) and base.inputs.decoder is not None and not site.of_encoder
    real = base.real_at(site)[example, : None if decoded else size]
    pos = torch.arange(real.shape[1])
    mask = (pos >= source.first[example][:, None]) & real
    return mask if position is None else mask & (pos == position)


def _patch_module(
    part: Site, source: Source, example: Tensor, mask: Bool[Tensor, "row pos"], everywhere: bool, raw: bool
) -> Patch:
    """A module's tensor may have any shape; one that counts tokens is [example, pos, ...].

    raw: the inputs are no tokens, and positions are the second axis, whatever it counts.
    """
    values, pos = source.tensor(part), mask.shape[1]
    given = values[source.example[example]] if values.shape[0] > 1 else values
    given = given[:, :pos] if given.ndim > 2 else given
    if everywhere and bool(mask.all()):
        return Patch(part, source=given)
    if (given.ndim < 3 and not raw) or given.shape[1] not in (1, pos):
        raise InputError(
            f"{part} is [example, {', '.join(map(str, values.shape[1:]))}] here, which does not count the {pos} tokens "
            "of the prompts: sweep it whole (each=None) with prompts of one length"
        )
    return Patch(part, source=given, positions=mask)


def first_bad_site(base: Recording, variant: Variant | None, source: Source, example: int) -> str:
    """In words, the first site of one example's ordinary run that holds NaN or infinity; empty when none does."""
    row = torch.tensor([example])
    inputs = taken(base.model, base.inputs, row)
    edits = [] if variant is None else patches(base, variant, source, row, _width(inputs))
    try:
        base.model.run(inputs, interventions=edits, check_finite=True)
    except NotFiniteError as error:
        return f": {error}"
    return ""


def self_check(
    base: Recording,
    variants: Sequence[Variant],
    source: Source,
    pairs: Pairs,
    metric: Metric,
    values: Tensor,
    seed: int,
    ran: Bool[Tensor, "variant example"] | None = None,
    setting: Setting = PLAIN,
) -> float:
    """Re-run random cells as plain forwards with hooks; the largest difference. Raises SelfCheckError.

    ran: cells to choose from; default all. Tolerance: 1e-4 of the metric's range, and not under 1e-5 of the logits'
    range, which is what rounding alone gives; in half precision it gives more: 8 units in the last place of that
    range (bfloat16: 6 %, float16: 0.8 %; float32 products in TF32: 0.8 %).
    """
    generator = torch.Generator().manual_seed(seed)
    cells = (torch.ones_like(values, dtype=torch.bool) if ran is None or not bool(ran.any()) else ran).nonzero()
    allowed = allowance(base, pairs, values, setting.compute)
    worst, count = 0.0, CELLS if setting.compute == "float32" else CELLS_ROUNDED
    for pick in torch.randint(len(cells), (count,), generator=generator):
        number, example = (int(i) for i in cells[pick])
        plain = plain_value(base, variants[number], source, pairs, metric, example, setting)
        fast = float(values[number, example])
        worst = max(worst, abs(plain - fast))
        if worst > allowed:
            raise SelfCheckError(
                f"replay gave {fast:.6g} and a plain run {plain:.6g} for example {example} with "
                f"{variants[number].item} edited; please report this model"
            )
    return worst


def plain_value(
    base: Recording,
    variant: Variant,
    source: Source,
    pairs: Pairs,
    metric: Metric,
    example: int,
    setting: Setting = PLAIN,
) -> float:
    """One cell by an ordinary forward of that example alone, with one hook per edited part."""
    one, row, inputs = pairs.subset([example]), torch.tensor([example]), _alone(base, example)
    fixed = common(base, setting, inputs, row)
    edits = [*fixed, *patches(base, variant, source, row, _width(inputs))]
    logits = base.model.run(inputs, interventions=edits).logits
    reference = base.model.run(inputs, interventions=fixed).logits if metric.needs.base else None
    return float(metric(logits, one, reference)[0])


def _alone(base: Recording, example: int) -> Inputs:
    """One example without padding."""
    row = torch.tensor([example])
    if isinstance(base.inputs, Raw):
        return base.inputs.take(row)
    return replace(base.inputs.take(row, int(base.lengths[example])), mask=None)


def allowance(base: Recording, pairs: Pairs, values: Tensor, compute: str = "float32") -> float:
    """By how much a value may differ from a plain run's: see `self_check`."""
    spread = float(values.max() - values.min())
    return max(TOLERANCE * spread, rounding(base, compute) * logit_range(base, pairs))


def rounding(base: Recording, compute: str = "float32") -> float:
    """What rounding alone may change, in units of the range of the logits."""
    kind, first = base.model.device.type, next(base.model.module.parameters(), None)
    dtype = torch.float32 if first is None else first.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    if compute == "bfloat16":
        dtype = torch.bfloat16
    eps = torch.finfo(dtype).eps
    # Products of float32 numbers may be rounded on a GPU, which says so nowhere in the numbers' type.
    return max(ROUNDING, EPSILONS * (max(eps, TF32) if kind == "cuda" and _in_tf32(base.model.module) else eps))


def _in_tf32(module: nn.Module) -> bool:
    """Whether a GPU rounds the factors of this module's products to TF32: of all, or of convolutions alone."""
    settings: list[Any] = [torch.backends.cuda.matmul]
    if any(isinstance(part, nn.modules.conv._ConvNd) for part in module.modules()):
        settings.append(torch.backends.cudnn.conv if hasattr(torch.backends.cudnn, "conv") else torch.backends.cudnn)
    # allow_tf32 is the name before PyTorch 2.9, and may raise after it.
    return any(getattr(one, "fp32_precision", None) == "tf32" or _allowed(one) for one in settings)


def _allowed(setting: Any) -> bool:
    return not hasattr(setting, "fp32_precision") and bool(setting.allow_tf32)
