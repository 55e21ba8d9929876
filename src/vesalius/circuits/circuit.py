"""Circuit: the smallest set of components found by a stated rule.

The rule, fixed before any patching:

1. Rank components by their mean absolute effect under the main corruption, noising and denoising.
2. Take the shortest prefix (of the tried sizes) that keeps at least `START` of the effect when every other component
   gets its value from the corrupted prompt (resample ablation, discovery prompts).
3. Drop, again and again, the sixth of the members whose single removal changes the kept effect least; when that would
   bring it under `KEEP`, drop half as many; stop when not even one can go.

Single effects alone would keep members that only matter while the whole model runs; step 3 asks what the set needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
import torch

from vesalius.circuits.effects import Effects, Floats
from vesalius.circuits.graph import LOGITS
from vesalius.circuits.verified import Check
from vesalius.errors import InputError
from vesalius.parts import Edge, HasLatents, Part, Unit, as_part
from vesalius.patching.scores import Scores
from vesalius.quantities import Runs
from vesalius.quantities.circuit import metric_with_only
from vesalius.quantities.contrast import EMBED
from vesalius.refs import resolve
from vesalius.stats import Measurement, measure

START, KEEP = 0.9, 0.8
SIZES = (5, 10, 15, 20, 25, 30, 40, 50, 60, 80, 100, 120, 150, 200, 300, 500, 1000)

RULE = (
    "Components ranked by their mean absolute effect under the main corruption, both directions; the shortest prefix "
    f"that keeps {START:.0%} of the effect while all others get corrupted values; then members dropped, least needed "
    f"first, as long as {KEEP:.0%} is kept. Discovery prompts only."
)


@dataclass(frozen=True)
class Circuit:
    """Components found by `rule`, with their edges.

    members: in forward order. kept: share of the effect they keep alone, on the prompts they were found on. reached:
    False when no tried prefix kept `KEEP` of the effect; then it is the best of them. edges: weight of each, the share
    of the target's change, clean to corrupted, that patching the source alone brings about. history: (size, kept) of
    every set accepted on the way.

    A circuit that `discover` found has edges from writers to readers (see `Graph`), each with the mean effect of
    cutting it alone as weight. scores: what edges' effects were measured or estimated to be, per example. check: how
    far estimates can be trusted. setting: what was asked, of which model, and the mean effect of cutting everything.
    """

    members: tuple[Part, ...]
    kept: float
    reached: bool
    edges: Mapping[Edge, float] = field(default_factory=dict)
    rule: str = RULE
    history: tuple[tuple[int, float], ...] = ()
    scores: Scores | None = None
    check: Check | None = None
    setting: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.members)

    def to_json(self) -> dict[str, Any]:
        return {
            "members": [str(part) if isinstance(part, Unit) else part.ref for part in self.members],
            "kept": self.kept,
            "reached": self.reached,
            "edges": edges_to_json(self.edges),
            "rule": self.rule,
            "history": [list(step) for step in self.history],
            **({"setting": dict(self.setting)} if self.setting else {}),
            **({"check": self.check.to_json()} if self.check else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *given: Part | HasLatents) -> Circuit:
        """The circuit that `to_json` gave. given: what its members name by hash, see `resolve`."""
        members = tuple(as_part(one) if isinstance(one, str) else resolve(one, *given) for one in data["members"])
        return cls(
            members=members,
            kept=float(data["kept"]),
            reached=bool(data["reached"]),
            edges=edges_from_json(data["edges"], members),
            rule=data["rule"],
            history=tuple((int(size), float(share)) for size, share in data["history"]),
            setting=data.get("setting", {}),
        )

    def _repr_html_(self) -> str:
        names = ", ".join(escape(str(part)) for part in self.members)
        title = f"<b>Circuit of {len(self)} components</b>, keeps {self.kept:.0%} of the effect (discovery)"
        told = f"<p>{escape(self.check.describe())}</p>" if self.check else ""
        return f"<p>{title}</p><p>{names}</p>{told}"


def edges_to_json(edges: Mapping[Edge, float]) -> list[dict[str, Any]]:
    """Rows of source, target and weight."""
    return [{"source": str(e.source), "target": str(e.target), "weight": weight} for e, weight in edges.items()]


def edges_from_json(rows: Sequence[Mapping[str, Any]], members: Sequence[Part]) -> dict[Edge, float]:
    """The edges that `edges_to_json` gave, between these members and the logits."""
    named = {str(part): part for part in (*members, LOGITS)}
    part = lambda name: named[name] if name in named else as_part(name)  # noqa: E731
    return {Edge(part(row["source"]), part(row["target"])): float(row["weight"]) for row in rows}


def share(runs: Runs, values: Floats, empty: Floats, name: str) -> Measurement:
    """What a set does of the whole effect: (values - empty) / mean(full - empty) per example, a ratio of means.

    values, empty: the metric [example]; empty is the run with everything ablated (Wang et al. 2022; a mean of ratios
    would be dominated by prompts with a small denominator). Raises InputError where ablating everything does nothing.
    """
    whole = runs.mean(runs.metric("clean").double() - torch.from_numpy(empty))
    if whole == 0:
        raise InputError(f"{name}: ablating every component does not change the metric, so there is no share of it")
    return measure(name, (values - empty) / whole, groups=runs.groups, clusters=runs.clusters, unit="share")


def find_circuit(runs: Runs, effects: Effects) -> Circuit:
    """The circuit by the rule above, without edges (`find_edges` measures those)."""
    search = _Search(runs)
    ranked = [effects.components[i] for i in effects.ranked()]
    members, history = search.prefix(ranked)
    reached = history[-1][1] >= KEEP
    if reached:
        members, history = search.thin(members, history)
    order = sorted(members, key=lambda part: (part != EMBED, part.writes[0].order))
    return Circuit(tuple(order), history[-1][1], reached, history=tuple(history))


class _Search:
    """Shares kept by candidate sets."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._empty: float | None = None

    def kept(self, sets: Sequence[Sequence[Part]]) -> list[float]:
        """Share of the effect each set keeps alone (resample ablation of the rest)."""
        if self._empty is None:
            self._empty = self._means([[]])[0]
        full = float(self._runs.metric("clean").mean())
        return [(mean - self._empty) / (full - self._empty) for mean in self._means(sets)]

    def _means(self, sets: Sequence[Sequence[Part]]) -> list[float]:
        names = [sorted(map(str, members)) for members in sets]
        found = self._runs.stored(
            f"kept {names}", lambda: {"mean": metric_with_only(self._runs, sets, "resample").mean(1)}
        )
        return [float(mean) for mean in found["mean"]]

    def prefix(self, ranked: list[Part]) -> tuple[list[Part], list[tuple[int, float]]]:
        """Steps 1 and 2 of the rule; when no prefix keeps enough, the one that keeps most."""
        best: tuple[int, float] = (1, -np.inf)
        for size in [*(size for size in SIZES if size < len(ranked)), len(ranked)]:
            share = self.kept([ranked[:size]])[0]
            if share > best[1]:
                best = (size, share)
            if share >= START:
                break
        return ranked[: best[0]], [best]

    def thin(self, members: list[Part], history: list[tuple[int, float]]) -> tuple[list[Part], list[tuple[int, float]]]:
        """Step 3 of the rule."""
        while len(members) > 1:
            without = self.kept([[m for m in members if m != part] for part in members])
            share = history[-1][1]
            least = sorted(range(len(members)), key=lambda i: (abs(without[i] - share), i))
            smaller = self._drop(members, least)
            if smaller is None:
                break
            members = smaller[0]
            history = [*history, (len(members), smaller[1])]
        return members, history

    def _drop(self, members: list[Part], least: list[int]) -> tuple[list[Part], float] | None:
        count = max(1, len(members) // 6)
        while count:
            gone = set(least[:count])
            rest = [part for number, part in enumerate(members) if number not in gone]
            share = self.kept([rest])[0]
            if share >= KEEP:
                return rest, share
            count //= 2
        return None
