"""How often the decision rule errs when the truth is known exactly: claims whose effect is exactly delta, or nothing.

Networks can't show this: a random one's effects lie far below delta, and a planted one's far above. Here effects per
prompt are drawn around a truth that is set, as unevenly and as skewed as real ones, and the rule that `decide` applies
to a claim of one leg is applied to families of 1, 20 and 200 of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vesalius.protocol.legs import ALPHA
from vesalius.stats import clopper_pearson, clustered_means, critical_t, skewed_p

Floats = NDArray[np.float64]
Labels = tuple[str, ...]
Draw = Callable[[np.random.Generator, int], Floats]

TEMPLATES, ICC, LEVEL = 12, 0.4, 0.95
FAMILIES = {1: 2000, 20: 1000, 200: 1000}
"""Claims in a family -> families that are drawn of each kind of data."""
_CLAIMS = 20_000  # drawn at once


@dataclass(frozen=True)
class Rate:
    """k of n, with the exact one-sided 95 % bounds (Clopper and Pearson 1934)."""

    k: int
    n: int

    @property
    def share(self) -> float:
        return self.k / self.n

    @property
    def upper(self) -> float:
        return clopper_pearson(self.k, self.n, LEVEL, "upper").high

    @property
    def lower(self) -> float:
        return clopper_pearson(self.k, self.n, LEVEL, "lower").low

    def __str__(self) -> str:
        return f"{self.share:.3f} [{self.lower:.3f}, {self.upper:.3f}]"

    def to_json(self) -> dict[str, Any]:
        numbers = {"share": self.share, "lower": self.lower, "upper": self.upper}
        return {"k": self.k, "n": self.n} | {name: round(value, 4) for name, value in numbers.items()}


@dataclass(frozen=True)
class Data:
    """A kind of data: the groups of its prompts, and effects `[claim, prompt]` around the mean 0."""

    name: str
    clusters: tuple[Labels, ...]
    draw: Draw


@dataclass(frozen=True)
class Simulated:
    """Families of m claims on one kind of data. Each rate counts families in which any claim ended wrongly.

    supported, refuted: of claims whose effect is exactly delta, so that neither verdict is right. opposite: REFUTED as
    the opposite, of claims whose effect is nothing. covered: 95 % intervals that hold the true effect.
    """

    data: str
    m: int
    supported: Rate
    refuted: Rate
    opposite: Rate
    covered: Rate

    @property
    def rates(self) -> dict[str, Rate]:
        """All four, by name."""
        return {name: getattr(self, name) for name in ("supported", "refuted", "opposite", "covered")}

    def holds(self, bound: float) -> bool:
        """Whether every upper bound of a false verdict is within what is asked for."""
        return max(rate.upper for rate in (self.supported, self.refuted, self.opposite)) <= bound

    def to_json(self) -> dict[str, Any]:
        return {"data": self.data, "m": self.m} | {name: rate.to_json() for name, rate in self.rates.items()}


def kinds() -> tuple[Data, ...]:
    """All kinds of data: 12 templates of 4 prompts, and what can be unlike it."""
    even = _templates([4] * TEMPLATES)
    large = _templates([33] + [2] * (TEMPLATES - 1))
    falling = _templates([round(24 / rank) for rank in range(1, TEMPLATES + 1)])
    names = _names(16, len(even))
    return (
        Data("12 templates of equal size", (even,), _clustered(even)),
        Data("one template holds 60 % of the prompts", (large,), _clustered(large)),
        Data("sizes fall as 1/rank", (falling,), _clustered(falling)),
        Data("two of 16 names in each prompt", (even, names), _named(even, names)),
        Data("skewed: a long tail of low effects", (even,), _skewed(even, -1)),
        Data("skewed: a long tail of high effects", (even,), _skewed(even, 1)),
    )


@lru_cache(maxsize=4)
def simulated(seed: int = 0) -> tuple[Simulated, ...]:
    """Every kind of data at every size of family; the same seed gives the same figures."""
    rng = np.random.default_rng(seed)
    return tuple(simulate(data, m, families, rng) for data in kinds() for m, families in FAMILIES.items())


def simulate(data: Data, m: int, families: int, rng: np.random.Generator) -> Simulated:
    """Draw families of m claims of one kind of data, and count the wrong ones."""
    at_once = max(1, _CLAIMS // m)
    parts = [_counted(data, m, min(at_once, families - done), rng) for done in range(0, families, at_once)]
    wrong, covered = np.sum([of for of, _ in parts], axis=0), sum(of for _, of in parts)
    supported, refuted, opposite = (Rate(int(count), families) for count in wrong)
    return Simulated(data.name, m, supported, refuted, opposite, Rate(covered, m * families))


def _counted(data: Data, m: int, families: int, rng: np.random.Generator) -> tuple[list[int], int]:
    """Families with any claim SUPPORTED, REFUTED, or REFUTED as the opposite; intervals that hold the truth."""
    means = clustered_means(data.draw(rng, m * families), *data.clusters)
    t = means.t().reshape(families, m)
    greater, less = (m * skewed_p(side, means.effective_groups).min(axis=1) for side in (t, -t))
    low, high = means.interval(LEVEL)
    # Of an effect of nothing, t is as far below nothing as it is here below delta, and the reason is two-sided.
    wrong = [np.count_nonzero(p <= ALPHA) for p in (greater, less, 2 * less)]
    return [int(count) for count in wrong], int(np.count_nonzero((low <= 0) & (high >= 0)))


def needed_effect(m: int, groups: int = TEMPLATES) -> float:
    """How far the mean must lie beyond delta, in spreads between templates, for the surest of m claims to stand."""
    return critical_t(ALPHA / m, groups) / float(np.sqrt(groups))


def _templates(sizes: Sequence[int]) -> Labels:
    return tuple(f"t{number}" for number, size in enumerate(sizes) for _ in range(size))


def _names(count: int, prompts: int) -> Labels:
    rng = np.random.default_rng(0)
    return tuple("|".join(f"n{name}" for name in rng.choice(count, 2, replace=False)) for _ in range(prompts))


def _incidence(labels: Labels) -> Floats:
    members = [label.split("|") for label in labels]
    known = sorted({name for names in members for name in names})
    return np.array([[float(name in names) for names in members] for name in known])


def _clustered(templates: Labels) -> Draw:
    of = _incidence(templates)

    def draw(rng: np.random.Generator, rows: int) -> Floats:
        shared = rng.standard_normal((rows, len(of))) @ of
        return np.asarray(ICC**0.5 * shared + (1 - ICC) ** 0.5 * rng.standard_normal((rows, len(templates))))

    return draw


def _named(templates: Labels, names: Labels) -> Draw:
    first, second = _clustered(templates), _incidence(names)

    def draw(rng: np.random.Generator, rows: int) -> Floats:
        return np.asarray(first(rng, rows) + rng.standard_normal((rows, len(second))) @ second / 2**0.5)

    return draw


def _skewed(templates: Labels, side: int) -> Draw:
    """Effects of templates are log-normal, less their mean; prompts of one hardly differ."""
    of = _incidence(templates)

    def draw(rng: np.random.Generator, rows: int) -> Floats:
        shared = side * (np.exp(rng.standard_normal((rows, len(of)))) - np.exp(0.5))
        return np.asarray(shared @ of + 0.1 * rng.standard_normal((rows, len(templates))))

    return draw
