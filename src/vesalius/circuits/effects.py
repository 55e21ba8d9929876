"""Effects: the exact effect of every component on its own, under every corruption and in both directions.

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

from vesalius.errors import InputError, UnknownNameError
from vesalius.parts import Part
from vesalius.quantities import Runs
from vesalius.quantities.runs import DIRECTIONS
from vesalius.stats import Measurement, bh, clustered_means, measure

FDR = 0.05
# A prompt counts as flipped when its effect has the other sign and is at least this share of the total effect.
FLIP_SHARE = 0.01
# Components in the table a notebook shows.
SHOWN = 15
UNIT = "share of the total effect"

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Condition:
    """Effects under one corruption and direction, as shares of that corruption's total effect.

    effects: one Measurement per component. p: two-sided; q: Benjamini-Hochberg; sign_flips: share of prompts whose sign
    differs from the mean's.
    """

    corruption: str
    direction: str
    effects: tuple[Measurement, ...]
    p: Floats
    q: Floats
    sign_flips: Floats

    @cached_property
    def values(self) -> Floats:
        """[component, example]."""
        return np.array([effect.values for effect in self.effects])

    @cached_property
    def mean(self) -> Floats:
        """[component]."""
        return np.array([effect.estimate for effect in self.effects])

    def to_json(self) -> dict[str, Any]:
        arrays = {name: [getattr(effect, name) for effect in self.effects] for name in ("low", "high")}
        own = {name: getattr(self, name).tolist() for name in ("p", "q", "sign_flips")}
        deviation = self.values.std(1, ddof=1).tolist()
        where = {"corruption": self.corruption, "direction": self.direction}
        return {**where, "mean": self.mean.tolist(), **arrays, "sd": deviation, **own}


@dataclass(frozen=True, eq=False)
class Effects:
    """Effects of all components under all conditions. total: corruption -> mean total effect, in the metric's unit."""

    components: tuple[Part, ...]
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
            "unit": UNIT,
            "conditions": [condition.to_json() for condition in self.conditions],
            "sign_conflicts": [name for name, hit in zip(names, self.sign_conflicts, strict=True) if hit],
            "significant": [name for name, hit in zip(names, self.significant, strict=True) if hit],
        }

    def _repr_html_(self) -> str:
        heads = "".join(f"<th>{escape(c.corruption)}, {c.direction}</th>" for c in self.conditions)
        rows = "".join(self._row(number) for number in self.ranked()[:SHOWN])
        caption = f"<caption>Largest effects, {UNIT}</caption>"
        return f"<table>{caption}<tr><th>component</th>{heads}</tr>{rows}</table>"

    def _row(self, number: int) -> str:
        cells = "".join(f"<td>{condition.mean[number]:+.3f}</td>" for condition in self.conditions)
        return f"<tr><td>{escape(str(self.components[number]))}</td>{cells}</tr>"


def component_effects(runs: Runs) -> Effects:
    """Patch every component alone under every corruption of the data, noising and denoising.

    Raises InputError when a corruption does not change the metric at all.
    """
    conditions = []
    for corruption in runs.corruptions:
        for direction in DIRECTIONS:
            values = runs.effects(runs.components, corruption, direction).double().numpy()
            conditions.append(summarise(runs, corruption, direction, values))
    total = {name: runs.mean(runs.total(name)) for name in runs.corruptions}
    return Effects(runs.components, tuple(conditions), total)


def summarise(runs: Runs, corruption: str, direction: str, values: Floats) -> Condition:
    """Statistics of effects [component, example], in the metric's unit, as shares of the corruption's total effect."""
    total = runs.mean(runs.total(corruption))
    if total == 0:
        raise InputError(
            f"corruption {corruption!r} does not change the mean metric of these {runs.n} prompts, so there is no "
            "effect to take apart; check that answers and distractors differ in what the corruption changes"
        )
    shares = values / total
    labels = [runs.groups[kind] for kind in runs.clusters]
    # A screen on the data the claims are made from: Student's p-values, which no claim rests on.
    p = clustered_means(shares, *labels).p_two_sided
    flipped = (np.sign(shares) != np.sign(shares.mean(1, keepdims=True))) & (np.abs(shares) > FLIP_SHARE)
    measured = tuple(
        measure(str(part), row, groups=runs.groups, clusters=runs.clusters, unit=UNIT)
        for part, row in zip(runs.components, shares, strict=True)
    )
    return Condition(corruption, direction, measured, p, np.asarray(bh(p)), flipped.mean(1))
