"""Tests of explanations: does the number really depend on what the explanation names, and on the network at all?

gap             values of a complete method add up to the change from the baseline (Sundararajan et al. 2017)
deletion        the features are made absent, those that speak most for the change from the baseline first: the mean
                over the way of what is left of the change; small is good (Petsiuk et al. 2018, section 3.3)
insertion       the other way round, from the baseline; large is good
comprehensiveness, sufficiency   what is lost without the first k features, and with them alone (DeYoung et al. 2020,
                section 4), mean over 1, 5, 10, 20 and 50 % of them
randomisation   rank correlation with the same explanation of the network with random weights, all of them or those of
                its upper half; an explanation that stays the same does not explain the network (Adebayo et al. 2018,
                cascading randomisation)
instability     rank correlation between runs of the method with other seeds

All of them beside orders at random; what is absent looks like the baseline, so a figure holds for that baseline.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.attribution.explain import METHODS, explained
from vesalius.attribution.explanation import Explanation, same_question
from vesalius.attribution.question import Question
from vesalius.errors import InputError
from vesalius.model import Model
from vesalius.seeds import generator_for
from vesalius.stats import Measurement, measure, rank_p
from vesalius.validate import reinitialised

SHARES = (0.01, 0.05, 0.10, 0.20, 0.50)
STEPS = 32
"""Points of a curve; of more features several are made absent at a time."""
UNCHANGED = 0.5
"""Rank correlation with the network of random weights from which on a method did not notice the network."""


@dataclass(frozen=True, eq=False)
class Curve:
    """The number on the way. values: [step], as shares of the change from the baseline: 1 the input, 0 the baseline.
    area: mean over the way. random: [order] areas of random orders. p: that a random order does as well."""

    values: Float[Tensor, " step"]
    area: float
    random: Float[Tensor, " order"]
    p: float

    @property
    def gain(self) -> float:
        """By how much the area is better than the mean of random orders; positive is good."""
        better = float(self.random.mean()) - self.area
        return better if self.values[0] > self.values[-1] else -better


@dataclass(frozen=True, eq=False, repr=False)
class Trials:
    """How an explanation stood its tests; None where a test does not apply (see `examine`)."""

    explanation: Explanation
    relative_gap: float | None
    deletion: Curve
    insertion: Curve
    comprehensiveness: tuple[float, float]
    """Of the explanation, and the mean of random orders; as shares of the change from the baseline."""
    sufficiency: tuple[float, float]
    """The same; small is good."""
    randomised: float | None
    """Rank correlation of the elements' sizes with the explanation of the network with random weights."""
    upper_randomised: float | None
    """The same where only the upper half of the network has random weights."""
    instability: float | None
    """1 - the mean rank correlation between seeds."""

    @property
    def problems(self) -> tuple[str, ...]:
        """In words, what an explanation failed."""
        found = []
        if self.relative_gap is not None and self.relative_gap > 0.05:
            found.append(f"the values miss {self.relative_gap:.0%} of what they should add up to")
        for name, curve in (("deletion", self.deletion), ("insertion", self.insertion)):
            # Of fewer than 19 orders the best is all that there can be.
            if curve.p > max(0.05, 1 / (len(curve.random) + 1) + 1e-9):
                found.append(f"{name} is no better than orders at random (p {curve.p:.2f})")
        for where, value in (("", self.randomised), (" in the upper half", self.upper_randomised)):
            if value is not None and abs(value) >= UNCHANGED:
                found.append(f"much the same with random weights{where} (rank correlation {value:.2f})")
        if self.instability is not None and self.instability > 0.1:
            found.append(f"another seed gives another order (rank correlation {1 - self.instability:.2f})")
        return tuple(found)

    def __repr__(self) -> str:
        return f"Trials({self.explanation.method}; {'; '.join(self.problems) or 'stood every test'})"

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.explanation.method,
            "relative_gap": self.relative_gap,
            **{
                name: {"area": curve.area, "random": float(curve.random.mean()), "p": curve.p}
                for name, curve in (("deletion", self.deletion), ("insertion", self.insertion))
            },
            "comprehensiveness": list(self.comprehensiveness),
            "sufficiency": list(self.sufficiency),
            "randomised": self.randomised,
            "upper_randomised": self.upper_randomised,
            "instability": self.instability,
            "problems": list(self.problems),
        }


def examine(
    explanation: Explanation, *, orders: int = 20, seeds: int = 3, randomise: bool = True, seed: int = 0
) -> Trials:
    """Tests an explanation; see the top of this module.

    orders: random orders to compare with; seeds: runs of a method that draws. randomise: explain the network with
    random weights too (of an estimator there is none). Raises InputError for fewer than one order or two seeds, or a
    number that does not change from the baseline.
    """
    if orders < 1 or seeds < 2:
        raise InputError(f"at least one random order and two seeds are needed; got {orders} and {seeds}")
    question = explanation.question
    if abs(question.value - question.at_baseline) < 1e-9 * max(1.0, abs(question.value)):
        raise InputError(
            f"{question.target} is the same with every feature absent ({question.baseline}): there is nothing to "
            "explain; take another baseline"
        )
    drawn = _random_orders(len(question), orders, seed)
    ways = torch.cat([torch.tensor([explanation.order]), drawn])
    deleted, inserted = (_curve(question, ways, keep) for keep in (False, True))
    without, alone = _first_few(question, ways)
    network = randomise and isinstance(question.asked, Model)
    return Trials(
        explanation=explanation,
        relative_gap=explanation.relative_gap if explanation.complete else None,
        deletion=_compared(deleted, small=True),
        insertion=_compared(inserted, small=False),
        comprehensiveness=(float(without[0]), float(without[1:].mean())),
        sufficiency=(float(alone[0]), float(alone[1:].mean())),
        randomised=randomised(explanation, seed) if network else None,
        upper_randomised=randomised(explanation, seed, upper=True) if network else None,
        instability=instability(explanation, seeds),
    )


def _random_orders(count: int, orders: int, seed: int) -> Tensor:
    return torch.rand(orders, count, generator=generator_for("random orders", seed)).argsort(1)


def _curve(question: Question, ways: Tensor, keep: bool) -> Float[Tensor, "order step"]:
    """The number when the first features of each order are absent (keep: alone present), from none to all."""
    count = ways.shape[1]
    cuts = torch.linspace(0, count, min(count, STEPS) + 1).round().long()
    place = ways.argsort(1)
    first = place[:, None, :] < cuts[None, :, None]
    return _relative(question, first if keep else ~first)


def _relative(question: Question, present: Tensor) -> Tensor:
    """As shares of the change from the baseline; sets that come twice are run once."""
    sets, back = present.flatten(0, 1).unique(dim=0, return_inverse=True)
    worth = question.worth(sets)[back].view(present.shape[:2])
    return (worth - question.at_baseline) / (question.value - question.at_baseline)


def _compared(curves: Float[Tensor, "order step"], small: bool) -> Curve:
    areas = torch.trapezoid(curves, dim=1) / (curves.shape[1] - 1)
    sign = -1.0 if small else 1.0
    p = rank_p(sign * float(areas[0]), (sign * areas[1:]).numpy())
    return Curve(curves[0], float(areas[0]), areas[1:], p)


def _first_few(question: Question, ways: Tensor) -> tuple[Tensor, Tensor]:
    """[order] comprehensiveness and sufficiency."""
    count = ways.shape[1]
    cuts = torch.tensor([max(1, math.ceil(share * count)) for share in SHARES])
    first = ways.argsort(1)[:, None, :] < cuts[None, :, None]
    return 1 - _relative(question, ~first).mean(1), 1 - _relative(question, first).mean(1)


def randomised(explanation: Explanation, seed: int = 0, upper: bool = False) -> float:
    """Rank correlation of the sizes of the elements' values with those of the network with random weights.

    Every tensor keeps its mean and spread, and norms that keep statistics take those of the input and its references
    anew. upper: only the later half of the network's tensors. Raises InputError for what is no network.
    """
    question = explanation.question
    if not isinstance(question.asked, Model):
        raise InputError("only a network can be given random weights")
    other = question.to(random_network(question, seed, upper))
    again = explained(other, explanation.method, **explanation.options)
    return rank_correlation(explanation.values.flatten().abs().cpu(), again.values.flatten().abs().cpu())


def random_network(question: Question, seed: int, upper: bool = False) -> Model:
    """The question's network with random weights. Batch norms see the input in noise: with a trained network's
    statistics they would let nothing through."""
    model = question.network("randomisation").model
    random = reinitialised(model, seed)
    names = [name for name, _ in model.module.named_parameters()]
    kept = {name.rpartition(".")[0] for name in names[: len(names) // 2]} if upper else set()
    own = model.module.state_dict()
    with torch.no_grad():
        for name, tensor in random.module.state_dict().items():
            if name.rpartition(".")[0] in kept:
                tensor.copy_(own[name])
    norms = [
        module
        for name, module in random.module.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and name not in kept
    ]
    if norms:
        _measure_anew(random, norms, question, seed)
    return random


def _measure_anew(random: Model, norms: Sequence[Any], question: Question, seed: int) -> None:
    points = torch.cat([question.x[None], question.references[:8]])
    noise = torch.randn(8, *question.x.shape, generator=generator_for("random network", seed)).to(points)
    points = torch.cat([points, question.x + noise * points.std()])
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over what it sees
        norm.train()
    with torch.no_grad():
        random.module(points)
    for norm in norms:
        norm.eval()


def instability(explanation: Explanation, seeds: int = 3) -> float | None:
    """1 - the mean rank correlation between runs with other seeds; None for a method that draws nothing."""
    chosen = METHODS.get(explanation.method)
    if chosen is None or not chosen.draws:
        return None
    options = {key: value for key, value in explanation.options.items() if key != "seed"}
    runs = [explanation.shares]
    for other in range(1, seeds):
        seed = explanation.seed + other
        runs.append(explained(explanation.question, explanation.method, **options, seed=seed).shares)
    pairs = [rank_correlation(one, two) for one, two in itertools.combinations(runs, 2)]
    return 1 - sum(pairs) / len(pairs)


def rank_correlation(one: Float[Tensor, " feature"], other: Float[Tensor, " feature"]) -> float:
    """Spearman's; 0 where one of them does not vary."""
    ranks = [_ranks(values) for values in (one, other)]
    if any(float(values.std()) == 0 for values in ranks) or len(one) < 2:
        return 0.0
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _ranks(values: Float[Tensor, " feature"]) -> Float[Tensor, " feature"]:
    """Equal values share the mean of their ranks."""
    _, place, count = values.double().unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0)
    return ((last - count + last - 1).double() / 2)[place]


def agreement_between(explanations: Sequence[Explanation], top: float = 0.1) -> dict[str, Any]:
    """How explanations of one question agree: rank correlations of their shares (of sizes, where one has no sign), and
    the share of the first `top` features that each two have in common. Raises InputError for other questions."""
    given = list(explanations)
    same_question(given)
    size = max(1, math.ceil(top * len(given[0])))
    ranks, shared = np.eye(len(given)), np.eye(len(given))
    for (i, one), (j, two) in itertools.combinations(enumerate(given), 2):
        signed = one.signed and two.signed
        values = [e.shares if signed else e.shares.abs() for e in (one, two)]
        ranks[i, j] = ranks[j, i] = rank_correlation(*values)
        first = [set(v.argsort(descending=True, stable=True)[:size].tolist()) for v in values]
        shared[i, j] = shared[j, i] = len(first[0] & first[1]) / size
    return {"methods": [one.method for one in given], "ranks": ranks.tolist(), "first": shared.tolist(), "top": size}


def over_inputs(trials: Sequence[Trials], groups: Mapping[str, Sequence[str]] | None = None) -> dict[str, Measurement]:
    """One method over many inputs: by how much deletion and insertion beat random orders, paired by input, and whether
    comprehensiveness does; each with an interval. groups: labels of inputs that are not independent."""
    labels = {name: tuple(map(str, some)) for name, some in (groups or {}).items()}
    gains = {
        "deletion": [one.deletion.gain for one in trials],
        "insertion": [one.insertion.gain for one in trials],
        "comprehensiveness": [one.comprehensiveness[0] - one.comprehensiveness[1] for one in trials],
    }
    return {
        name: measure(f"{name} over random", values, groups=labels, unit="share of the change")
        for name, values in gains.items()
    }
