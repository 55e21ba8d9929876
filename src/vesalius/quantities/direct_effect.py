"""Direct effect: what a part writes straight onto the logit difference, the final norm frozen (Elhage et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.errors import InputError
from vesalius.inputs import Pairs
from vesalius.metric import logit_diff
from vesalius.model.direct import Frozen, frozen_norm
from vesalius.parts import Part, Unit
from vesalius.quantities.base import Parameters, PerExample, Quantity
from vesalius.quantities.runs import Runs

_STREAM = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


def frozen(runs: Runs, which: str, labels: Pairs | None = None) -> Frozen:
    """The final norm frozen at a run's read position, towards answer minus distractor."""
    labels = labels or runs.pairs
    run = runs.run(which)
    if run.reason:
        raise InputError(f"direct effects in {runs.model.name} are not to be had: {run.reason}")
    final = run.resid[-1][torch.arange(runs.n), runs.pairs.at]
    return frozen_norm(runs.model, final, labels.answer, labels.distractor)


def written(runs: Runs, part: Part, which: str = "clean") -> Float[Tensor, "example d_model"]:
    """What a part adds to the residual stream at the read position: a head, an MLP, a direction or latent of those."""
    run, site, read = runs.run(which, [part]), part.writes[0], (torch.arange(runs.n), runs.pairs.at)
    whole = run[site.whole]
    if site.kind == "z" and isinstance(part, Unit) and site.layer is not None and site.index is not None:
        return runs.model.head_writes(site.layer, whole[read])[:, site.index]
    if isinstance(part, Unit) and site.index is None:
        return whole[read]
    without = part.written(run, torch.zeros_like(part.value(run)))[site.whole]
    return (whole - without)[read]


class DirectEffect(Quantity):
    """Contribution of a part to the clean run's logit difference."""

    name = "direct_effect"
    condition = MappingProxyType({"effect": "direct"})

    def refuses(self, runs: Runs, part: Part) -> str:
        site = part.writes[0]
        if runs.contrast.metric.name != logit_diff.name:
            return f"a direct effect is on the logit difference, not on {runs.contrast.metric.name}"
        if runs.pairs.several:
            return "answers of several tokens have no one read position"
        one_head = site.kind == "z" and isinstance(part, Unit) and site.index is not None
        if len(part.writes) > 1 or not (one_head or site.kind in _STREAM):
            return f"{part} does not write to the residual stream at one site"
        return runs.run("clean").reason

    def measure(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample:
        return frozen(runs, "clean").of(written(runs, part)).cpu()

    def nulls(self, runs: Runs, part: Part, parameters: Parameters) -> Mapping[str, PerExample]:
        return {"shuffled labels": frozen(runs, "clean", runs.shuffled).of(written(runs, part)).cpu()}
