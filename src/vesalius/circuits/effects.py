"""Decompose: the exact effect of every component on its own, under every corruption and in both directions.

Nothing is approximated: each figure is a measured run with that one component patched. Prompts of one template are not
independent, so intervals and p-values are clustered by template (and names), and the 301 or so p-values of a condition
are corrected for each other (Benjamini and Hochberg). A component that works against the answer counts like one that
helps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vesalius.bench import DIRECTIONS, Bench, components
from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Pairs
from vesalius.site import Site
from vesalius.stats import bh, clustered_t

FDR = 0.05
# A prompt counts as flipped when its effect has the other sign and is at least this share of the total effect.
FLIP_SHARE = 0.01
# Components in the table a notebook shows.
SHOWN = 15

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Condition:
    """Effects under one corruption and direction, as shares of that corruption's total effect.

    values: [component, example]. The other arrays are per component: mean, 95 % clustered interval, standard deviation
    over prompts, two-sided p, Benjamini-Hochberg q, and the share of prompts whose sign differs from the mean's.
    """

    corruption: str
    direction: str
    values: Floats
    mean: Floats
    low: Floats
    high: Floats
    sd: Floats
    p: Floats
    q: Floats
    sign_flips: Floats

    def to_json(self) -> dict[str, Any]:
        arrays = {name: getattr(self, name).tolist() for name in ("mean", "low", "high", "sd", "p", "q", "sign_flips")}
        return {"corruption": self.corruption, "direction": self.direction, **arrays}


@dataclass(frozen=True, eq=False)
class Effects:
    """Effects of all components under all conditions. total: corruption -> mean total effect, in logits."""

    components: tuple[Site, ...]
    conditions: tuple[Condition, ...]
    total: Mapping[str, float]

    @cached_property
    def significant(self) -> NDArray[np.bool_]:
        """[component]: q below 5 % in at least one condition."""
        return np.asarray(np.stack([condition.q < FDR for condition in self.conditions]).any(0))

    @cached_property
    def sign_conflicts(self) -> NDArray[np.bool_]:
        """[component]: significantly positive in one condition and significantly negative in another."""
        found = np.stack([np.sign(c.mean) * (c.q < FDR) for c in self.conditions])
        return np.asarray((found > 0).any(0) & (found < 0).any(0))

    @cached_property
    def strength(self) -> Floats:
        """[component]: mean absolute effect under the main corruption, both directions; suppressing counts alike."""
        main = self.conditions[0].corruption
        return np.stack([np.abs(c.mean) for c in self.conditions if c.corruption == main]).mean(0)

    def ranked(self) -> list[int]:
        """Component numbers, strongest first."""
        return sorted(range(len(self.components)), key=lambda i: (-self.strength[i], i))

    def condition(self, corruption: str, direction: str) -> Condition:
        """One condition. Raises UnknownNameError for one that was not measured."""
        named = {f"{c.corruption}, {c.direction}": c for c in self.conditions}
        key = f"{corruption}, {direction}"
        if key not in named:
            raise UnknownNameError("condition", key, named)
        return named[key]

    def to_json(self) -> dict[str, Any]:
        names = [str(part) for part in self.components]
        return {
            "components": names,
            "unit": "share of the total effect",
            "conditions": [condition.to_json() for condition in self.conditions],
            "sign_conflicts": [name for name, hit in zip(names, self.sign_conflicts, strict=True) if hit],
            "significant": [name for name, hit in zip(names, self.significant, strict=True) if hit],
        }

    def _repr_html_(self) -> str:
        heads = "".join(f"<th>{escape(c.corruption)}, {c.direction}</th>" for c in self.conditions)
        rows = "".join(self._row(number) for number in self.ranked()[:SHOWN])
        caption = "<caption>Largest effects, share of the total effect</caption>"
        return f"<table>{caption}<tr><th>component</th>{heads}</tr>{rows}</table>"

    def _row(self, number: int) -> str:
        cells = "".join(f"<td>{condition.mean[number]:+.3f}</td>" for condition in self.conditions)
        return f"<tr><td>{escape(str(self.components[number]))}</td>{cells}</tr>"


def decompose(bench: Bench) -> Effects:
    """Measure every component alone under every corruption of the bench, noising and denoising.

    Raises InputError when a corruption does not change the logit difference at all.
    """
    parts = components(bench.model)
    conditions = []
    for corruption in bench.corruptions:
        for direction in DIRECTIONS:
            values = bench.effects(parts, corruption, direction).double().numpy()
            conditions.append(summarise(bench, corruption, direction, values))
    total = {name: float(bench.total(name).mean()) for name in bench.corruptions}
    return Effects(tuple(parts), tuple(conditions), total)


def clusters(bench: Bench) -> tuple[tuple[str, ...], ...]:
    """Groups that a bench's intervals respect; see `clusters_of`."""
    return clusters_of(bench.pairs)


def clusters_of(pairs: Pairs) -> tuple[tuple[str, ...], ...]:
    """Groups that intervals respect: template and names as far as the pairs have them, else their first two kinds.

    A kind of which all prompts share one label is left out: nothing can be said about its spread.
    """
    named = [kind for kind in ("template", "names") if kind in pairs.groups] or sorted(pairs.groups)[:2]
    return tuple(tuple(pairs.groups[kind]) for kind in named if len(set(pairs.groups[kind])) > 1)


def summarise(bench: Bench, corruption: str, direction: str, values: Floats) -> Condition:
    """Statistics of effects [component, example], in logits, as shares of the corruption's total effect."""
    total = float(bench.total(corruption).mean())
    if total == 0:
        raise InputError(
            f"corruption {corruption!r} does not change the mean logit difference of these {bench.n} prompts, so there "
            "is no effect to take apart; check that answers and distractors differ in what the corruption changes"
        )
    shares = values / total
    tests = [clustered_t(row, *clusters(bench)) for row in shares]
    p = np.array([test.p_two_sided for test in tests])
    flipped = (np.sign(shares) != np.sign(shares.mean(1, keepdims=True))) & (np.abs(shares) > FLIP_SHARE)
    return Condition(
        corruption, direction, shares,
        mean=shares.mean(1), low=np.array([test.low for test in tests]), high=np.array([test.high for test in tests]),
        sd=shares.std(1, ddof=1), p=p, q=np.asarray(bh(p)), sign_flips=flipped.mean(1),
    )  # fmt: skip
