"""Attribution patching: what a patch would do, from one gradient (Nanda 2023; Syed et al. 2023, section 3).

effect of patching a part ~ gradient of the metric there, at the base run, times (source value - base value)

One forward and one backward for all parts, where `sweep` runs every patch. It is exact for what is linear, and says
nothing of what saturates: a softmax near 0 or 1 has no gradient (Kramar et al. 2024). With steps > 1 the gradient is
averaged along the straight line from base to source at the edited site (integrated gradients, Sundararajan et al. 2017,
by midpoints), site by site. An estimate is a hypothesis; `Scores.against` compares it with patches that were run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.activations import Run
from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Pairs
from vesalius.intervention import Patch, joint
from vesalius.metric import Metric, logit_diff
from vesalius.model import Model
from vesalius.parts import At, Part, Unit, as_part, places
from vesalius.patching.examples import Examples
from vesalius.patching.plan import Cost
from vesalius.patching.scores import Scores
from vesalius.patching.targets import PROMPTS
from vesalius.site import INDEX_AXIS, Site

EACH = ("position", "head", "neuron")
# A backward pass costs about two forwards.
_BACKWARD = 2.0


def attribution_patching(
    model: Model,
    pairs: Pairs,
    *,
    sites: Any,
    each: str | None = None,
    steps: int = 1,
    metric: Metric = logit_diff,
    base: str = "corrupted",
) -> Scores:
    """Estimated metric of every patched run: base value plus gradient times difference.

    sites: names, globs or Sites of the residual stream, heads (q, k, v, z), MLPs and their neurons, as in `sweep`, or
    Parts (a Direction, a latent, ...) that write one site. each: "position", "head", "neuron", or None for whole sites
    and Parts; the estimates of a site's positions add up to its own. steps: gradients averaged along the way from base
    to source, each costs a forward and a backward per site; 1 takes the gradient at the base run, for all sites at
    once. base: the prompts whose run is patched.

    Returns Scores as `sweep` does, with estimates. Raises UnknownNameError and InputError for what cannot be asked.
    """
    if each is not None and each not in EACH:
        raise UnknownNameError("each", each, EACH, "None takes whole sites.")
    if base not in PROMPTS:
        raise UnknownNameError("base", base, PROMPTS)
    if steps < 1:
        raise InputError(f"steps must be at least 1; got {steps}")
    model.check_evaluating()
    found = _requested(model, sites, each)
    work = _Work(model, pairs, metric, base, tuple(found))
    values, plain = work.first_order() if steps == 1 else work.along_the_way(steps)
    plain = (plain[0].cpu(), plain[1].cpu())
    shares = zip(found, values, strict=True)
    pooled = torch.stack([_pooled(part.writes[0], share, each).cpu() for part, share in shares])
    estimates = plain[0] + pooled
    real = pairs.tokens(base).real.T[None] if each == "position" else torch.ones((), dtype=torch.bool)
    passes = len(pairs) * (1 + (1 + _BACKWARD) * (1 if steps == 1 else 1 + steps * len(found)))
    rows, columns = tuple(found), range(estimates.shape[1]) if each in ("head", "neuron") else ()
    return Scores(
        values=estimates,
        base=plain[0],
        source=plain[1],
        mask=real.expand_as(estimates),
        cost=Cost(passes, float(estimates.numel())),
        items=tuple(Unit(part.writes[0][index]) for part in found for index in columns) or rows,
        each=each,
        edit="estimated patch",
        metric=metric.name,
        unit=metric.unit,
        prompts=base,
        rows=rows,
        examples=Examples.of(model, pairs, base),
    )


def _requested(model: Model, given: Any, each: str | None) -> list[Part]:
    listed = [given] if isinstance(given, str | Site | Part) else list(given)
    found: list[Part] = []
    for name in listed:
        many = isinstance(name, str | Site) and "*" in str(name)
        found += [Unit(site) for site in model.sites(str(name))] if many else [as_part(name)]
    for part in found:
        _check(model, part, each)
    if not found:
        raise InputError('no sites; give sites= such as "layers.*.z"')
    return list(dict.fromkeys(found))


def _check(model: Model, part: Part, each: str | None) -> None:
    for site in places([part]):
        model.check_site(site)
        if site.kind in ("module", "logits", "result"):
            raise InputError(f"{site} is not attributed to; give sites inside the layers, or embed")
    if joint(part):
        raise InputError(f"{part} writes several sites, whose gradients hold each other's; sweep it")
    site, whole = part.writes[0], isinstance(part, Unit) and part.writes[0].index is None
    if each == "head" and not (whole and {"head", "kv_head"} & set(site.axes)):
        raise InputError(f'{part} has no heads; each="head" takes z, q, k or v')
    if each == "neuron" and not (whole and site.kind == "mlp_post"):
        raise InputError(f'{part} has no neurons; each="neuron" takes mlp_post')
    if each == "position" and site.axes[1:2] != ("pos",):
        raise InputError(f'{part} is not counted by positions; each="position" takes the stream, heads and MLPs')


def _pooled(site: Site, share: Float[Tensor, "example pos ..."], each: str | None) -> Tensor:
    """Sums over everything but what `each` counts, the examples last: [position|head|neuron, example], or [example]."""
    kept = {"position": 1, None: 0}.get(each, INDEX_AXIS.get(site.kind, 1))
    axes = [axis for axis in range(1, share.ndim) if axis != kept or each is None]
    summed = share.sum(axes) if axes else share
    return summed if each is None else summed.T


@dataclass(frozen=True, eq=False)
class _Work:
    model: Model
    pairs: Pairs
    metric: Metric
    base: str
    parts: tuple[Part, ...]

    def first_order(self) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """Share of every number of every part's site [example, pos, ...], and the metric of both runs."""
        value, source = self._source()
        written = list(dict.fromkeys(part.writes[0].whole for part in self.parts))
        run = self.model.run(self.pairs.tokens(self.base), capture=self._sites, grad=True)
        plain, gradients = self._gradients(run.logits, [run[site] for site in written])
        by_site = dict(zip(written, gradients, strict=True))
        with torch.no_grad():
            shares = [by_site[part.writes[0].whole] * self._change(part, run, source) for part in self.parts]
        return [_masked(share, self._real) for share in shares], (plain, value)

    def along_the_way(self, steps: int) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """The same with the gradient averaged over midpoints between base and source, one part at a time."""
        value, source = self._source()
        run = self.model.run(self.pairs.tokens(self.base), capture=self._sites)
        shares = []
        for part in self.parts:
            site, change = part.writes[0].whole, self._change(part, run, source)
            total = torch.zeros_like(change)
            for step in range(steps):
                total += self._at(site, run[site] + (step + 0.5) / steps * change)
            shares.append(_masked(total / steps * change, self._real))
        return shares, (self._metric(run.logits, run.logits), value)

    @property
    def _sites(self) -> list[Site | str]:
        return list(places(self.parts))

    @property
    def _real(self) -> Tensor:
        return self.pairs.tokens(self.base).real

    def _change(self, part: Part, run: At, source: At) -> Tensor:
        """What giving the part its source value changes in the whole tensor that it writes."""
        site = part.writes[0].whole
        return part.written(run, part.value(source))[site].detach() - run[site].detach()

    def _at(self, site: Site, value: Tensor) -> Tensor:
        """Gradient at a site that has this value."""
        tokens = self.pairs.tokens(self.base)
        run = self.model.run(tokens, capture=[site], interventions=[Patch(site, source=value)], grad=True)
        return self._gradients(run.logits, [run[site]])[1][0]

    def _source(self) -> tuple[Tensor, Run]:
        other = PROMPTS[1 - PROMPTS.index(self.base)]
        run = self.model.run(self.pairs.tokens(other), capture=self._sites)
        return self._metric(run.logits, run.logits), run

    def _gradients(self, logits: Tensor, at: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The metric of each example, and the gradients of its sum: examples do not touch each other."""
        plain = self._metric(logits, logits.detach())
        found = torch.autograd.grad(plain.sum(), list(at), allow_unused=True)
        return plain.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(at, found, strict=True)]

    def _metric(self, logits: Tensor, base: Tensor) -> Float[Tensor, " example"]:
        return self.metric(logits, self.pairs, base if self.metric.needs.base else None)


def _masked(share: Tensor, real: Tensor) -> Tensor:
    """Nothing on padding."""
    if share.shape[:2] != real.shape:
        return share
    real = real.to(share.device)
    return torch.where(real.view(*real.shape, *[1] * (share.ndim - 2)), share, 0.0)
