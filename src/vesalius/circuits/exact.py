"""What cutting one edge does, exactly: one run for each edge.

The writer's values are known beforehand, so an edge is cut by giving its reader what it would read without it; the run
starts there. The runs are replays (see `patching`), many at a time; a model that cannot be replayed is run whole, by
`circuits.masked`, which also makes a few of the edges again as a second implementation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from vesalius.circuits.cutting import Ablation, ablation
from vesalius.circuits.masked import with_cut
from vesalius.circuits.wired import Wiring
from vesalius.errors import InputError, SelfCheckError
from vesalius.inputs import Pairs
from vesalius.jobs import Blocks, Event, Sink, silent
from vesalius.jobs.progress import shown
from vesalius.metric import Metric, logit_diff
from vesalius.model import Model
from vesalius.parts import Edge
from vesalius.patching.edits import Edits, Rows, Table
from vesalius.patching.evaluate import TOKENS_PER_BATCH
from vesalius.patching.examples import Examples
from vesalius.patching.plain import allowance
from vesalius.patching.plan import Cost
from vesalius.patching.record import Recording, record
from vesalius.patching.replay import Replay
from vesalius.patching.scores import Scores
from vesalius.patching.scoring import at_reads, score
from vesalius.protocol.canonical import content_hash
from vesalius.seeds import generator_for
from vesalius.site import Site

EDGES_PER_BLOCK = 256
CHECKED = 2


def edge_patching(
    model: Model | Wiring,
    pairs: Pairs,
    *,
    edges: Sequence[Edge] | None = None,
    kind: str = "resample",
    metric: Metric = logit_diff,
    prompts: str = "clean",
    budget: int = TOKENS_PER_BATCH,
    check: bool = True,
    seed: int = 0,
    out: str | Path | None = None,
    sink: Sink | None = None,
) -> Scores:
    """The metric of runs with one edge cut, for each of the edges (default: all), per example.

    kind: the ablation, see `circuits.cutting`. check: make two random edges again by ordinary runs. out: a folder in
    which finished edges are kept, so that a killed job goes on. Returns Scores [edge, example].

    Raises what `ablation` does, UnknownNameError or InputError for edges that are not in the graph, SelfCheckError when
    the two implementations differ beyond rounding.
    """
    cut = ablation(model, pairs, metric, kind, prompts)
    graph = cut.wired.graph
    numbers = torch.arange(len(graph)) if edges is None else torch.tensor([graph.number(edge) for edge in edges]).long()
    with shown(sink) as screen:
        values, cost = exact_values(cut, numbers, budget=budget, check=check, seed=seed, out=out, sink=screen)
    return exact_scores(cut, numbers, values, cost)


def exact_scores(cut: Ablation, numbers: Int[Tensor, " edge"], values: Tensor, cost: Cost) -> Scores:
    """Measured values [edge, example] of some edges as Scores."""
    base, source = cut.plain()
    return Scores(
        values=values,
        base=base,
        source=source,
        mask=torch.ones_like(values, dtype=torch.bool),
        cost=cost,
        items=tuple(cut.wired.graph.edges[number] for number in numbers.tolist()),
        each=None,
        edit=f"cut edge, {cut.kind}",
        metric=cut.metric.name,
        unit=cut.metric.unit,
        prompts=cut.prompts,
        examples=Examples.of(cut.wired.model, cut.pairs, cut.prompts),
    )


def exact_values(
    cut: Ablation,
    numbers: Int[Tensor, " edge"],
    *,
    budget: int = TOKENS_PER_BATCH,
    check: bool = True,
    seed: int = 0,
    out: str | Path | None = None,
    sink: Sink = silent,
) -> tuple[Float[Tensor, "edge example"], Cost]:
    """As `edge_patching`, by the edges' numbers; and what it cost."""
    work = _Work.of(cut, budget)
    if work.base.reason:
        sink(Event("note", "edges", message=f"no replay: {work.base.reason}; every edge is one whole forward"))
    forwards = work.cost(numbers)
    sink(Event("note", "edges", message=f"{len(numbers):,} edges, about {forwards:,.0f} forward passes of one example"))
    blocks = Blocks(out, plan_hash(cut, "edges"), sink)
    found: list[Tensor] = []
    sink(Event("start", "edges", 0, len(numbers)))
    # By layer, so that rows of a batch start together.
    order = numbers[cut.wired.graph.reader_of[numbers].argsort(stable=True)]
    for some in order.split(EDGES_PER_BLOCK):
        name = f"{len(some)} edges {content_hash(some.tolist())[:16]}"
        block: Mapping[str, NDArray[Any]] = blocks.get(
            name,
            lambda some=some: {"values": work.values(some).numpy()},  # type: ignore[misc]
        )
        found.append(torch.from_numpy(np.array(block["values"])))
        sink(Event("advance", "edges", sum(map(len, found)), len(numbers)))
    sink(Event("end", "edges", len(numbers), len(numbers)))
    by_number = torch.zeros(len(cut.wired.graph), len(cut.pairs))
    by_number[order] = torch.cat(found) if found else by_number[order]
    values = by_number[numbers]
    if check and len(numbers) and not work.base.reason:
        work.check(numbers, values, seed)
    return values, Cost(forwards, float(len(numbers) * len(cut.pairs)))


def reader_values(
    cut: Ablation, *, budget: int = TOKENS_PER_BATCH, sink: Sink = silent
) -> Float[Tensor, "reader example"]:
    """The metric of runs in which all edges into one reader are cut, for each reader, exactly."""
    work, count = _Work.of(cut, budget), len(cut.wired.graph.readers)
    sink(Event("start", "readers", 0, count))
    if work.base.reason:
        return with_cut(cut, cut.wired.graph.reader_of[None] == torch.arange(count)[:, None])
    found = torch.zeros(count, len(cut.pairs))
    for at, example in work.batches(torch.arange(count)):
        found[at, example] = work.replayed(at, example, None)
        sink(Event("advance", "readers", int(at.max()) + 1, count))
    sink(Event("end", "readers", count, count))
    return found


def plan_hash(cut: Ablation, what: str) -> str:
    """What results of edges depend on."""
    model = cut.wired.model.content_hash
    return content_hash([what, model, cut.pairs.content_hash, cut.metric.name, cut.kind, cut.prompts])


@dataclass(frozen=True, eq=False)
class _Work:
    cut: Ablation
    base: Recording
    first: Int[Tensor, " example"]
    """The first position that cutting can change."""
    budget: int

    @classmethod
    def of(cls, cut: Ablation, budget: int) -> _Work:
        base = record(cut.wired.model, cut.tokens)
        first = torch.zeros(len(cut.pairs), dtype=torch.long)
        if cut.kind == "resample" and base.causal:
            first = (cut.pairs.clean != cut.pairs.corrupted).long().argmax(1)
        return cls(cut, base, first, budget)

    def cost(self, numbers: Int[Tensor, " edge"]) -> float:
        """Forward passes of one example."""
        if self.base.reason:
            return float(len(numbers) * len(self.cut.pairs))
        graph = self.cut.wired.graph
        layers = torch.tensor([graph.n_layers if r.site.layer is None else r.site.layer for r in graph.readers])
        share = (graph.n_layers - layers[graph.reader_of[numbers]]) / graph.n_layers
        live = (self.cut.pairs.ends - self.first).clamp_min(0) / self.base.lengths
        return float(share.sum() * live.sum())

    def values(self, numbers: Int[Tensor, " edge"]) -> Float[Tensor, "edge example"]:
        if self.base.reason:
            masks = torch.zeros(len(numbers), len(self.cut.wired.graph), dtype=torch.bool)
            masks[torch.arange(len(numbers)), numbers] = True
            return with_cut(self.cut, masks)
        graph, found = self.cut.wired.graph, torch.zeros(len(numbers), len(self.cut.pairs))
        for at, example in self.batches(graph.reader_of[numbers]):
            found[at, example] = self.replayed(graph.reader_of[numbers[at]], example, graph.writer_of[numbers[at]])
        return found

    def batches(self, readers: Int[Tensor, " edge"]) -> Iterator[tuple[Tensor, Tensor]]:
        """(place in `readers`, example) of rows that have a reader's site and about `budget` tokens together."""
        graph, examples = self.cut.wired.graph, len(self.cut.pairs)
        site_of = [graph.readers[number].site.whole for number in readers.tolist()]
        each = max(1, self.budget // max(1, int((self.cut.pairs.ends - self.first).sum())))
        for site in dict.fromkeys(site_of):
            own = torch.tensor([place for place, other in enumerate(site_of) if other == site])
            for some in own.split(each):
                yield some.repeat_interleave(examples), torch.arange(examples).repeat(len(some))

    def replayed(
        self, reader: Int[Tensor, " row"], example: Int[Tensor, " row"], writer: Int[Tensor, " row"] | None
    ) -> Float[Tensor, " row"]:
        """The metric of rows whose reader goes without one writer's change, or without that of all before it."""
        cut, graph = self.cut, self.cut.wired.graph
        if writer is None:
            before = int(graph.counts[int(reader[0])])
            change = -cut.change[:, :, :before].sum(2)[example]
        else:
            change = -cut.change[example, :, writer]
        site, end = graph.readers[int(reader[0])].site.whole, at_reads(self.base, cut.pairs)
        if site.layer is None:
            hidden = end[example] - change[torch.arange(len(example))[:, None], cut.pairs.reads[example]]
            return score(self.base, hidden, example, cut.pairs, cut.metric, end)
        values, index = self._read(site, reader, self._stream(site)[example] - change)
        rows = Rows(example, torch.full_like(example, site.layer), self.first[example], cut.pairs.ends[example])
        everyone = torch.arange(len(example))
        table = Table(site, (values,), everyone, index, everyone, rows.start, rows.end)
        hidden, _ = Replay(self.base, rows, Edits([table]), read=cut.pairs.reads[example]).run()
        return score(self.base, hidden, example, cut.pairs, cut.metric, end)

    def _stream(self, site: Site) -> Float[Tensor, "example pos d_model"]:
        """What is read at a site in the base run."""
        graph, layer = self.cut.wired.graph, site.layer
        assert layer is not None
        if site.kind != "mlp_in" or graph.parallel or not graph.n_heads:
            return self.base.resid[layer]
        return self.base.resid[layer + 1] - self.cut.base.sites[Site("mlp_out", layer)]

    def _read(self, site: Site, reader: Int[Tensor, " row"], stream: Tensor) -> tuple[Tensor, Int[Tensor, " row"]]:
        """What readers at a site make of a stream, as the whole site's tensor, and their index there."""
        wired, layer = self.cut.wired, site.layer
        assert layer is not None
        with torch.no_grad():
            seen = wired.normed(layer, site.kind == "mlp_in", stream)
            if site.kind == "mlp_in":
                return seen, torch.full_like(reader, -1)
            weights, bias = wired.projections[layer, site.kind]
            index = torch.tensor([wired.graph.readers[number].site.index for number in reader.tolist()])
            made = torch.einsum("rpd,rkd->rpk", seen, weights[index])
            made = made if bias is None else made + bias[index][:, None]
            whole = made.new_zeros(*made.shape[:2], len(weights), made.shape[-1])
            whole[torch.arange(len(index)), :, index] = made
            return whole, index

    def check(self, numbers: Int[Tensor, " edge"], values: Tensor, seed: int) -> None:
        """Raise SelfCheckError when random edges differ from ordinary runs."""
        some = torch.randperm(len(numbers), generator=generator_for("check edges", seed))[:CHECKED]
        masks = torch.zeros(len(some), len(self.cut.wired.graph), dtype=torch.bool)
        masks[torch.arange(len(some)), numbers[some]] = True
        worst = float((with_cut(self.cut, masks) - values[some]).abs().max())
        if worst > allowance(self.base, self.cut.pairs, values):
            names = ", ".join(str(self.cut.wired.graph.edges[int(numbers[one])]) for one in some)
            raise SelfCheckError(
                f"replayed and ordinary runs differ by {worst:.6g} with one of {names} cut; please report this model"
            )


def sample(count: int, size: int, seed: int, *purpose: object) -> Int[Tensor, " drawn"]:
    """Numbers below `count`, drawn without replacement, in order. Raises InputError for a negative size."""
    if size < 0:
        raise InputError(f"cannot draw {size}")
    return torch.randperm(count, generator=generator_for("sample of edges", seed, *purpose))[:size].sort().values
