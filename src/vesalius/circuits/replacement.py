"""The local replacement model of one prompt: MLPs taken apart by transcoders, all else linear (Ameisen et al. 2025).

Attention patterns and the scales of norms are held at what they are on the prompt. What an MLP adds is the latents of
its transcoder, times their rows, and an error that makes the sum exact. Then every latent that is active, and every
logit, is a sum of what latents of earlier layers, errors and embeddings say to it along the residual stream and through
the heads' values, and of constants. `Replacement.into` gives that sum, exactly, by going back from what is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vesalius.adapters import submodule
from vesalius.adapters.base import frozen_scale, gain, parameter
from vesalius.circuits.active import LayerLatents, active_latents, coders_of, outer_biases
from vesalius.circuits.wired import Wiring
from vesalius.errors import InputError
from vesalius.inputs import Tokens
from vesalius.site import Site


@dataclass(frozen=True, eq=False)
class Target:
    """Rows that read the stream: where "mlp_in" or "resid_mid" of a layer, or "logits", after the last layer."""

    layer: int
    where: str
    position: Int[Tensor, " target"]
    reads: Float[Tensor, "target d"]


@dataclass(frozen=True, eq=False)
class Into:
    """What sources say to some targets: each activation is the sum of a row and of its constant.

    latents: per group of latents [target, active]; errors: [target, layer, pos]; tokens: [target, pos]; constant:
    [target].
    """

    latents: tuple[Tensor, ...]
    errors: Float[Tensor, "target layer pos"]
    tokens: Float[Tensor, "target pos"]
    constant: Float[Tensor, " target"]


@dataclass(frozen=True, eq=False)
class Replacement:
    """A wired model, one prompt, its run, and the active latents. See the module."""

    wired: Wiring
    tokens: Tokens
    run: Mapping[Site, Tensor]
    latents: tuple[LayerLatents, ...]
    biases: tuple[Float[Tensor, " d"], ...]
    """Per layer what transcoders add to an MLP's output whatever they read."""

    @property
    def n_positions(self) -> int:
        return int(self.tokens.ids.shape[1])

    @cached_property
    def errors(self) -> Float[Tensor, "layer pos d"]:
        """What transcoders leave unexplained of each MLP's output; of an MLP without one all of it."""
        found = []
        for layer in range(self.wired.graph.n_layers):
            site = Site("mlp_out", layer)
            left = self.run[site][0] - self.biases[layer]
            if layer in self.skips:
                group, skip = self.skips[layer]
                left = left - self.read(group.read) @ skip
            for group in self.latents:
                if site in group.writes:
                    left = left.index_add(0, group.position, -group.value[:, None] * group.writes[site])
            found.append(left)
        return torch.stack(found)

    @cached_property
    def skips(self) -> Mapping[int, tuple[LayerLatents, Tensor]]:
        """Per layer its transcoder and that one's linear skip, where there is one."""
        return {group.layer: (group, group.skip) for group in self.latents if group.skip is not None}

    def read(self, site: Site) -> Float[Tensor, "pos d"]:
        """What a transcoder reads."""
        assert site.layer is not None
        return self.stream(site.layer) if site.kind == "resid_mid" else self.run[site][0]

    def stream(self, layer: int) -> Float[Tensor, "pos d"]:
        """The residual stream that a layer's MLP reads."""
        before, graph = self.run[Site("resid_pre", layer)][0], self.wired.graph
        return before if graph.parallel or not graph.n_heads else before + self.run[Site("attn_out", layer)][0]

    def into(self, targets: Sequence[Target]) -> Into:
        """What every source says to every target, going back through the layers."""
        # The last to read come first, so that those on their way are always the first rows.
        order = sorted(range(len(targets)), key=lambda n: -self._layer(targets[n]))
        starts = torch.tensor([0, *(len(targets[n].position) for n in order)]).cumsum(0).tolist()
        rows = {n: range(*ends) for n, ends in zip(order, pairwise(starts), strict=True)}
        back = _Back(self, starts[-1])
        for layer in reversed(range(self.wired.graph.n_layers + 1)):
            own = [n for n in order if self._layer(targets[n]) == layer]
            if layer < self.wired.graph.n_layers:
                back.out_of_mlp(layer)
            for n in own:
                back.start(rows[n], targets[n])
            if layer < self.wired.graph.n_layers:
                back.through_attention(layer, sum(len(rows[n]) for n in own))
        place = torch.tensor([row for n in range(len(targets)) for row in rows[n]], dtype=torch.long)
        return back.finished(place)

    def _layer(self, target: Target) -> int:
        return self.wired.graph.n_layers if target.where == "logits" else target.layer


class _Back:
    """Gradients of targets with respect to the stream, from the last layer to the first."""

    def __init__(self, of: Replacement, count: int) -> None:
        self._of, like = of, of.errors
        self._gradient = like.new_zeros(0, of.n_positions, like.shape[-1])
        """Of the targets that are on their way."""
        self._latents = [like.new_zeros(count, len(group.value)) for group in of.latents]
        self._errors = like.new_zeros(count, of.wired.graph.n_layers, of.n_positions)
        self._constant = like.new_zeros(count)

    def _add(self, constant: Float[Tensor, " target"]) -> None:
        self._constant[: len(constant)] += constant

    def start(self, rows: range, target: Target) -> None:
        """Targets, the next rows, begin with what they read, through the norm before it."""
        wired = self._of.wired
        if target.where == "logits":
            norm: nn.Module | None = submodule(wired.model.module, wired.model.architecture[0].final_norm)
            stream = self._of.run[wired.last][0]
        else:
            norm = wired.mlp[target.layer] if target.where == "mlp_in" else None
            stream = self._of.stream(target.layer)
        pulled, constant = self._through(norm, stream[target.position], target.reads)
        begun = self._gradient.new_zeros(len(rows), *self._gradient.shape[1:])
        begun[torch.arange(len(rows)), target.position] = pulled
        self._gradient = torch.cat([self._gradient, begun])
        self._constant[rows.start : rows.stop] += constant

    def out_of_mlp(self, layer: int) -> None:
        """What latents, the error and constants that a layer's MLP adds say; and back through a skip."""
        site, gradient = Site("mlp_out", layer), self._gradient
        for number, group in enumerate(self._of.latents):
            if site in group.writes:
                said = torch.einsum("tad,ad->ta", gradient[:, group.position], group.writes[site])
                self._latents[number][: len(said)] += said * group.value
        self._errors[: len(gradient), layer] = torch.einsum("tpd,pd->tp", gradient, self._of.errors[layer])
        self._add((gradient @ self._of.biases[layer]).sum(1))
        if layer in self._of.skips:
            group, skip = self._of.skips[layer]
            norm = self._of.wired.mlp[layer] if group.read.kind == "mlp_in" else None
            self._skip, constant = self._through(norm, self._of.stream(layer), gradient @ skip.T)
            self._add(constant.sum(1))
        else:
            self._skip = gradient.new_zeros(0, *gradient.shape[1:])

    def through_attention(self, layer: int, own: int) -> None:
        """Back through the heads' values. own: how many targets, the last ones, read this layer's MLP, which in
        parallel blocks do not see its heads."""
        graph, past = self._of.wired.graph, self._gradient.clone()
        past[: len(self._skip)] += self._skip
        if graph.n_heads:
            seen = self._gradient[: len(past) - own] if graph.parallel else past
            past[: len(seen)] += self._attended(layer, seen)
        self._gradient = past

    def _attended(self, layer: int, gradient: Float[Tensor, "target pos d"]) -> Float[Tensor, "target pos d"]:
        wired, run = self._of.wired, self._of.run
        adapter, layout = wired.model.architecture
        matrix, bias = wired.outputs[layer]
        matrix = matrix.to(gradient) * layout.residual_scale
        if adapter.attn_norm:
            total = torch.einsum("phk,hkd->pd", run[Site("z", layer)][0], matrix)
            total = total if bias is None else total + bias.to(total) * layout.residual_scale
            norm = submodule(wired.model.layer(layer), adapter.attn_norm)
            gradient, constant = self._through(norm, total, gradient)
            self._add(constant.sum(1))
        if bias is not None:
            self._add((gradient @ bias.to(gradient)).sum(1) * layout.residual_scale)
        own = torch.einsum("tpd,hkd->tphk", gradient, matrix)
        seen = torch.einsum("hqs,tqhk->tshk", run[Site("pattern", layer)][0], own)
        grouped = seen.unflatten(2, (wired.graph.n_kv_heads, -1)).sum(3)
        weights, value_bias = wired.projections[layer, "v"]
        if value_bias is not None:
            self._add(torch.einsum("tshk,hk->t", grouped, value_bias.to(grouped)))
        read = torch.einsum("tshk,hkd->tsd", grouped, weights.to(grouped))
        pulled, constant = self._through(wired.attention[layer], run[Site("resid_pre", layer)][0], read)
        self._add(constant.sum(1))
        return pulled

    def _through(
        self, norm: nn.Module | None, stream: Float[Tensor, "pos d"], gradient: Float[Tensor, "*target pos d"]
    ) -> tuple[Tensor, Tensor]:
        """Back through a norm whose scale is held at this stream, and what its bias says [*target, pos]."""
        if norm is None or isinstance(norm, nn.Identity):
            return gradient, gradient.new_zeros(gradient.shape[:-1])
        kind, bias = self._of.wired.model.architecture[0].norm, parameter(norm, "bias")
        constant = gradient.new_zeros(gradient.shape[:-1]) if bias is None else gradient @ bias.to(gradient)
        pulled = gradient * gain(kind, norm).to(gradient) * frozen_scale(kind, norm, stream)
        return (pulled - pulled.mean(-1, keepdim=True) if kind == "layer" else pulled), constant

    def finished(self, order: Int[Tensor, " target"]) -> Into:
        """With what the embeddings say; the targets in the order in which they were given."""
        run = self._of.run
        first = run[Site("embed")][0]
        if self._of.wired.graph.positions:
            first = first + run[Site("pos_embed")][0]
        tokens = torch.einsum("tpd,pd->tp", self._gradient, first)
        latents = tuple(said[order] for said in self._latents)
        return Into(latents, self._errors[order], tokens[order], self._constant[order])


def replaced(wired: Wiring, tokens: Tokens, transcoders: object) -> Replacement:
    """The local replacement model of one prompt.

    transcoders: dictionaries that read `mlp_in` (or the stream before the MLP) of a layer and write `mlp_out` of that
    layer, or of it and later ones; or a cross-layer transcoder. Layers may be missing: their MLPs are errors. Raises
    InputError for several prompts, for other dictionaries and for two that read one layer.
    """
    graph = wired.graph
    if tokens.ids.shape[0] != 1 or not bool(tokens.real.all()):
        raise InputError(f"an attribution graph is of one prompt; got {tokens.ids.shape[0]}")
    if not graph.mlps:
        raise InputError(f"{wired.model.name} has no MLPs that transcoders could take apart")
    layers = range(graph.n_layers)
    kinds = ["mlp_in", "mlp_out", *(["attn_out", "z", "pattern"] if graph.n_heads else [])]
    sites = [Site(kind, layer) for layer in layers for kind in ("resid_pre", *kinds)]
    outside = [Site("embed"), *([Site("pos_embed")] if graph.positions else []), wired.last]
    with torch.no_grad():
        run = wired.model.run(tokens, capture=[*sites, *outside])
        asked = dict.fromkeys([*sites, *outside])
        wide = {site: run[site].to(torch.promote_types(run[site].dtype, torch.float32)) for site in asked}
    coders = coders_of(transcoders, graph.n_layers)
    empty = Replacement(wired, tokens, wide, (), ())
    found = [active_latents(coder, owner, empty.read(coder.in_sites[0])) for coder, owner in coders]
    biases = outer_biases(transcoders, graph.n_layers, wide[Site("embed")][0, 0])
    for group in found:
        for site, bias in group.bias.items():
            assert site.layer is not None
            biases[site.layer] = biases[site.layer] + bias
    return Replacement(wired, tokens, wide, tuple(sorted(found, key=lambda group: group.layer)), tuple(biases))
