"""An untrained dictionary: the null of everything that is said about the latents of a trained one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.coder import SiteTensors
from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.kinds import ACTIVATIONS
from vesalius.errors import InputError
from vesalius.seeds import generator_for

TOGETHER = 2048
"""Latents whose values on all rows are held at once."""


def untrained(dictionary: Dictionary, rows: SiteTensors, seed: int = 0) -> Dictionary:
    """A dictionary of the same kind and size whose encoder and decoder point in random directions.

    Every latent keeps the norms of its encoder column and decoder row, and fires as often on these rows, activations
    [..., d_in] such as `encode` takes: by its bias, where latents don't compete for a place. So what it does is what
    the data and the sparsity give, with nothing learned. An autoencoder's decoder is its encoder transposed, as when
    training begins. Raises as `encode`, and InputError for no rows.
    """
    draw = generator_for("untrained", seed)
    ties = dictionary.in_sites == dictionary.out_sites
    encoders = tuple(_random_like(tensor, 0, draw) for tensor in dictionary.encoders)
    drawn = (
        (tensor.T for tensor in encoders)
        if ties
        else (torch.randn(t.shape, generator=draw) for t in dictionary.decoders)
    )
    decoders = tuple(_with_norms(d.to(t), t, 1) for d, t in zip(drawn, dictionary.decoders, strict=True))
    plain = replace(
        dictionary,
        encoders=encoders,
        decoders=decoders,
        b_enc=torch.zeros_like(dictionary.b_enc),
        skip=None,
        history=None,
        metadata={"untrained": {"like": dictionary.content_hash, "seed": seed}},
    )
    if not ACTIVATIONS[dictionary.activation].independent:
        return plain
    return _as_dense(plain, dictionary, rows)


def _as_dense(plain: Dictionary, like: Dictionary, rows: SiteTensors) -> Dictionary:
    """With the biases that make each latent fire as often as the other dictionary's."""
    blocks = [block.tolist() for block in torch.arange(like.n_latents).split(TOGETHER)]
    cut = torch.cat([_cuts(plain, like, rows, some) for some in blocks])
    bias = like.extras.get("threshold", torch.zeros(())).to(cut) - cut
    extras = dict(plain.extras)
    if "b_mag" in extras:
        extras["b_mag"] = (extras["r_mag"].exp() * bias).to(extras["b_mag"])
    return replace(plain, b_enc=bias.to(plain.b_enc), extras=extras)


def _cuts(plain: Dictionary, like: Dictionary, rows: SiteTensors, latents: Sequence[int]) -> Float[Tensor, " latent"]:
    """Values that some latents of a dictionary without biases pass as often as those of the other fire."""
    density = (like.encode(rows, latents).flatten(0, -2) != 0).double().mean(0)
    # What is read is the product alone: these rectify it with neither bias nor threshold.
    up = replace(plain, activation="relu", extras={})
    down = replace(up, encoders=tuple(-encoder for encoder in up.encoders))
    values = (up.encode(rows, latents) - down.encode(rows, latents)).flatten(0, -2)
    if not len(values):
        raise InputError("no rows: an untrained dictionary is made on some activations, to fire as often on them")
    ordered = values.sort(0, descending=True).values
    # Between the last value that should be past it and the next one; past all, for a latent that is silent.
    count = (density * len(values)).round().long()
    last, following = (ordered.gather(0, at.clamp(0, len(values) - 1)[None])[0] for at in (count - 1, count))
    between = torch.where(count == len(values), last - 1, (last + following) / 2)
    return torch.where(count == 0, following + 1, between)


def _random_like(tensor: Tensor, dim: int, draw: torch.Generator) -> Tensor:
    return _with_norms(torch.randn(tensor.shape, generator=draw).to(tensor), tensor, dim)


def _with_norms(drawn: Tensor, like: Tensor, dim: int) -> Tensor:
    """drawn, with the norms along a dimension that another tensor has."""
    return torch.nn.functional.normalize(drawn, dim=dim) * like.norm(dim=dim, keepdim=True)
