"""Hybrid discovery: a shortlist from gradients, exact effects of all on it, and a bound on what is not.

1. Estimates of all edges by integrated gradients.
2. Exact effects of every reader with all of its edges cut at once. Where that effect is large and the estimates of the
   reader's edges are not, gradients are saturated there, and the reader's edges that carry the largest changes join the
   shortlist.
3. Exact effects of the shortlist and of a random sample of all edges; how many edges were missed at most.
4. The edges with an effect. Where a number of edges is asked for: the ranking, by estimates, by exact effects or by
   both, that keeps the metric closest to that of the run without edits on the same prompts.

In a network with no more edges than the shortlist may have, every edge is checked.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vesalius.circuits.attribution import STEPS, estimated
from vesalius.circuits.cutting import Ablation
from vesalius.circuits.exact import reader_values
from vesalius.circuits.masked import with_only
from vesalius.circuits.verified import Verified, verified
from vesalius.jobs import Event, Sink, silent
from vesalius.patching.scores import Scores

SHORTLIST, SAMPLED = 1500, 300
SATURATED = 0.5
"""A reader whose estimated effect is less than this share of its exact one is taken for saturated."""


def shortlisted(
    cut: Ablation, estimates: Scores, most: int, smallest: float, sink: Sink = silent
) -> Bool[Tensor, " edge"]:
    """At most `most` edges to check: three quarters by their estimates, the rest into saturated readers."""
    graph = cut.wired.graph
    if len(graph) <= most:
        return torch.ones(len(graph), dtype=torch.bool)
    found = torch.zeros(len(graph), dtype=torch.bool)
    found[estimates.effects.abs().mean(1).argsort(descending=True)[: most - most // 4]] = True
    exact = reader_values(cut, sink=sink) - cut.plain()[0]
    summed = torch.zeros(len(graph.readers), len(cut.pairs)).index_add(0, graph.reader_of, estimates.effects)
    large = exact.abs().mean(1) >= smallest
    saturated = large & (summed.abs().mean(1) < SATURATED * exact.abs().mean(1))
    sink(Event("note", "hybrid", message=f"{int(saturated.sum())} of {int(large.sum())} readers are saturated"))
    change = cut.change.norm(dim=-1).mean((0, 1)).cpu()[graph.writer_of]
    change = change * (saturated[graph.reader_of] & ~found)
    extra = change.argsort(descending=True)[: most // 4]
    found[extra[change[extra] > 0]] = True
    return found


def hybrid(
    cut: Ablation,
    smallest: float,
    *,
    size: int | None = None,
    shortlist: int = SHORTLIST,
    drawn: int = SAMPLED,
    steps: int = STEPS,
    seed: int = 0,
    out: str | Path | None = None,
    sink: Sink = silent,
) -> tuple[Bool[Tensor, " edge"], Scores, Verified]:
    """The circuit's edges, the estimates, and what was measured exactly.

    smallest: the mean absolute effect, in the metric's unit, from which on an edge has one. size: how many edges the
    circuit has; None takes all that have an effect. shortlist: edges checked exactly at most; drawn: random ones beside
    them. out: a folder in which finished edges are kept.
    """
    estimates = estimated(cut, "eap_ig_inputs", steps, sink=sink)
    chosen = shortlisted(cut, estimates, shortlist, smallest, sink)
    found = verified(cut, estimates, chosen, drawn, smallest, seed=seed, out=out, sink=sink)
    exact = found.by_number(cut.wired.graph)
    if size is None:
        return exact.abs().mean(1) >= smallest, estimates, found
    return _best(cut, _rankings(estimates.effects, exact, found), size), estimates, found


def _rankings(
    estimates: Float[Tensor, "edge example"], exact: Float[Tensor, "edge example"], found: Verified
) -> list[Float[Tensor, " edge"]]:
    """By estimates, by exact effects (then estimates), and by what is the larger of both."""
    estimated, measured = estimates.mean(1).abs(), exact.mean(1).abs()
    checked = torch.zeros(len(estimated), dtype=torch.bool)
    checked[found.numbers] = True
    shares = [values / values.max().clamp_min(1e-12) for values in (measured, estimated)]
    lowest = torch.where(checked, 1 + shares[0], shares[1])
    both = torch.where(checked, torch.maximum(measured, estimated), estimated)
    return [estimated, lowest, both]


def _best(cut: Ablation, rankings: list[Tensor], size: int) -> Bool[Tensor, " edge"]:
    masks = torch.zeros(len(rankings), len(cut.wired.graph), dtype=torch.bool)
    for mask, ranking in zip(masks, rankings, strict=True):
        mask[ranking.argsort(descending=True, stable=True)[:size]] = True
    distance = (with_only(cut, masks) - cut.plain()[0]).abs().mean(1)
    return masks[int(distance.argmin())]
