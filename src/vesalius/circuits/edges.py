"""Measured edges between the members of a circuit: what patching one alone changes in each later one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vesalius.activations import Activations
from vesalius.bench import EMBED, Bench
from vesalius.circuits.circuit import Edge
from vesalius.intervention import Patch
from vesalius.model.products import computing
from vesalius.patching.cost import Cost
from vesalius.site import Site

SMALLEST_EDGE = 0.05
EDGE_EXAMPLES = 16


def find_edges(bench: Bench, members: Sequence[Site], examples: int = EDGE_EXAMPLES) -> tuple[Edge, ...]:
    """Measured edges between members, on the bench's first prompts under its main corruption.

    For a source s and a later target t, with D the target's change between the clean and the corrupted run and d its
    change when only s is patched: weight = <d, D> / <D, D> over live positions. To `logits`: the source's own direct
    effect, clean minus corrupted, as a share of the total effect. From `embed`: 1 by this definition for every target,
    so only those in the first member's layer are listed. Edges under 5 % are left out.
    """
    few = Bench(bench.model, {bench.main: bench.pairs.subset(range(min(examples, bench.n)))}, bench.seed, check=False)
    parts = [part for part in members if part != EMBED]
    measure = _Measure(few, parts)
    edges = [Edge(str(EMBED), str(target), 1.0) for target in _roots(parts)] if EMBED in members else []
    for source in parts:
        edges += [
            *measure.into(source, [target for target in parts if feeds(source, target)]),
            *_to_logits(few, source),
        ]
    bench.cost = bench.cost + Cost(float(measure.forwards), float(measure.forwards), 0)
    return tuple(edges)


def feeds(source: Site, target: Site) -> bool:
    """Whether a component's output reaches another: in a later layer, or from a head to the MLP of its own layer.

    In models whose attention and MLP run side by side the latter is measured all the same, as 0.
    """
    assert source.layer is not None and target.layer is not None
    if source.layer == target.layer:
        return source.kind == "z" and target.kind == "mlp_out"
    return target.layer > source.layer


class _Measure:
    """Clean and corrupted values of the members, and plain runs with one of them patched."""

    def __init__(self, few: Bench, parts: Sequence[Site]) -> None:
        self._few = few
        self.forwards = 0
        sites = _sites(parts)
        self._clean, self._corrupted = (self._run(which, sites) for which in ("clean", "corrupted"))
        position = torch.arange(few.pairs.clean.shape[1])[None]
        self._live = few.pairs.real & (position <= few.pairs.at[:, None])

    def into(self, source: Site, targets: Sequence[Site]) -> list[Edge]:
        """Edges of one source."""
        if not targets:
            return []
        run = self._run("clean", _sites(targets), [Patch(source, source=self._corrupted)])
        found = [Edge(str(source), str(target), self._weight(run, target)) for target in targets]
        return [edge for edge in found if abs(edge.weight) >= SMALLEST_EDGE]

    def _weight(self, run: Activations, target: Site) -> float:
        change = (self._clean[target] - self._corrupted[target])[self._live]
        moved = (self._clean[target] - run[target])[self._live]
        return float((moved * change).sum() / change.pow(2).sum().clamp_min(1e-12))

    def _run(self, which: str, sites: Sequence[Site], edits: Sequence[Patch] = ()) -> Activations:
        self.forwards += self._few.n
        with computing():
            run = self._few.model.run(
                self._few.pairs.tokens(which), capture=sites, interventions=edits, last_logits=True
            )
        return run.activations


def _sites(parts: Sequence[Site]) -> list[Site]:
    return sorted({part.whole for part in parts}, key=lambda site: site.order)


def _roots(parts: Sequence[Site]) -> list[Site]:
    """The members of the first layer that has any."""
    first = min((part.layer for part in parts if part.layer is not None), default=0)
    return [part for part in parts if part.layer == first]


def _to_logits(bench: Bench, source: Site) -> list[Edge]:
    change: Tensor = bench.frozen("clean").of(bench.write(source) - bench.write(source, bench.main))
    weight = float(change.mean() / bench.total(bench.main).mean())
    return [Edge(str(source), "logits", weight)] if abs(weight) >= SMALLEST_EDGE else []
