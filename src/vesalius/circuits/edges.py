"""Measured edges between the members of a circuit: what patching one alone changes in each later one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vesalius.activations import Activations
from vesalius.circuits.graph import LOGITS
from vesalius.intervention import Patch
from vesalius.model.products import computing
from vesalius.parts import Edge, Part, places
from vesalius.patching.plan import Cost
from vesalius.quantities import DIRECT_EFFECT, Runs
from vesalius.quantities.contrast import EMBED
from vesalius.quantities.direct_effect import frozen, written

SMALLEST_EDGE = 0.05
EDGE_EXAMPLES = 16


def find_edges(runs: Runs, members: Sequence[Part], examples: int = EDGE_EXAMPLES) -> dict[Edge, float]:
    """Measured edges between members with their weights, on the first prompts under the main corruption.

    For a source s and a later target t, with D the target's change between the clean and the corrupted run and d its
    change when only s is patched: weight = <d, D> / <D, D> over live positions. To the logits: the source's own direct
    effect, clean minus corrupted, as a share of the total effect. From `embed`: 1 by this definition for every target,
    so only those in the first member's layer are listed. Edges under 5 % are left out.
    """
    few = runs.few(range(min(examples, runs.n)))
    parts = [part for part in members if part != EMBED]
    measure = _Measure(few, parts)
    edges = {Edge(EMBED, target): 1.0 for target in _roots(parts)} if EMBED in members else {}
    for source in parts:
        edges |= measure.into(source, [target for target in parts if feeds(source, target)])
        edges |= _to_logits(few, source)
    runs.cost = runs.cost + Cost(float(measure.forwards), float(measure.forwards))
    return {edge: weight for edge, weight in edges.items() if abs(weight) >= SMALLEST_EDGE}


def feeds(source: Part, target: Part) -> bool:
    """Whether a component can reach another: what it writes is made before what the other reads.

    So a head reaches the MLP of its own layer, and its neurons. In models whose attention and MLP run side by side that
    is measured all the same, as 0; and so is every edge of a module, whose place in the forward pass is not known.
    """
    one, two = source.writes[-1], target.reads[0]
    if "module" in (one.kind, two.kind):
        return True
    return one.whole.order < two.whole.order


class _Measure:
    """Clean and corrupted values of the members, and plain runs with one of them patched."""

    def __init__(self, few: Runs, parts: Sequence[Part]) -> None:
        few.model.check_evaluating()
        self._few = few
        self.forwards = 0
        self._clean, self._corrupted = (self._run(which, parts) for which in ("clean", few.main))
        position = torch.arange(few.pairs.clean.shape[1])[None]
        self._live = few.pairs.real & (position <= few.pairs.at[:, None])

    def into(self, source: Part, targets: Sequence[Part]) -> dict[Edge, float]:
        """Edges of one source."""
        if not targets:
            return {}
        run = self._run("clean", targets, [Patch(source, source=self._corrupted)])
        return {Edge(source, target): self._weight(run, target) for target in targets}

    def _weight(self, run: Activations, target: Part) -> float:
        clean = target.value(self._clean)
        change = (clean - target.value(self._corrupted))[self._live]
        moved = (clean - target.value(run))[self._live]
        return float((moved * change).sum() / change.pow(2).sum().clamp_min(1e-12))

    def _run(self, which: str, parts: Sequence[Part], edits: Sequence[Patch] = ()) -> Activations:
        self.forwards += self._few.n
        with computing():
            run = self._few.model.run(
                self._few.tokens(which), capture=places(parts), interventions=edits, last_logits=True
            )
        return run.activations


def _roots(parts: Sequence[Part]) -> list[Part]:
    """The members of the first layer that has any."""
    layers = [part.reads[0].layer for part in parts]
    first = min((layer for layer in layers if layer is not None), default=0)
    return [part for part, layer in zip(parts, layers, strict=True) if layer == first]


def _to_logits(runs: Runs, source: Part) -> dict[Edge, float]:
    """Nothing where the part has no direct effect on the metric."""
    if DIRECT_EFFECT.refuses(runs, source):
        return {}
    change: Tensor = frozen(runs, "clean").of(written(runs, source) - written(runs, source, runs.main))
    return {Edge(source, LOGITS): float(change.mean() / runs.total(runs.main).mean())}
