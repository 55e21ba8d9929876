"""Decompose: the exact effect of every component on its own, under every corruption and in both directions.

Nothing is approximated: each figure is a measured run with that one component patched. Prompts of one template are not
independent, so intervals and p-values are clustered by template (and names), and the 301 or so p-values of a condition
are corrected for each other (Benjamini and Hochberg). A component that works against the answer counts like one that helps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vesalius.bench import DIRECTIONS, Bench, components
from vesalius.jobs import Blocks
from vesalius.site import Site
from vesalius.stats import bh, clustered_t

FDR = 0.05
# Components measured per stored block: a killed run loses at most one.
BLOCK = 43
# A prompt counts as flipped when its effect has the other sign and is at least this share of the total effect.
FLIP_SHARE = 0.01

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
        return np.stack([condition.q < FDR for condition in self.conditions]).any(0)

    @cached_property
    def sign_conflicts(self) -> NDArray[np.bool_]:
        """[component]: significantly positive in one condition and significantly negative in another."""
        found = np.stack([np.sign(c.mean) * (c.q < FDR) for c in self.conditions])
        return (found > 0).any(0) & (found < 0).any(0)

    @cached_property
    def strength(self) -> Floats:
        """[component]: mean absolute effect over conditions; what ranks components, helping or suppressing alike."""
        return np.stack([np.abs(condition.mean) for condition in self.conditions]).mean(0)

    def ranked(self) -> list[int]:
        """Component numbers, significant ones first, then by strength."""
        return sorted(range(len(self.components)), key=lambda i: (not self.significant[i], -self.strength[i]))

    def condition(self, corruption: str, direction: str) -> Condition:
        return next(c for c in self.conditions if (c.corruption, c.direction) == (corruption, direction))

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
        rows = "".join(
            f"<tr><td>{escape(str(self.components[i]))}</td>" + "".join(f"<td>{c.mean[i]:+.3f}</td>" for c in self.conditions) + "</tr>"
            for i in self.ranked()[:15]
        )
        heads = "".join(f"<th>{escape(c.corruption)}, {c.direction}</th>" for c in self.conditions)
        return f"<table><caption>Largest effects, share of the total effect</caption><tr><th>component</th>{heads}</tr>{rows}</table>"


def decompose(bench: Bench, blocks: Blocks | None = None) -> Effects:
    """Measure every component alone under every corruption of the bench, noising and denoising."""
    parts = components(bench.model)
    conditions = []
    for corruption in bench.corruptions:
        for direction in DIRECTIONS:
            _measure(bench, parts, corruption, direction, blocks)
            values = bench.effects(parts, corruption, direction).double().numpy()
            conditions.append(summarise(bench, corruption, direction, values))
    total = {name: float(bench.total(name).mean()) for name in bench.corruptions}
    return Effects(tuple(parts), tuple(conditions), total)


def _measure(bench: Bench, parts: Sequence[Site], corruption: str, direction: str, blocks: Blocks | None) -> None:
    """Effects in blocks, kept on disk when there are blocks to keep them in."""
    if blocks is None:
        return
    for first in range(0, len(parts), BLOCK):
        some = parts[first : first + BLOCK]
        stored = bench.stored(
            blocks,
            f"effects-{corruption}-{direction}-{first}",
            lambda some=some: _arrays(*bench.recall(some, corruption, direction)),  # type: ignore[misc]
        )
        bench.remember(some, corruption, direction, torch.from_numpy(stored["true"]), torch.from_numpy(stored["other"]))


def _arrays(true: torch.Tensor, other: torch.Tensor) -> dict[str, NDArray[Any]]:
    return {"true": true.numpy(), "other": other.numpy()}


def clusters(bench: Bench) -> tuple[tuple[str, ...], ...]:
    """Groups that intervals respect: templates and names, as far as the pairs have them."""
    return tuple(tuple(bench.pairs.groups[name]) for name in ("template", "names") if name in bench.pairs.groups)


def summarise(bench: Bench, corruption: str, direction: str, values: Floats) -> Condition:
    """Statistics of effects [component, example], in logits, as shares of the corruption's total effect."""
    total = float(bench.total(corruption).mean())
    shares = values / total
    tests = [clustered_t(row, *clusters(bench)) for row in shares]
    p = np.array([test.p_two_sided for test in tests])
    flipped = (np.sign(shares) != np.sign(shares.mean(1, keepdims=True))) & (np.abs(shares) > FLIP_SHARE)
    return Condition(
        corruption, direction, shares,
        mean=shares.mean(1), low=np.array([test.low for test in tests]), high=np.array([test.high for test in tests]),
        sd=shares.std(1, ddof=1), p=p, q=np.asarray(bh(p)), sign_flips=flipped.mean(1),
    )  # fmt: skip
