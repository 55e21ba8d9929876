"""A transformer without norms whose weights are given: what compiled and hand-built networks run in.

Token and position embeddings, heads with biases, MLPs of ReLUs, an unembedding; every part may be left out of a layer.
It enters the package as any network of the user's own does, by an `Adapter`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vesalius.adapters import Access, Adapter
from vesalius.model import Model


@dataclass(frozen=True, eq=False)
class Weights:
    """One layer: y = x @ weight + bias. qkv and mlp_in map from d_model, out and mlp_out back to it."""

    q: tuple[Float[Tensor, "d_model width"], Float[Tensor, " width"]]
    k: tuple[Float[Tensor, "d_model width"], Float[Tensor, " width"]]
    v: tuple[Float[Tensor, "d_model width"], Float[Tensor, " width"]]
    out: tuple[Float[Tensor, "width d_model"], Float[Tensor, " d_model"]]
    mlp_in: tuple[Float[Tensor, "d_model d_mlp"], Float[Tensor, " d_mlp"]]
    mlp_out: tuple[Float[Tensor, "d_mlp d_model"], Float[Tensor, " d_model"]]


def network(
    tokens: Float[Tensor, "vocab d_model"],
    positions: Float[Tensor, "pos d_model"],
    layers: Sequence[Weights],
    unembed: Float[Tensor, "out d_model"],
    heads: int,
    *,
    causal: bool,
    name: str,
) -> Model:
    """A model with these weights. causal: no position reads a later one."""
    return Model(
        _Network(tokens, positions, layers, unembed, heads, causal).eval(), adapter=_adapter(causal), name=name
    )


class _Attention(nn.Module):
    def __init__(self, weights: Weights, heads: int, causal: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (_linear(one) for one in (weights.q, weights.k, weights.v, weights.out))
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        q, k, v = (read(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for read in (self.q, self.k, self.v))
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        if real is not None:
            scores = scores.masked_fill(~real[:, None, None].bool(), float("-inf"))
        z = scores.softmax(-1) @ v
        return self.out(z.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.up, self.act, self.down = _linear(weights.mlp_in), nn.ReLU(), _linear(weights.mlp_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class _Layer(nn.Module):
    def __init__(self, weights: Weights, heads: int, causal: bool) -> None:
        super().__init__()
        self.attention, self.mlp = _Attention(weights, heads, causal), _MLP(weights)

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        x = x + self.attention(x, real)
        return x + self.mlp(x)


class _Network(nn.Module):
    def __init__(
        self, tokens: Tensor, positions: Tensor, layers: Sequence[Weights], unembed: Tensor, heads: int, causal: bool
    ) -> None:
        super().__init__()
        vocab, width = tokens.shape
        self.config = SimpleNamespace(layers=len(layers), heads=heads, width=width, words=vocab,
                                      d_head=layers[0].q[0].shape[1] // heads)  # fmt: skip
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(len(positions), width)
        self.layers = nn.ModuleList([_Layer(one, heads, causal) for one in layers])
        self.norm, self.unembed = nn.Identity(), nn.Linear(width, len(unembed), bias=False)
        with torch.no_grad():
            self.tokens.weight.copy_(tokens)
            self.positions.weight.copy_(positions)
            self.unembed.weight.copy_(unembed)

    def forward(self, input_ids: Int[Tensor, "batch pos"], attention_mask: Tensor | None = None) -> Any:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        x = self.tokens(input_ids) + self.positions(places)
        for layer in self.layers:
            x = layer(x, attention_mask)
        return SimpleNamespace(logits=self.unembed(self.norm(x)))


def _linear(given: tuple[Tensor, Tensor]) -> nn.Linear:
    weight, bias = given
    made = nn.Linear(*weight.shape)
    with torch.no_grad():
        made.weight.copy_(weight.T)
        made.bias.copy_(bias)
    return made


def _adapter(causal: bool) -> Adapter:
    return Adapter(
        family="given weights",
        classes=("_Network",),
        layers="layers",
        sites={
            "resid_pre": Access("", "in"),
            "q": Access("attention.q", heads="head"),
            "k": Access("attention.k", heads="kv_head"),
            "v": Access("attention.v", heads="kv_head"),
            "z": Access("attention.out", "in", heads="head"),
            "attn_out": Access("attention.out"),
            "mlp_in": Access("mlp", "in"),
            "mlp_post": Access("mlp.down", "in"),
            "mlp_out": Access("mlp"),
            "resid_post": Access(""),
        },
        outside={
            "embed": Access("tokens"),
            "pos_embed": Access("positions"),
            "final_norm": Access("norm"),
            "logits": Access("unembed"),
        },
        o_proj="attention.out",
        final_norm="norm",
        unembed="unembed",
        norm="layer",
        config={"n_layers": "layers", "n_heads": "heads", "d_model": "width", "d_head": "d_head", "vocab": "words"},
        causal=causal,
        positions=False,
        call={},
    )
