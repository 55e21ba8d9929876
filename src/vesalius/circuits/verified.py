"""Estimates of edges held to exact effects: agreement, saturation, and how many edges a shortlist missed.

A shortlist of edges is checked exactly, and so is a random sample of all edges, with whatever the estimates say of
them. Those of the sample that were not chosen tell how many of the rest have an effect nevertheless: an exact binomial
bound (Clopper and Pearson 1934).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vesalius.circuits.cutting import Ablation
from vesalius.circuits.exact import exact_scores, exact_values, sample
from vesalius.circuits.graph import Graph
from vesalius.jobs import Event, Sink, silent
from vesalius.parts import Edge, Part
from vesalius.patching.agreement import Agreement
from vesalius.patching.scores import Scores
from vesalius.stats import clopper_pearson

ZERO = 1e-6
"""An estimate below this share of the largest one is zero: what is left of it is rounding."""


@dataclass(frozen=True, eq=False)
class Check:
    """What exact effects say about estimates.

    sampled: edges drawn at random from all. agreement: of the estimates with them. saturated: checked edges with an
    effect whose estimate is zero. drawn: those of the sample that were not chosen, for a shortlist or for the circuit;
    missed: how many of them have an effect; most_missed: how many of all edges that were not chosen have one at most,
    with 95 % confidence. what: "edges", or "nodes", which are ablated.
    """

    sampled: int
    agreement: Agreement
    saturated: tuple[Part | Edge, ...]
    drawn: int
    missed: int
    most_missed: int
    what: str = "edges"

    def describe(self) -> str:
        """As text."""
        done = "cut" if self.what == "edges" else "ablated"
        told = (
            f"{self.sampled} random {self.what} {done} exactly: correlation with the estimates "
            f"{self.agreement.pearson:.2f}; "
            f"{self.missed} of {self.drawn} that were not chosen have an effect, so at most "
            f"{self.most_missed:,} {self.what} were missed (95 %)"
        )
        if not self.saturated:
            return told
        first = ", ".join(map(str, self.saturated[:3]))
        return (
            f"{told}. Saturated: {len(self.saturated)} {self.what} have an effect and an estimate of zero ({first} ...)"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "sampled": self.sampled,
            "pearson": None if math.isnan(self.agreement.pearson) else self.agreement.pearson,
            "saturated": [str(edge) for edge in self.saturated],
            "drawn": self.drawn,
            "missed": self.missed,
            "most_missed": self.most_missed,
        }


@dataclass(frozen=True, eq=False)
class Verified:
    """Exact effects of some edges. measured: Scores [edge, example] of them; numbers: theirs in the graph."""

    numbers: Int[Tensor, " checked"]
    measured: Scores
    check: Check

    def by_number(self, graph: Graph) -> Float[Tensor, "edge example"]:
        """Effects of all edges of the graph, zero where none was measured."""
        found = torch.zeros(len(graph), self.measured.values.shape[1])
        found[self.numbers] = self.measured.effects
        return found


def verified(
    cut: Ablation,
    estimates: Scores,
    chosen: Bool[Tensor, " edge"],
    drawn: int,
    smallest: float,
    *,
    all_chosen: bool = True,
    seed: int = 0,
    out: str | Path | None = None,
    sink: Sink = silent,
) -> Verified:
    """Exact effects of the chosen edges and of random ones.

    drawn: random edges, of all. all_chosen: False measures the random ones alone. smallest: the mean absolute effect,
    in the metric's unit, from which on an edge has one.
    """
    graph = cut.wired.graph
    random = torch.zeros(len(graph), dtype=torch.bool)
    random[sample(len(graph), drawn, seed)] = True
    numbers = (chosen | random if all_chosen else random).nonzero()[:, 0]
    values, cost = exact_values(cut, numbers, seed=seed, out=out, sink=sink)
    measured = exact_scores(cut, numbers, values, cost)
    check = check_of(estimates, measured, numbers, random, chosen, smallest)
    sink(Event("note", "edges", message=check.describe()))
    return Verified(numbers, measured, check)


def check_of(
    estimates: Scores,
    measured: Scores,
    numbers: Int[Tensor, " checked"],
    random: Bool[Tensor, " item"],
    chosen: Bool[Tensor, " item"],
    smallest: float,
    what: str = "edges",
) -> Check:
    """What exact effects of some items say about estimates of all. random: those drawn; chosen: those not missed."""
    found = measured.effects.abs().mean(1) >= smallest
    zero = zeros(estimates.effects)[numbers]
    rest = random[numbers] & ~chosen[numbers]
    missed, looked = int((found & rest).sum()), int(rest.sum())
    others = len(chosen) - int(chosen.sum())
    bound = clopper_pearson(missed, looked, one_sided="upper").high if looked else float(others > 0)
    return Check(
        sampled=int(random.sum()),
        agreement=agreement_of(estimates, measured, numbers, random[numbers]),
        saturated=tuple(measured.items[n] for n in (found & zero).nonzero()[:, 0].tolist()),
        drawn=looked,
        missed=missed,
        most_missed=missed if looked == others else math.floor(bound * others),
        what=what,
    )


def zeros(effects: Float[Tensor, "edge example"]) -> Bool[Tensor, " edge"]:
    """Edges whose estimates are zero on every example, but for rounding."""
    return effects.abs().amax(1) <= ZERO * effects.abs().max()


def agreement_of(
    estimates: Scores, measured: Scores, numbers: Int[Tensor, " checked"], where: Bool[Tensor, " checked"]
) -> Agreement:
    """Of estimates of all edges with measured ones of the checked edges, on some of those."""
    some, own = numbers[where], where.nonzero()[:, 0]
    items = tuple(estimates.items[n] for n in some.tolist())
    one = replace(estimates, values=estimates.values[some], mask=estimates.mask[some], items=items, rows=items)
    other = replace(measured, values=measured.values[own], mask=measured.mask[own], items=items, rows=items)
    return one.against(other)
