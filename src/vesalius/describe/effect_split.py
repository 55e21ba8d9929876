"""Total, direct and indirect effects of parts: how much of what a part does a lens cannot see.

With a part's value of the other prompts patched in (activation patching), the metric changes by the *total* effect. The
*direct* effect is that of the same patch with everything downstream held at the base run, so that only what the part
itself writes onto the residual stream reaches the logits: what a logit lens and direct logit attribution show. The
*indirect* effect is the rest, total - direct: what goes through later attention and MLPs (and, with the final norm's
scale frozen, through that scale). Pearl 2001; for a linear readout the direct effect is a difference of direct logit
attributions (Elhage et al. 2021), which `vesalius.model.direct` gives for all components of one run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.activations import Activations
from vesalius.describe.lenses import RESIDUAL, last_site
from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Pairs, Tokens
from vesalius.intervention import Patch, off_distribution
from vesalius.jobs import Sink
from vesalius.jobs.frames import data_frame
from vesalius.metric import Metric, logit_diff
from vesalius.model import Model
from vesalius.model.readout import logits_after, norm_frozen, unembedded
from vesalius.parts import Part, Unit, as_part, places
from vesalius.patching.heatmap import heatmap
from vesalius.patching.plan import Cost
from vesalius.patching.sweep import sweep
from vesalius.patching.targets import PROMPTS
from vesalius.site import Site
from vesalius.stats import Measurement, measure

if TYPE_CHECKING:
    import pandas

KINDS = ("total", "direct", "indirect")
ADDED = ("embed", "attn_out", "mlp_out")
"""Sites whose values are added to the residual stream as they are."""
_ATTENTION = ("q", "k", "v", "z", "result", "scores", "pattern")
_MLP = ("mlp_in", "mlp_post", "router", "expert_out")


@dataclass(frozen=True, eq=False, repr=False)
class EffectSplit:
    """Effects on a metric by part and example. total, direct: [part, example], in the metric's unit.

    base: [example] the metric of the run that was patched. off_distribution: of each part's patched values.
    """

    parts: tuple[Part, ...]
    total: Float[Tensor, "part example"]
    direct: Float[Tensor, "part example"]
    base: Float[Tensor, " example"]
    metric: str
    unit: str
    prompts: str
    freeze_norm: bool
    groups: Mapping[str, tuple[str, ...]]
    clusters: tuple[str, ...]
    off_distribution: tuple[Mapping[str, float], ...]
    cost: Cost

    @property
    def indirect(self) -> Float[Tensor, "part example"]:
        """total - direct."""
        return self.total - self.direct

    @property
    def blind_spot(self) -> float:
        """Share of the parts' mean effects, by size, that is indirect: 0 where a lens sees all, 1 where nothing.

        The sum over parts of |mean indirect|, over that of |mean direct| + |mean indirect|; NaN when all are 0.
        """
        direct, indirect = (values.double().mean(1).abs().sum() for values in (self.direct, self.indirect))
        return float(indirect / (direct + indirect))

    def number(self, part: Part | str) -> int:
        """Where a part, or the part of a name, is among `parts`. Raises UnknownNameError."""
        names = [str(one) for one in self.parts]
        if str(part) not in names:
            raise UnknownNameError("part", str(part), names[:20])
        return names.index(str(part))

    def measurement(self, part: Part | str, kind: str = "indirect") -> Measurement:
        """The total, direct or indirect effect of a part: mean with interval, values per example."""
        if kind not in KINDS:
            raise UnknownNameError("kind of effect", kind, KINDS)
        number = self.number(part)
        values: Tensor = getattr(self, kind)[number]
        return measure(
            f"{kind} effect of {self.parts[number]} on {self.metric}",
            values.double().numpy(),
            groups=self.groups,
            clusters=self.clusters,
            unit=self.unit,
            cost={"forwards": self.cost.spent},
            diagnostics={"off_distribution": dict(self.off_distribution[number])},
        )

    def to_frame(self) -> pandas.DataFrame:
        """One row per part and example: part, example, total, direct, indirect, norm_ratio, z_rms.

        Raises InputError where pandas is not installed.
        """
        return data_frame([
            {"part": str(part), "example": example,
             **{kind: float(getattr(self, kind)[number, example]) for kind in KINDS}, **self.off_distribution[number]}
            for number, part in enumerate(self.parts) for example in range(len(self.base))
        ])  # fmt: skip

    def __repr__(self) -> str:
        return (
            f"EffectSplit({len(self.parts)} parts on {self.metric} of {len(self.base)} {self.prompts} prompts; "
            f"{self.blind_spot:.0%} of the effects are indirect)"
        )

    def _repr_html_(self) -> str:
        table = torch.stack([getattr(self, kind).mean(1) for kind in KINDS], 1)
        title = f"Mean change of {self.metric} ({self.unit}); {self.blind_spot:.0%} of the effects are indirect"
        return heatmap(title, list(map(str, self.parts)), KINDS, table)


def split_effects(
    model: Model,
    pairs: Pairs,
    parts: Sequence[Part | Site | str],
    *,
    metric: Metric = logit_diff,
    base: str = "clean",
    freeze_norm: bool = True,
    sink: Sink | None = None,
) -> EffectSplit:
    """Total, direct and indirect effect of giving each part, alone, its value of the other prompts.

    parts: names, Sites or Parts (heads, MLPs, neurons, directions, latents), at all positions. base: the prompts that
    are run; the other ones give the values. freeze_norm: the direct effect is with the final norm's scale held at the
    base run, as direct logit attribution has it; else the norm answers to the part's own change. sink: as of
    `vs.sweep`, which measures the totals and checks itself.

    Raises InputError for a model without lens, a metric that does not read one position, and a part that writes the
    residual stream at several sites, one after the other.
    """
    listed = [as_part(part) for part in parts]
    _check(model, pairs, metric, base, listed)
    scores = sweep(model, pairs, sites=listed, metric=metric, base=base, sink=sink)
    own = [*places(listed), *(_added(site) for part in listed for site in part.writes), last_site(model)]
    first, other = (model.run(pairs.tokens(one), own).activations for one in (base, PROMPTS[1 - PROMPTS.index(base)]))
    made = _Direct(model, pairs, metric, freeze_norm, pairs.tokens(base), first, other)
    found = [made.of(part) for part in listed]
    return EffectSplit(
        parts=tuple(listed),
        total=scores.effects,
        direct=torch.stack([effect for effect, _ in found]).to(scores.effects),
        base=scores.base,
        metric=metric.name,
        unit=metric.unit,
        prompts=base,
        freeze_norm=freeze_norm,
        groups=pairs.groups,
        clusters=pairs.clusters,
        off_distribution=tuple(off for _, off in found),
        cost=scores.cost,
    )


def _check(model: Model, pairs: Pairs, metric: Metric, base: str, parts: Sequence[Part]) -> None:
    if not model.architecture[0].direct:
        raise InputError(f"{model.name} has no direct effects: its logits are not a readout of the residual stream")
    metric.check_one_token(pairs)
    if metric.needs.positions != "read":
        raise InputError(f"{metric.name} reads {metric.needs.positions} positions; direct effects are on one")
    if base not in PROMPTS:
        raise UnknownNameError("base", base, PROMPTS)
    if not parts:
        raise InputError("no parts to measure")
    for part in parts:
        for site in part.writes:
            model.check_site(site)
            if site.kind not in (*RESIDUAL, *ADDED, *_ATTENTION, *_MLP):
                raise InputError(f"{part} has no direct effect: {site} is not written onto the residual stream")
        if len(part.writes) > 1 and any(site.kind in RESIDUAL for site in part.writes):
            raise InputError(f"{part} writes the residual stream itself at several sites, one after the other")


@dataclass(frozen=True, eq=False)
class _Direct:
    """Direct effects on one run. base, other: what was recorded of the run that is patched, and of the values' run."""

    model: Model
    pairs: Pairs
    metric: Metric
    freeze_norm: bool
    tokens: Tokens
    base: Activations
    other: Activations

    def of(self, part: Part) -> tuple[Float[Tensor, " example"], dict[str, float]]:
        """Effect [example], and how unnatural the patched values are."""
        with torch.no_grad():
            written = part.written(self.base, part.value(self.other))
            change = torch.stack([self._change(site.whole, written[site.whole]) for site in part.writes]).sum(0)
            final = self._read(self.base[last_site(self.model)])
            before, after = unembedded(self.model, final), self._logits(final, change)
        effect = self.metric(after, self.pairs, before) - self.metric(before, self.pairs, before)
        seen = torch.arange(self.tokens.ids.shape[1])[None] <= self.pairs.at[:, None]
        where = part.writes[0].whole
        return effect.cpu(), off_distribution(self.base[where], written[where], seen, where)

    def _logits(self, final: Tensor, change: Tensor) -> Tensor:
        if not self.freeze_norm:
            return unembedded(self.model, final + change)
        return logits_after(self.model, norm_frozen(self.model, final, change))

    def _read(self, whole: Tensor) -> Tensor:
        """At the position that the metric reads."""
        return whole[torch.arange(len(whole)), self.pairs.at]

    def _change(self, site: Site, after: Tensor) -> Float[Tensor, "example d_model"]:
        """What is added to the residual stream at the read position, beside the base run."""
        if site.kind in (*RESIDUAL, *ADDED):
            return self._read(after) - self._read(self.base[site])
        if site.kind == "z" and not self.model.architecture[0].attn_norm:
            assert site.layer is not None
            moved = self._read(after) - self._read(self.base[site])
            return self.model.head_writes(site.layer, moved).sum(-2)
        # What the layer's own modules make of it (an output projection, a down projection, a norm) a run shows.
        own = _added(site)
        patched = Patch(Unit(site), source=Activations({site: after}, self.tokens))
        return self._read(self.model.run(self.tokens, own, [patched])[own]) - self._read(self.base[own])


def _added(site: Site) -> Site:
    """Where what is written at a site is added to the residual stream."""
    if site.kind in _ATTENTION:
        return Site("attn_out", site.layer)
    return Site("mlp_out", site.layer) if site.kind in _MLP else site.whole
