"""Gradients of a metric where readers take their input from the residual stream, and their products with changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vesalius.activations import Run
from vesalius.adapters.base import Norm, frozen_scale, gain
from vesalius.circuits.cutting import Ablation, Seen
from vesalius.circuits.graph import ATTENTION, Graph
from vesalius.circuits.wired import Wiring
from vesalius.inputs import Tokens
from vesalius.intervention import Intervention, Replace
from vesalius.site import Site


@dataclass(frozen=True, eq=False)
class Gradients:
    """Of the metric of each example with respect to what every reader takes from the stream.

    layers: per layer those of its attention readers [reader, example, pos, d_model] and of its MLP; logits: of the last
    stream.
    """

    attention: tuple[Tensor, ...]
    mlp: tuple[Tensor, ...]
    logits: Float[Tensor, "1 example pos d_model"]

    def by_layer(self, graph: Graph) -> Iterator[tuple[int, Float[Tensor, "reader example pos d_model"]]]:
        """Readers in the graph's order, in groups with as many writers before them: (writers, gradients)."""
        at = 0
        for layer in range(graph.n_layers):
            for group in (self.attention, self.mlp):
                if group:
                    yield int(graph.counts[at]), group[layer]
                    at += len(group[layer])
        yield int(graph.counts[at]), self.logits

    def plus(self, other: Gradients | None) -> Gradients:
        """The sum."""
        if other is None:
            return self
        add = lambda one, two: tuple(a + b for a, b in zip(one, two, strict=True))  # noqa: E731
        return Gradients(add(self.attention, other.attention), add(self.mlp, other.mlp), self.logits + other.logits)

    def times(self, factor: float) -> Gradients:
        scaled = lambda group: tuple(one * factor for one in group)  # noqa: E731
        return Gradients(scaled(self.attention), scaled(self.mlp), self.logits * factor)


@dataclass(frozen=True, eq=False)
class Differentiated:
    """A run that gradients can be taken of. value: the metric [example]."""

    cut: Ablation
    run: Run
    logits: Float[Tensor, "example vocab"]
    value: Float[Tensor, " example"]
    norms_held: bool = False
    """Norms' scales are constants."""

    @property
    def seen(self) -> Seen:
        """The run without graph."""
        sites = {site: self.run[site].detach() for site in self.cut.wired.captured}
        return Seen(self.cut.wired, sites, self.logits.detach())

    @property
    def read(self) -> list[Site]:
        """Sites by which readers take their input."""
        return reading(self.cut.wired)

    def gradients(self, *, keep: bool = False, without: Sequence[str] = ()) -> Gradients:
        """Of the sum over examples, which do not touch each other. keep: the graph is needed again. without: kinds of
        readers that get nothing."""
        last = self.cut.wired.last
        asked = [*self.read, last]
        found = torch.autograd.grad(
            self.value.sum(), [self.run[site] for site in asked], allow_unused=True, retain_graph=keep
        )
        by_site = {
            site: torch.zeros_like(self.run[site]) if one is None or site.kind in without else one
            for site, one in zip(asked, found, strict=True)
        }
        return self.at_the_stream(by_site)

    def at_the_stream(self, by_site: Mapping[Site, Tensor]) -> Gradients:
        """From gradients at queries, keys, values and MLP inputs to those at what each reads of the stream."""
        wired = self.cut.wired
        layers = range(wired.graph.n_layers)
        attention = [self._attention(layer, by_site) for layer in layers] if wired.graph.n_heads else []
        mlp = [self._mlp(layer, by_site) for layer in layers] if wired.graph.mlps else []
        return Gradients(tuple(attention), tuple(mlp), by_site[wired.last][None])

    def _attention(self, layer: int, by_site: Mapping[Site, Tensor]) -> Tensor:
        pulled = []
        for kind in ATTENTION:
            weights, _ = self.cut.wired.projections[layer, kind]
            pulled.append(torch.einsum("ephk,hkd->hepd", by_site[Site(kind, layer)], weights))
        return self._through_norm(layer, False, torch.cat(pulled))

    def _mlp(self, layer: int, by_site: Mapping[Site, Tensor]) -> Tensor:
        return self._through_norm(layer, True, by_site[Site("mlp_in", layer)][None])

    def _through_norm(self, layer: int, mlp: bool, gradient: Tensor) -> Tensor:
        wired = self.cut.wired
        if (wired.mlp if mlp else wired.attention)[layer] is None:
            return gradient
        with torch.enable_grad():
            stream = stream_of(wired, self.run, layer, mlp).detach().clone().requires_grad_()
            norm = (wired.mlp if mlp else wired.attention)[layer]
            assert norm is not None
            seen = held(wired.model.architecture[0].norm, norm, stream) if self.norms_held else norm(stream)
            return torch.autograd.grad(seen, stream, gradient, is_grads_batched=True)[0]


def held(kind: Norm, norm: nn.Module, stream: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
    """What a norm makes of a stream, less its bias, with the scale as a constant."""
    centred = stream - stream.mean(-1, keepdim=True) if kind == "layer" else stream
    return centred * frozen_scale(kind, norm, stream).detach() * gain(kind, norm).to(stream)


def reading(wired: Wiring) -> list[Site]:
    """Sites by which readers take their input, the logits' apart."""
    kinds = [*(ATTENTION if wired.graph.n_heads else ()), *(["mlp_in"] if wired.graph.mlps else [])]
    return [Site(kind, layer) for layer in range(wired.graph.n_layers) for kind in kinds]


def stream_of(wired: Wiring, run: Run, layer: int, mlp: bool) -> Float[Tensor, "example pos d_model"]:
    """What a layer's attention or MLP reads, before its norm."""
    if not mlp or wired.graph.parallel or not wired.graph.n_heads:
        return run[Site("resid_pre", layer)]
    after = Site("resid_pre", layer + 1) if layer + 1 < wired.graph.n_layers else wired.last
    return run[after] - run[Site("mlp_out", layer)]


def differentiated(
    cut: Ablation, tokens: Tokens, edits: Sequence[Intervention] = (), also: Sequence[Site] = ()
) -> Differentiated:
    """A run with everything that gradients of edges are made of; also: more sites to capture."""
    wired = cut.wired
    streams = [Site("resid_pre", layer) for layer in range(wired.graph.n_layers)]
    sites = dict.fromkeys([*wired.captured, *streams, *reading(wired), wired.last, *also])
    run = wired.model.run(
        tokens, capture=list(sites), interventions=[*edits, *_own_inputs(wired)], grad=True, last_logits=True
    )
    _ = cut.base if cut.metric.needs.base else None
    with torch.enable_grad():
        logits = cut.logits(run[wired.last])
        return Differentiated(cut, run, logits, cut.score(logits)[0])


def _own_inputs(wired: Wiring) -> list[Replace]:
    """Give MLPs a copy of what they read where others read the same tensor, so that gradients are told apart."""
    shared = wired.graph.parallel or any(norm is None for norm in wired.mlp)
    sites = [Site("mlp_in", layer) for layer in range(wired.graph.n_layers if shared and wired.graph.mlps else 0)]
    return [Replace(site, site, torch.clone, "copy") for site in sites]


def products(
    graph: Graph, change: Float[Tensor, "example pos writer d_model"], gradients: Gradients, positions: bool
) -> Float[Tensor, "edge *pos example"]:
    """Change times gradient of every edge. positions: by the position that the reader reads, else summed over them."""
    found, (count, width) = [], gradients.logits.shape[1:3]
    flat = change.expand(count, width, -1, -1).flatten(0, 1)
    for writers, gradient in gradients.by_layer(graph):
        pulled = gradient.movedim(0, 2).flatten(0, 1)
        # The smaller factor first, or the products take several times as long.
        edges = torch.bmm(pulled, flat[:, :writers].transpose(1, 2)).flatten(1).unflatten(0, (count, width))
        found.append((edges if positions else edges.sum(1)).movedim(0, -1))
    return torch.cat([one.movedim(1, 0) for one in found]) if positions else torch.cat(found)
