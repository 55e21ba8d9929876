"""Graph: which part writes what another one reads, as topology alone.

A network with a residual stream is a graph (Elhage et al. 2021). A *writer* adds to the stream: the embeddings, a head,
an MLP. A *reader* takes its input from it: the queries, keys or values of a head, an MLP, the logits. An edge goes from
every writer to every reader that comes after it. Where several query heads share a key-value head, its keys and values
are one reader each, and not one per query head, because there is only one of each in the network.

Scores are kept apart, in `Scores`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vesalius.errors import InputError, UnknownNameError
from vesalius.model import Model
from vesalius.parts import Edge, Unit
from vesalius.site import Site

ATTENTION = ("q", "k", "v")
LOGITS = Unit(Site("logits"))


@dataclass(frozen=True)
class Graph:
    """Writers and readers of one architecture, in forward order, and the edges between them.

    Edges are numbered reader by reader, and for one reader writer by writer. `len(graph)` counts them.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    positions: bool
    """Position embeddings are a writer of their own."""
    mlps: bool
    parallel: bool
    """A layer's MLP reads what its attention reads, so that the layer's heads do not come before it."""

    @cached_property
    def writers(self) -> tuple[Unit, ...]:
        found = [Unit(Site("embed")), *([Unit(Site("pos_embed"))] if self.positions else [])]
        for layer in range(self.n_layers):
            found += [Unit(Site("z", layer, head)) for head in range(self.n_heads)]
            found += [Unit(Site("mlp_out", layer))] if self.mlps else []
        return tuple(found)

    @cached_property
    def readers(self) -> tuple[Unit, ...]:
        found: list[Unit] = []
        for layer in range(self.n_layers):
            found += [Unit(site) for site in self._attention_readers(layer)]
            found += [Unit(Site("mlp_in", layer))] if self.mlps else []
        return (*found, LOGITS)

    def _attention_readers(self, layer: int) -> list[Site]:
        counts = {"q": self.n_heads, "k": self.n_kv_heads, "v": self.n_kv_heads}
        return [Site(kind, layer, head) for kind in ATTENTION for head in range(counts[kind] if self.n_heads else 0)]

    @property
    def outside(self) -> int:
        """Writers outside the layers."""
        return 2 if self.positions else 1

    @property
    def groups(self) -> list[range]:
        """Writers that a pass makes together: those outside the layers, each layer's heads, each MLP."""
        found, at = [range(self.outside)], self.outside
        for _ in range(self.n_layers):
            for count in (self.n_heads, int(self.mlps)):
                found += [range(at, at + count)] if count else []
                at += count
        return found

    def before(self, reader: Unit) -> int:
        """How many writers come before a reader: the first ones of `writers`."""
        layer, per_layer = reader.site.layer, self.n_heads + self.mlps
        if layer is None:
            return len(self.writers)
        own = self.n_heads if reader.site.kind == "mlp_in" and not self.parallel else 0
        return self.outside + layer * per_layer + own

    @cached_property
    def counts(self) -> Int[Tensor, " reader"]:
        """Edges into each reader."""
        return torch.tensor([self.before(reader) for reader in self.readers])

    @cached_property
    def starts(self) -> Int[Tensor, " reader"]:
        """Number of each reader's first edge."""
        return self.counts.cumsum(0) - self.counts

    def __len__(self) -> int:
        return int(self.counts.sum())

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge, in the order of their numbers."""
        return tuple(Edge(writer, reader) for reader in self.readers for writer in self.writers[: self.before(reader)])

    @cached_property
    def reader_of(self) -> Int[Tensor, " edge"]:
        return torch.repeat_interleave(torch.arange(len(self.readers)), self.counts)

    @cached_property
    def writer_of(self) -> Int[Tensor, " edge"]:
        return torch.arange(len(self)) - self.starts[self.reader_of]

    def number(self, edge: Edge) -> int:
        """An edge's number. Raises UnknownNameError, InputError for a writer that does not come before its reader."""
        for part, known, what in (
            (edge.source, self._writer_numbers, "writer"),
            (edge.target, self._reader_numbers, "reader"),
        ):
            if part not in known:
                raise UnknownNameError(what, str(part), map(str, known), "An edge goes from a writer to a reader.")
        reader, writer = self._reader_numbers[edge.target], self._writer_numbers[edge.source]
        if writer >= int(self.counts[reader]):
            raise InputError(f"there is no edge {edge}: {edge.source} does not come before {edge.target}")
        return int(self.starts[reader]) + writer

    @cached_property
    def _writer_numbers(self) -> dict[object, int]:
        return {writer: number for number, writer in enumerate(self.writers)}

    @cached_property
    def _reader_numbers(self) -> dict[object, int]:
        return {reader: number for number, reader in enumerate(self.readers)}

    def mask(self, edges: Iterable[Edge]) -> Bool[Tensor, " edge"]:
        """True for these edges."""
        found = torch.zeros(len(self), dtype=torch.bool)
        found[[self.number(edge) for edge in edges]] = True
        return found

    def node_of(self, reader: int) -> tuple[int, ...]:
        """Writers that a reader is a part of: a head for its queries, several for a key-value head; () for logits."""
        site = self.readers[reader].site
        if site.layer is None:
            return ()
        first = self.outside + site.layer * (self.n_heads + self.mlps)
        if site.index is None:
            return (first + self.n_heads,)
        if site.kind == "q":
            return (first + site.index,)
        group = self.n_heads // self.n_kv_heads
        return tuple(range(first + site.index * group, first + (site.index + 1) * group))

    @cached_property
    def readers_of(self) -> tuple[tuple[int, ...], ...]:
        """Readers that are a part of each writer; () for embeddings."""
        found: list[list[int]] = [[] for _ in self.writers]
        for reader in range(len(self.readers)):
            for writer in self.node_of(reader):
                found[writer].append(reader)
        return tuple(map(tuple, found))

    def connected(self, mask: Bool[Tensor, " edge"], *, from_inputs: bool = True) -> Bool[Tensor, " edge"]:
        """The edges of a mask that lie on a path to the logits, and from the embeddings.

        from_inputs: False keeps edges from writers that nothing in the mask leads to; under zero and mean ablation
        such a writer still has something to say, its biases.
        """
        kept = mask & self._reaching_the_logits(mask)
        return kept & self._reached(kept) if from_inputs else kept

    def _reaching_the_logits(self, mask: Tensor) -> Bool[Tensor, " edge"]:
        alive = torch.zeros(len(self.writers), dtype=torch.bool)
        found = torch.zeros_like(mask)
        for reader in reversed(range(len(self.readers))):
            node = list(self.node_of(reader))
            if node and not bool(alive[node].any()):
                continue
            own = slice(int(self.starts[reader]), int(self.starts[reader] + self.counts[reader]))
            found[own] = mask[own]
            alive[: int(self.counts[reader])] |= mask[own]
        return found

    def _reached(self, mask: Tensor) -> Bool[Tensor, " edge"]:
        alive = torch.zeros(len(self.writers), dtype=torch.bool)
        alive[: self.outside] = True
        found = torch.zeros_like(mask)
        for reader in range(len(self.readers)):
            own = slice(int(self.starts[reader]), int(self.starts[reader] + self.counts[reader]))
            found[own] = mask[own] & alive[: int(self.counts[reader])]
            alive[list(self.node_of(reader))] |= bool(found[own].any())
        return found

    @property
    def ungrouped(self) -> int:
        """Edges as counted by tools that give every query head keys and values of its own (Hanna et al. 2024)."""
        return sum(self._copies(reader) * self.before(reader) for reader in self.readers)

    def _copies(self, reader: Unit) -> int:
        return self.n_heads // self.n_kv_heads if reader.site.kind in ("k", "v") else 1

    def __repr__(self) -> str:
        return f"Graph({len(self.writers)} writers, {len(self.readers)} readers, {len(self):,} edges)"


def graph_of(model: Model, *, parallel: bool) -> Graph:
    """The graph of a model; parallel: see `Graph`, as `wiring` finds it.

    Raises InputError for a model whose parts do not add to one residual stream, or whose queries, keys and values are
    not read apart.
    """
    adapter, layout = model.architecture
    if adapter.stacks or not adapter.direct:
        raise InputError(
            f"{model.name} has no graph of edges: the logits of the {adapter.family} family are not made of one stream "
            "that its parts add to. Sweeps of heads and MLPs work: vs.sweep, vs.circuits.component_effects"
        )
    missing = [kind for kind in ATTENTION if kind not in adapter.sites]
    if missing and len(missing) < len(ATTENTION):
        raise InputError(f"{model.name} has no graph of edges: its {adapter.family} adapter has no {missing[0]} sites")
    heads = 0 if missing else layout.n_heads
    return Graph(
        layout.n_layers,
        heads,
        layout.n_kv_heads if heads else 0,
        "pos_embed" in adapter.outside,
        "mlp_out" in adapter.sites,
        parallel,
    )
