"""From a model and pairs to a circuit of edges, by a method of choice. See `METHODS` for what each one does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vesalius.circuits import attribution
from vesalius.circuits.attribution import STEPS, estimated
from vesalius.circuits.circuit import KEEP, Circuit
from vesalius.circuits.cutting import Ablation, ablation
from vesalius.circuits.exact import exact_scores, exact_values
from vesalius.circuits.graph import Graph
from vesalius.circuits.greedy import acdc
from vesalius.circuits.hybrid import SAMPLED, SHORTLIST, hybrid
from vesalius.circuits.masked import with_only
from vesalius.circuits.pruning import prune_edges
from vesalius.circuits.verified import Check, verified
from vesalius.circuits.wired import Wiring
from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Pairs
from vesalius.jobs import Event, Sink, write_atomic
from vesalius.jobs.progress import shown
from vesalius.jobs.untrusted import read_json, understood
from vesalius.metric import Metric, logit_diff
from vesalius.model import Model
from vesalius.parts import Part
from vesalius.patching.scores import Scores

SMALLEST = 0.005
METHODS: Mapping[str, str] = MappingProxyType(
    {
        "hybrid": "a shortlist by integrated gradients, every edge on it cut exactly, a bound on what was missed",
        "exact": "every edge cut exactly, one run each",
        "acdc": "edges dropped one after the other from the logits back, as long as the metric stays (Conmy et al.)",
        "pruning": "a mask over all edges, learned to be sparse (edge pruning, Bhaskar et al. 2024)",
        **{name: "estimates from gradients, a random sample of them checked exactly" for name in attribution.METHODS},
    }
)


def discover(
    model: Model | Wiring,
    pairs: Pairs,
    method: str = "hybrid",
    *,
    kind: str = "resample",
    metric: Metric = logit_diff,
    size: int | None = None,
    smallest: float = SMALLEST,
    steps: int = STEPS,
    shortlist: int = SHORTLIST,
    drawn: int = SAMPLED,
    seed: int = 0,
    out: str | Path | None = None,
    sink: Sink | None = None,
) -> Circuit:
    """A circuit of edges.

    pairs: of one split, such as `pairs.split("discovery")`: a circuit is a hypothesis, and its figures come from other
    prompts (`circuits.faithfulness`). kind: what cut edges carry, "resample", "mean" or "zero". smallest: the mean
    absolute effect from which on an edge is part of the circuit, as a share of the effect of cutting all edges; for
    ACDC its threshold. size: the number of edges instead, the highest by mean effect. steps: of integrated gradients.
    shortlist, drawn: how many edges are checked exactly, and how many random ones. out: a folder in which finished runs
    are kept, so that a killed search goes on.

    Raises UnknownNameError for an unknown method or ablation; InputError for pairs of several splits, for a task that
    the model does not do, for what the method does not take, and for a model without a graph of edges.
    """
    if method not in METHODS:
        raise UnknownNameError("method", method, METHODS)
    if len(pairs.split_names) > 1:
        raise InputError(
            f"these pairs hold the splits {', '.join(pairs.split_names)}; search on one, such as "
            'pairs.split("discovery"), so that the circuit can be tested on another'
        )
    cut = ablation(model, pairs, metric, kind)
    with shown(sink) as screen:
        return _Search(cut, method, size, smallest, steps, shortlist, drawn, seed, out, screen).circuit()


@dataclass(frozen=True, eq=False)
class _Found:
    """The edges of a circuit. effects: mean effect of cutting each one alone, measured where it was, else estimated."""

    mask: Bool[Tensor, " edge"]
    effects: Float[Tensor, " edge"]
    scores: Scores | None = None
    check: Check | None = None


@dataclass(frozen=True, eq=False)
class _Search:
    cut: Ablation
    method: str
    size: int | None
    smallest: float
    steps: int
    shortlist: int
    drawn: int
    seed: int
    out: str | Path | None
    sink: Sink

    def circuit(self) -> Circuit:
        graph = self.cut.wired.graph
        everything = torch.ones(1, len(graph), dtype=torch.bool)
        base, empty = self.cut.plain()[0], with_only(self.cut, ~everything)[0]
        self._refuse_what_is_not_done(base)
        total = float((base - empty).abs().mean())
        if total <= 1e-6 * max(1.0, float(base.abs().mean())):
            self.sink(Event("note", self.method, message="cutting all edges changes nothing: the circuit is empty"))
            return self._made(_Found(torch.zeros(len(graph), dtype=torch.bool), torch.zeros(len(graph))), 1.0, 0.0)
        found = self._edges(self.smallest * total)
        alone = with_only(self.cut, found.mask[None])[0]
        kept = float(alone.mean() - empty.mean()) / float(base.mean() - empty.mean())
        return self._made(found, kept, float((base - empty).mean()))

    def _refuse_what_is_not_done(self, base: Float[Tensor, " example"]) -> None:
        right = int((base > 0).sum())
        if self.cut.metric.name == logit_diff.name and 2 * right <= len(base):
            raise InputError(
                f"{self.cut.wired.model.name} prefers the answer on {right} of {len(base)} clean prompts: it does not "
                "do this task, so there is no circuit to find. Use another task or model"
            )

    def _edges(self, smallest: float) -> _Found:
        """The circuit's edges. smallest: in the metric's unit."""
        if self.method == "acdc":
            self._refuse_size("threshold (smallest=)")
            return self._measured(acdc(self.cut, smallest, out=self.out, sink=self.sink))
        if self.method == "pruning":
            return self._measured(prune_edges(self.cut, size=self.size, seed=self.seed, sink=self.sink))
        if self.method == "exact":
            scores = self._exact(torch.arange(len(self.cut.wired.graph)))
            return _Found(self._largest(scores, smallest), scores.effects.mean(1), scores)
        if self.method == "hybrid":
            mask, estimates, found = hybrid(
                self.cut,
                smallest,
                size=self.size,
                shortlist=self.shortlist,
                drawn=self.drawn,
                steps=self.steps,
                seed=self.seed,
                out=self.out,
                sink=self.sink,
            )
            effects = estimates.effects.mean(1)
            effects[found.numbers] = found.measured.effects.mean(1)
            return _Found(mask, effects, found.measured, found.check)
        scores = estimated(self.cut, self.method, self.steps, sink=self.sink)
        mask = self._largest(scores, smallest)
        some = verified(
            self.cut, scores, mask, self.drawn, smallest, all_chosen=False, seed=self.seed, out=self.out, sink=self.sink
        )
        return _Found(mask, scores.effects.mean(1), scores, some.check)

    def _measured(self, mask: Bool[Tensor, " edge"]) -> _Found:
        """Edges that were chosen by what they do together, and what cutting each of them alone does."""
        numbers, effects = mask.nonzero()[:, 0], torch.zeros(len(mask))
        scores = self._exact(numbers)
        effects[numbers] = scores.effects.mean(1)
        return _Found(mask, effects, scores)

    def _exact(self, numbers: Int[Tensor, " edge"]) -> Scores:
        values, cost = exact_values(self.cut, numbers, seed=self.seed, out=self.out, sink=self.sink)
        return exact_scores(self.cut, numbers, values, cost)

    def _largest(self, scores: Scores, smallest: float) -> Bool[Tensor, " edge"]:
        if self.size is None:
            return scores.effects.abs().mean(1) >= smallest
        mask = torch.zeros(len(scores.values), dtype=torch.bool)
        mask[scores.effects.mean(1).abs().argsort(descending=True, stable=True)[: self.size]] = True
        return mask

    def _refuse_size(self, what: str) -> None:
        if self.size is not None:
            raise InputError(f"{self.method} takes a {what} and no size=")

    def _made(self, found: _Found, kept: float, total: float) -> Circuit:
        cut, graph = self.cut, self.cut.wired.graph
        edges = {graph.edges[number]: float(found.effects[number]) for number in found.mask.nonzero()[:, 0].tolist()}
        return Circuit(
            members=members_of(graph, found.mask),
            kept=kept,
            reached=kept >= KEEP,
            edges=edges,
            rule=f"{self.method}: {METHODS[self.method]}. Discovery prompts only.",
            history=((len(edges), kept),),
            scores=found.scores,
            check=found.check,
            setting={
                "method": self.method,
                "ablation": cut.kind,
                "metric": cut.metric.name,
                "smallest": self.smallest,
                "size": self.size,
                "seed": self.seed,
                "total": total,
                "model": cut.wired.model.content_hash,
                "pairs": cut.pairs.content_hash,
            },
        )


def members_of(graph: Graph, mask: Bool[Tensor, " edge"]) -> tuple[Part, ...]:
    """The nodes that edges touch, in forward order.

    A key-value head that several heads share stands for those of them that have other edges, else for all.
    """
    found = torch.zeros(len(graph.writers), dtype=torch.bool)
    found[graph.writer_of[mask].unique()] = True
    readers = [graph.node_of(number) for number in graph.reader_of[mask].unique().tolist()]
    for nodes in sorted(readers, key=len):
        if nodes and not bool(found[list(nodes)].any()):
            found[list(nodes)] = True
    return tuple(graph.writers[number] for number in found.nonzero()[:, 0].tolist())


def save_circuit(circuit: Circuit, path: str | Path) -> None:
    """Write a circuit as JSON, without its scores."""
    write_atomic(path, json.dumps(circuit.to_json(), indent=1))


def load_circuit(path: str | Path, model: Model) -> Circuit:
    """The circuit that `save_circuit` wrote. FileFormatError for another file, InputError for other weights."""
    with understood(f"{path} holds no circuit"):
        data: Mapping[str, Any] = read_json(Path(path))
        circuit = Circuit.from_json(data)
        found = str(circuit.setting["model"])
    if found != model.content_hash:
        raise InputError(
            f"{path} holds a circuit of a model with weights {found[:12]}; {model.name} has {model.content_hash[:12]}"
        )
    return circuit
