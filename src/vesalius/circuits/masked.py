"""Run a model with any set of edges cut, exactly.

Every reader takes the residual stream of the run less the changes of its cut edges: for each of them what its writer
says in this very run minus what the cut edge carries (see `circuits.cutting`). Writers further up are recomputed from
what they read, so that cutting all edges under resample ablation gives the other prompts' run, and cutting none the
run itself. The reader's own norm and weights are the model's.

Cuts may be fractions, and gradients reach them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vesalius.adapters import submodule
from vesalius.adapters.base import join_heads, split_heads
from vesalius.circuits.cutting import TOKENS_PER_BATCH, Ablation
from vesalius.circuits.graph import ATTENTION
from vesalius.errors import InputError
from vesalius.inputs import Tokens
from vesalius.jobs import Event, Sink, silent
from vesalius.model.hooks import Tap, tapped
from vesalius.model.weights import dtype_of, is_plain
from vesalius.site import Site

Cuts = Float[Tensor, "variant edge *pos example"]


def with_cut(
    cut: Ablation,
    cuts: Bool[Tensor, "variant edge"] | Sequence[Bool[Tensor, " edge"]],
    *,
    budget: int = 4 * TOKENS_PER_BATCH,
    sink: Sink = silent,
    task: str = "circuits",
) -> Float[Tensor, "variant example"]:
    """The metric of runs in which these edges are cut, one run for each variant, on the CPU.

    budget: tokens per batch. Raises InputError for masks of another graph.
    """
    found, done = [], 0
    masks = torch.stack(list(cuts)) if not isinstance(cuts, Tensor) else cuts
    _check(cut, masks)
    sink(Event("start", task, 0, len(masks)))
    for some in masks.split(max(1, budget // cut.pairs.clean.numel())):
        parts = [masked(part, some, grad=False).detach().cpu() for _, part in cut.batches(budget)]
        found.append(torch.cat(parts, 1))
        done += len(some)
        sink(Event("advance", task, done, len(masks)))
    sink(Event("end", task, done, len(masks)))
    width = len(cut.pairs)
    return torch.cat(found) if found else torch.zeros(0, width)


def with_only(
    cut: Ablation, kept: Bool[Tensor, "variant edge"] | Sequence[Bool[Tensor, " edge"]], *, sink: Sink = silent
) -> Float[Tensor, "variant example"]:
    """The metric of circuits: every edge that is not kept is cut."""
    return with_cut(cut, [~one for one in kept], sink=sink)


def masked(cut: Ablation, cuts: Tensor, *, grad: bool = False) -> Float[Tensor, "variant example"]:
    """The metric of one batch. cuts: [variant, edge], 0 kept and 1 cut, or [variant, edge, pos, example].

    grad: keep the graph, so that gradients reach `cuts`.
    """
    return cut.score(cut.logits(masked_stream(cut, cuts, grad=grad)))


def masked_stream(cut: Ablation, cuts: Tensor, *, grad: bool = False) -> Float[Tensor, "row pos d_model"]:
    """What the logits are read from: the last stream less the changes of the cut edges into them."""
    _check(cut, cuts)
    count, model = len(cuts), cut.wired.model
    ids = cut.tokens.ids.repeat(count, 1)
    real = None if bool(cut.tokens.real.all()) else cut.tokens.real.repeat(count, 1)
    arguments, call, _ = model.called_with(Tokens(ids, real))
    # Before the run that is tapped, which is no place for another one.
    _ = cut.source if cut.by_difference else cut.cut
    run = _Run(cut, cuts, len(ids))
    with torch.set_grad_enabled(grad), tapped(run.taps()):
        model.module(*arguments, **call, **({"logits_to_keep": 1} if model.takes("logits_to_keep") else {}))
        return run.read(run.stream, len(cut.wired.graph.readers) - 1, 1)[..., 0, :]


def _check(cut: Ablation, cuts: Tensor) -> None:
    edges = len(cut.wired.graph)
    if cuts.ndim not in (2, 4) or cuts.shape[1] != edges:
        raise InputError(f"cuts are [variant, edge] with the {edges:,} edges of this graph; got {tuple(cuts.shape)}")


class _Changes:
    """What every writer so far says in this run, minus what its cut edges carry: [row, pos, writer, d_model]."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._pieces: list[Tensor] = []
        self._whole: Tensor | None = None
        self.filled = 0
        self.total: Tensor | None = None
        """Their sum [row, pos, d_model]."""

    def add(self, change: Tensor) -> Tensor:
        """Their sum [row, pos, d_model]. Changes of a run with gradients are kept apart, because autograd forbids
        writing over what it needs."""
        end = self.filled + change.shape[2]
        if torch.is_grad_enabled():
            self._pieces.append(change)
        else:
            if self._whole is None:
                self._whole = change.new_empty(*change.shape[:2], self._room, change.shape[-1])
            self._whole[:, :, self.filled : end] = change
        self.filled, summed = end, change.sum(2)
        self.total = summed if self.total is None else self.total + summed
        return summed

    def first(self, count: int) -> Tensor:
        found = torch.cat(self._pieces, 2) if self._whole is None else self._whole
        return found[:, :, :count]


class _Run:
    """One run: what its writers have said so far, and what each reader is given of it."""

    def __init__(self, cut: Ablation, cuts: Tensor, rows: int) -> None:
        self._cut, self._wired, self._graph = cut, cut.wired, cut.wired.graph
        self._cuts = cuts.to(cut.wired.model.device, dtype_of(cut.wired.model.module))
        self._changes = _Changes(len(self._graph.writers))
        self._rows = rows
        self._given: dict[str, Tensor] = {}
        self._written: Tensor | None = None
        self.stream: Tensor
        """The residual stream where the run has got to."""

    def taps(self) -> list[Tap]:
        outside = self._wired.captured[: self._graph.outside]
        found = [self._look(site, partial(self._outside, site)) for site in outside]
        for layer in range(self._graph.n_layers):
            found.append(Tap(self._wired.model.layer(layer), "in", self._follow))
            found += self._attention_taps(layer) if self._graph.n_heads else []
            if self._graph.mlps:
                found.append(self._look(Site("mlp_in", layer), partial(self._mlp, layer)))
                out = Site("mlp_out", layer)
                found.append(self._look(out, partial(self._writer, out)))
        return [*found, self._look(self._wired.last, self._follow)]

    def _attention_taps(self, layer: int) -> list[Tap]:
        adapter, root = self._wired.model.architecture[0], self._wired.model.layer(layer)
        found = []
        for path in dict.fromkeys(adapter.sites[kind].path for kind in ATTENTION):
            module = submodule(root, path)
            # What it would make of the stream itself is not needed.
            found += [Tap(module, "in", _nothing)] if is_plain(module) else []
            found.append(Tap(module, "out", partial(self._project, layer, path)))
        found.append(self._look(Site("z", layer), partial(self._heads, layer)))
        projection = submodule(root, adapter.o_proj)
        if is_plain(projection) and not adapter.attn_norm:
            found += [Tap(projection, "in", _nothing), Tap(projection, "out", self._attended)]
        if not self._graph.parallel:
            found.append(self._look(Site("attn_out", layer), self._onto_stream))
        return found

    def _look(self, site: Site, visit: Callable[[Tensor], Tensor | None]) -> Tap:
        """Show the site's tensor, and put what is returned in its place."""
        adapter, layout = self._wired.model.architecture
        access = (adapter.outside if site.layer is None else adapter.sites)[site.kind]
        root = self._wired.model.module if site.layer is None else self._wired.model.layer(site.layer)

        def on(tensor: Tensor) -> Tensor | None:
            made = visit(split_heads(tensor, access, layout, self._rows))
            return None if made is None else join_heads(tensor, made, access, layout)

        return Tap(submodule(root, access.path), access.side, on)

    def _outside(self, site: Site, made: Tensor) -> None:
        self._writer(site, made.expand(self._rows, *made.shape[1:]))

    def _writer(self, site: Site, made: Float[Tensor, "row pos d_model"]) -> None:
        """What an embedding or an MLP says."""
        if self._cut.by_difference:
            self._changes.add(self._less(made, self._cut.source.sites[site])[:, :, None])
        else:
            self._less_carried(made[:, :, None])

    def _less(self, made: Tensor, other: Tensor) -> Tensor:
        """Rows less what each variant has of every example."""
        return (made.unflatten(0, (len(self._cuts), -1)) - other).flatten(0, 1)

    def _less_carried(self, says: Float[Tensor, "row pos writer d_model"]) -> None:
        first = self._changes.filled
        self._changes.add(self._less(says, self._cut.cut[:, :, first : first + says.shape[2]]))

    def _follow(self, stream: Tensor) -> None:
        self.stream = stream

    def _onto_stream(self, made: Tensor) -> None:
        self.stream = self.stream + made

    def _heads(self, layer: int, z: Tensor) -> None:
        scale = self._wired.model.architecture[1].residual_scale
        if self._cut.by_difference:
            other = self._cut.source.sites
            summed = self._changes.add(self._wired.head_writes(layer, self._less(z, other[Site("z", layer)])))
            self._written = self._less(summed, -other[Site("attn_out", layer)]) / scale
            return
        says, bias = self._wired.head_writes(layer, z), self._wired.outputs[layer][1]
        self._less_carried(says)
        self._written = says.sum(2) / scale
        if bias is not None:
            self._written = self._written + bias

    def _attended(self, _own: Tensor) -> Tensor:
        """The output projection's output, which is known from what the heads write."""
        assert self._written is not None
        return self._written

    def read(self, stream: Tensor, first: int, count: int) -> Float[Tensor, "row pos reader d_model"]:
        """The stream of `count` readers, from the first one's number on."""
        writers, start = int(self._graph.counts[first]), int(self._graph.starts[first])
        own = self._cuts[:, start : start + count * writers].unflatten(1, (count, writers))
        changes = self._changes.first(writers)
        few = _kept_by_any(own) if len(own) == 1 and own.ndim == 3 and not own.requires_grad else None
        if few is not None and 2 * len(few) < writers and writers == self._changes.filled:
            # A small circuit: what it keeps is added to the stream with everything cut.
            assert self._changes.total is not None
            kept = torch.matmul(1 - own[0][:, few], changes.index_select(2, few))
            return kept.add_((stream - self._changes.total)[:, :, None])
        # [variant, example, pos, reader, writer]
        weights = own[:, None, None] if own.ndim == 3 else own.permute(0, 4, 3, 1, 2)
        return stream[:, :, None] - torch.matmul(weights, changes.unflatten(0, (len(own), -1))).flatten(0, 1)

    def _project(self, layer: int, path: str, own: Tensor) -> Tensor:
        """Queries, keys and values of what each of them reads, as the module at a path gives them."""
        adapter, layout = self._wired.model.architecture
        kinds = [kind for kind in ATTENTION if adapter.sites[kind].path == path]
        if kinds[0] not in self._given:
            self._given = self._projected(layer)
        whole = own.new_empty(*self.stream.shape[:2], own.shape[-1])
        for kind in kinds:
            access = replace(adapter.sites[kind], flat=False)
            whole = join_heads(whole, self._given.pop(kind), access, layout)
        return whole.flatten(0, 1) if adapter.sites[kinds[0]].flat else whole

    def _projected(self, layer: int) -> dict[str, Tensor]:
        graph = self._graph
        counts = [graph.n_heads, graph.n_kv_heads, graph.n_kv_heads]
        first = layer * (sum(counts) + graph.mlps)
        seen = self._wired.normed(layer, False, self.read(self.stream, first, sum(counts)))
        found = {}
        for kind, some in zip(ATTENTION, seen.split(counts, 2), strict=True):
            weights, bias = self._wired.projections[layer, kind]
            made = torch.einsum("ephd,hkd->ephk", some, weights)
            found[kind] = made if bias is None else made + bias
        return found

    def _mlp(self, layer: int, _own: Tensor) -> Tensor:
        per_layer = self._graph.n_heads + 2 * self._graph.n_kv_heads + 1
        number = layer * per_layer + per_layer - 1
        return self._wired.normed(layer, True, self.read(self.stream, number, 1)[:, :, 0].contiguous())


def _nothing(given: Tensor) -> Tensor:
    """No positions."""
    return given[:, :0] if given.ndim == 3 else given[:0]


def _kept_by_any(cuts: Float[Tensor, "1 reader writer"]) -> Tensor:
    """Numbers of the writers from which not every edge is cut."""
    return (cuts[0] != 1).any(0).nonzero()[:, 0]
