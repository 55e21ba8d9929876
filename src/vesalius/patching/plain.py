"""Edited runs as ordinary forwards with hooks: the check of replay, and the way of models that cannot be replayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vesalius.errors import InputError, NotFiniteError
from vesalius.inputs import Inputs, Pairs, Raw, Tokens
from vesalius.intervention import Freeze, Intervention, Patch, Place, Positions
from vesalius.metric import Metric
from vesalius.parts import Part, Unit
from vesalius.patching.changes import Changes
from vesalius.patching.donors import Donor
from vesalius.patching.held import PLAINLY, Under
from vesalius.patching.record import Record, taken, together
from vesalius.patching.variants import Variant, rows_of
from vesalius.patching.what import What, place_of
from vesalius.site import Site

_WHOLE_RUNS = ("router", "expert_out", "module")


def why_plain(record: Record, variants: Sequence[Variant]) -> str:
    """Why these variants need ordinary runs; empty when replay covers them."""
    kinds = sorted({place_of(part)[0].kind for variant in variants for part in variant.parts} & set(_WHOLE_RUNS))
    return record.reason or (f"{' and '.join(kinds)} edits are not replayed" if kinds else "")


def live_cells(
    variants: Sequence[Variant], changes: Changes, ends: Int[Tensor, " example"]
) -> Bool[Tensor, "variant example"]:
    """Cells whose edit can change something at the read position."""
    if not changes.base.causal:
        return torch.stack([changes.live(variant.parts, variant.position) for variant in variants])
    live = torch.zeros(len(variants), len(changes.base), dtype=torch.bool)
    for number, variant in enumerate(variants):
        for rows in rows_of(variant, changes, ends):
            live[number, rows.example] = True
    return live


@dataclass(frozen=True, eq=False)
class Shift:
    """Adds an amount to a part's value."""

    part: Part
    amount: Tensor
    positions: Positions = None

    def value(self, whole: Tensor, place: Place) -> Tensor:
        """What is there and the amount."""
        present = self.part.read(whole)
        return present + place.here(self.amount, self.part, whole).to(present)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "shift", "part": self.part.to_json()}


@dataclass(frozen=True, eq=False)
class PlainRun:
    """One edited run of some examples. logits: [row, pos, vocab]; watched: site -> [row, ...] at the read position."""

    number: int
    example: Int[Tensor, " row"]
    logits: Tensor
    watched: Mapping[Site, Tensor]


def plain_runs(
    record: Record, variants: Sequence[Variant], donor: Donor, live: Bool[Tensor, "variant example"], pairs: Pairs,
    watch: Sequence[Site], budget: int, under: Under, visit: Callable[[PlainRun], None],
) -> None:  # fmt: skip
    """Run every live cell, at most `budget` tokens together, and hand each run to `visit`."""
    for number, variant in enumerate(variants):
        for some in live[number].nonzero()[:, 0].split(max(1, budget // record.weight)):
            for example in together(record.model, record.inputs, some):
                visit(_edited(record, number, variant, donor, example, pairs, watch, under))


def _edited(
    record: Record, number: int, variant: Variant, donor: Donor, example: Tensor, pairs: Pairs, watch: Sequence[Site],
    under: Under,
) -> PlainRun:  # fmt: skip
    inputs = taken(record.model, record.inputs, example)
    edits = [*common(record, under, inputs, example), *patches(record, variant, donor, example, _width(inputs))]
    run = record.model.run(inputs, capture=list(watch), interventions=edits)
    watched = {site: at_read(run[site], pairs.read_at(site)[example], site) for site in watch}
    return PlainRun(number, example, run.logits, watched)


def _width(inputs: Inputs) -> int | None:
    """Tokens of a run; None for inputs that are none."""
    return None if isinstance(inputs, Raw) else inputs.ids.shape[1]


def at_read(values: Tensor, at: Int[Tensor, " example"], site: Site) -> Tensor:
    """A site's value at each example's read position (the query, for patterns)."""
    rows = torch.arange(len(values))
    return values[rows, :, at] if site.kind == "pattern" else values[rows, at]


def base_logits(record: Record) -> Float[Tensor, "example *pos vocab"]:
    return record.model.run(record.inputs).logits if record.logits is None else record.logits


def plain_metric(
    logits: Tensor, base: Tensor, example: Int[Tensor, " row"], pairs: Pairs, metric: Metric
) -> Float[Tensor, " row"]:
    """Metric of some examples' runs. logits: [row, pos, vocab]; base: [example, pos, vocab], of all examples."""
    return metric(logits, pairs.subset(example.tolist()), base[example] if metric.needs.base else None)


def common(record: Record, under: Under, inputs: Inputs, example: Int[Tensor, " row"]) -> list[Intervention]:
    """What every edited run of these examples has in common, as hooks. inputs: the run's."""
    still: list[Intervention] = [held.patch(record, example, _width(inputs)) for held in under.held]
    if not under.patterns:
        return still
    patterns = record.model.sites("layers.*.pattern")
    seen = record.model.run(inputs, capture=patterns, interventions=still).activations
    return [*still, *(Freeze(site, source=seen) for site in patterns)]


def patches(
    record: Record, variant: Variant, donor: Donor, example: Int[Tensor, " row"], size: int | None = None
) -> list[Intervention]:
    """A variant's edits of some examples as hooks. size: width of the run, when it is cut."""
    return [
        _patch(record, part, variant.position, donor, example, size) for part in variant.parts
    ]  # fmt: skip


def _patch(
    record: Record, part: What, position: int | None, donor: Donor, example: Tensor, size: int | None
) -> Intervention:
    site, index = place_of(part)
    mask = _edited_positions(record, site, position, donor, example, size)
    if site.kind == "module":
        return _patch_module(site, donor, example, mask, position is None, isinstance(record.inputs, Raw))
    values = donor.values(part)
    rows = donor.example[example] if values.shape[0] > 1 else torch.zeros_like(example)
    given = values[rows, : mask.shape[1]]
    given = given.expand(-1, mask.shape[1], *given.shape[2:])
    if isinstance(part, Site):
        part, given = _unit(part, site), given if index < 0 else given.select(2, index)
    return Shift(part, given, mask) if donor.adds else Patch(part, source=given, positions=mask)


def _unit(part: Site, written: Site) -> Unit:
    """A site as the user names it; embeddings are written where they enter the first layer."""
    return Unit(part if part.kind != "embed" else replace(written, index=part.index))


def _edited_positions(
    record: Record, site: Site, position: int | None, donor: Donor, example: Tensor, size: int | None
) -> Bool[Tensor, "row pos"]:
    decoded = isinstance(record.inputs, Tokens) and record.inputs.decoder is not None and not site.of_encoder
    real = record.real_at(site)[example, : None if decoded else size]
    pos = torch.arange(real.shape[1])
    mask = (pos >= donor.first[example][:, None]) & real
    return mask if position is None else mask & (pos == position)


def _patch_module(
    part: Site, donor: Donor, example: Tensor, mask: Bool[Tensor, "row pos"], everywhere: bool, raw: bool
) -> Patch:
    """A module's tensor may have any shape; one that counts tokens is [example, pos, ...].

    raw: the inputs are no tokens, and positions are the second axis, whatever it counts.
    """
    values, pos = donor.source.at(part), mask.shape[1]
    given = values[donor.example[example]] if values.shape[0] > 1 else values
    given = given[:, :pos] if given.ndim > 2 else given
    if everywhere and bool(mask.all()):
        return Patch(part, source=given)
    if (given.ndim < 3 and not raw) or given.shape[1] not in (1, pos):
        raise InputError(
            f"{part} is [example, {', '.join(map(str, values.shape[1:]))}] here, which does not count the {pos} tokens "
            "of the prompts: sweep it whole (each=None) with prompts of one length"
        )
    return Patch(part, source=given, positions=mask)


def first_bad_site(record: Record, variant: Variant | None, donor: Donor, example: int) -> str:
    """In words, the first site of one example's ordinary run that holds NaN or infinity; empty when none does."""
    row = torch.tensor([example])
    inputs = taken(record.model, record.inputs, row)
    edits = [] if variant is None else patches(record, variant, donor, row, _width(inputs))
    try:
        record.model.run(inputs, interventions=edits, check_finite=True)
    except NotFiniteError as error:
        return f": {error}"
    return ""


def plain_value(
    record: Record, variant: Variant, donor: Donor, pairs: Pairs, metric: Metric, example: int, under: Under = PLAINLY
) -> float:
    """One cell by an ordinary forward of that example alone, with one hook per edited part."""
    one, row, inputs = pairs.subset([example]), torch.tensor([example]), _alone(record, example)
    still = common(record, under, inputs, row)
    edits = [*still, *patches(record, variant, donor, row, _width(inputs))]
    logits = record.model.run(inputs, interventions=edits).logits
    base = record.model.run(inputs, interventions=still).logits if metric.needs.base else None
    return float(metric(logits, one, base)[0])


def _alone(record: Record, example: int) -> Inputs:
    """One example without padding."""
    row = torch.tensor([example])
    if isinstance(record.inputs, Raw):
        return record.inputs.take(row)
    return replace(record.inputs.take(row, int(record.lengths[example])), mask=None)
