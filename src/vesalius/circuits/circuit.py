"""Circuit: the smallest set of components found by a stated rule, with its measured edges.

The rule, fixed before any patching:

1. Rank components: those significant in some condition first, then by mean absolute effect over conditions.
2. Take the shortest prefix (of the tried sizes) that keeps at least `START` of the effect when every other component gets
   its value from the corrupted prompt (resample ablation, discovery prompts).
3. Drop, again and again, the sixth of the members whose single removal changes the kept effect least; when that would
   bring it under `KEEP`, drop half as many; stop when not even one can go.

Single effects alone would keep members that only matter while the whole model runs; step 3 asks what the set needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vesalius.bench import EMBED, Bench
from vesalius.circuits.effects import Effects
from vesalius.circuits.faithfulness import kept
from vesalius.intervention import Patch
from vesalius.jobs import Blocks
from vesalius.site import Site
from vesalius.sweeps.variants import normal

START, KEEP = 0.9, 0.8
SIZES = (5, 10, 15, 20, 25, 30, 40, 50, 60, 80, 100, 120, 150)
SMALLEST_EDGE = 0.05
EDGE_EXAMPLES = 16

RULE = (
    f"Components ranked by their mean absolute effect over all conditions (significant ones first); the shortest prefix that keeps "
    f"{START:.0%} of the effect while all others get corrupted values; then members dropped, least needed first, as long as "
    f"{KEEP:.0%} is kept. Discovery prompts only."
)


@dataclass(frozen=True)
class Edge:
    """weight: share of the target's change between clean and corrupted runs that patching the source alone brings about."""

    source: str
    target: str
    weight: float


@dataclass(frozen=True)
class Circuit:
    """members: components in forward order. kept: share of the effect they keep alone, on the prompts they were found on."""

    members: tuple[Site, ...]
    kept: float
    reached: bool
    """False when no tried prefix kept enough: then it is the largest one, and says so."""
    edges: tuple[Edge, ...] = ()
    rule: str = RULE
    history: tuple[tuple[int, float], ...] = field(default=())
    """(size, kept) of every set accepted on the way."""

    def __len__(self) -> int:
        return len(self.members)

    def to_json(self) -> dict[str, Any]:
        return {
            "members": [str(part) for part in self.members],
            "kept": self.kept,
            "reached": self.reached,
            "edges": [{"source": e.source, "target": e.target, "weight": e.weight} for e in self.edges],
            "rule": self.rule,
            "history": [list(step) for step in self.history],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Circuit:
        return cls(
            tuple(Site.parse(name) for name in data["members"]), data["kept"], data["reached"],
            tuple(Edge(**edge) for edge in data["edges"]), data["rule"], tuple((int(k), float(f)) for k, f in data["history"]),
        )  # fmt: skip

    def _repr_html_(self) -> str:
        names = ", ".join(escape(str(part)) for part in self.members)
        return f"<p><b>Circuit of {len(self)} components</b>, keeps {self.kept:.0%} of the effect (discovery)</p><p>{names}</p>"


def find_circuit(bench: Bench, effects: Effects, blocks: Blocks | None = None) -> Circuit:
    """The circuit by the rule above. blocks: where finished evaluations are kept."""
    search = _Search(bench, blocks)
    ranked = [effects.components[i] for i in effects.ranked()]
    limit = int(effects.significant.sum())
    sizes = [size for size in SIZES if size < limit] + [max(limit, 1)]
    shares = search.kept([ranked[:size] for size in sizes])
    enough = [number for number, share in enumerate(shares) if share >= START]
    number = enough[0] if enough else int(np.argmax(shares))
    members, share = ranked[: sizes[number]], shares[number]
    history = [(len(members), share)]
    reached = share >= KEEP
    if reached:
        members, history = search.thin(members, history)
    order = sorted(members, key=lambda part: (part != EMBED, part.order))
    return Circuit(tuple(order), history[-1][1], reached, history=tuple(history))


class _Search:
    """Shares kept by candidate sets, remembered in blocks."""

    def __init__(self, bench: Bench, blocks: Blocks | None) -> None:
        self._bench = bench
        self._blocks = blocks or Blocks(None, "")
        self._empty: float | None = None

    def kept(self, sets: Sequence[Sequence[Site]]) -> list[float]:
        """Share of the effect each set keeps alone (resample ablation of the rest)."""
        if self._empty is None:
            self._empty = float(self._means([[]])[0])
        full = float(self._bench.metric("clean").mean())
        return [float((mean - self._empty) / (full - self._empty)) for mean in self._means(sets)]

    def _means(self, sets: Sequence[Sequence[Site]]) -> NDArray[np.float64]:
        names = [sorted(str(part) for part in members) for members in sets]
        key = f"kept-{names}"
        means = self._bench.stored(self._blocks, key, lambda: {"mean": kept(self._bench, sets, "resample").mean(1)})[
            "mean"
        ]
        return np.asarray(means)

    def thin(self, members: list[Site], history: list[tuple[int, float]]) -> tuple[list[Site], list[tuple[int, float]]]:
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

    def _drop(self, members: list[Site], least: list[int]) -> tuple[list[Site], float] | None:
        count = max(1, len(members) // 6)
        while count:
            gone = set(least[:count])
            rest = [part for number, part in enumerate(members) if number not in gone]
            share = self.kept([rest])[0]
            if share >= KEEP:
                return rest, share
            count //= 2
        return None


def find_edges(bench: Bench, members: Sequence[Site], examples: int = EDGE_EXAMPLES) -> tuple[Edge, ...]:
    """Measured edges between members: what patching one alone changes in each later one.

    For a source s and a later target t, with D the target's change between the clean and the corrupted run and d its
    change when only s is patched: weight = <d, D> / <D, D> over live positions. To `logits`: the source's own direct
    effect, clean minus corrupted, as a share of the total effect. Edges under 5 % are left out.
    """
    rows = list(range(min(examples, bench.n)))
    few = Bench(bench.model, {bench.main: bench.pairs.subset(rows)}, bench.seed, check=False)
    parts = [part for part in members if part != EMBED]
    sites = sorted({part.whole for part in parts}, key=lambda site: site.order)
    clean = few.model.run(few.pairs.tokens("clean"), capture=sites).activations
    corrupted = few.model.run(few.pairs.tokens("corrupted"), capture=sites).activations
    live = few.pairs.real & (_positions(few) <= few.pairs.at[:, None])
    edges = [] if EMBED not in members else [Edge(str(EMBED), str(t), 1.0) for t in _roots(parts)]
    for source in parts:
        later = [
            t
            for t in parts
            if (normal(t)[0].order > normal(source)[0].order and t.layer != source.layer) or _feeds(source, t)
        ]
        run = few.model.run(few.pairs.tokens("clean"), capture=sorted({t.whole for t in later}, key=lambda s: s.order) or sites[:1],
                            interventions=[Patch(source, source=corrupted)])  # fmt: skip
        for target in later:
            change = (clean[target] - corrupted[target])[live]
            moved = (clean[target] - run[target])[live]
            weight = float((moved * change).sum() / change.pow(2).sum().clamp_min(1e-12))
            if abs(weight) >= SMALLEST_EDGE:
                edges.append(Edge(str(source), str(target), weight))
        edges += _to_logits(few, source)
    return tuple(edges)


def _feeds(source: Site, target: Site) -> bool:
    """An attention head feeds the MLP of its own layer."""
    return source.layer == target.layer and source.kind == "z" and target.kind == "mlp_out"


def _roots(parts: Sequence[Site]) -> list[Site]:
    """The first members, drawn as fed by the embeddings."""
    first = min((part.layer for part in parts if part.layer is not None), default=0)
    return [part for part in parts if part.layer == first]


def _positions(bench: Bench) -> Any:
    """Position numbers [1, pos] of a bench's prompts."""
    return bench.pairs.clean.new_tensor(range(bench.pairs.clean.shape[1]))[None]


def _to_logits(bench: Bench, source: Site) -> list[Edge]:
    frozen = bench.frozen("clean")
    change = frozen.of(bench.write(source) - bench.write(source, bench.main))
    weight = float(change.mean() / bench.total(bench.main).mean())
    return [Edge(str(source), "logits", weight)] if abs(weight) >= SMALLEST_EDGE else []
