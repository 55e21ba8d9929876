"""Gated dictionaries: one half decides which latents are active, the other how strongly (Rajamanoharan et al. 2024).

Both halves share the encoder up to a factor per latent, exp(r_mag). The gate has no gradient of its own through the
step, so its positive part is penalised and has to rebuild the activations as well, with the decoder held fixed (their
equation 8).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vesalius.dictionaries.config import TrainConfig
from vesalius.dictionaries.kinds.base import Entries, Gradients, Vectors, strongest


class Gated:
    """Where pre > 0: relu(exp(r_mag) (pre - b_enc) + b_mag). b_enc is the gate's bias."""

    name = "gated"
    extras: tuple[str, ...] = ("r_mag", "b_mag")
    local = True
    activation = "gated"
    selection: Literal["row", "batch", "local"] = "local"

    def latents(self, pre: Tensor, vectors: Vectors, _k: int, /) -> Tensor:
        """Magnitude where the gate is open."""
        magnitude = vectors["r_mag"].exp() * (pre - vectors["b_enc"]) + vectors["b_mag"]
        return magnitude.relu() * (pre > 0)

    def sparse(self, pre: Tensor, vectors: Vectors, k: int, /) -> tuple[Tensor, Tensor]:
        """Those that are not zero."""
        return strongest(self.latents(pre, vectors, k))

    def start(self, config: TrainConfig, _pre: Tensor, /) -> dict[str, Tensor]:
        """Both zero: at first the magnitude is the gate's pre-activation."""
        return {"r_mag": torch.zeros(config.n_latents), "b_mag": torch.zeros(config.n_latents)}

    def floor(self, _vectors: Vectors, _config: TrainConfig, /) -> Tensor | None:
        """Zero."""
        return None

    def values(self, entries: Entries, /) -> Tensor:
        """Magnitude where the gate is open."""
        gain, shared, magnitude = _halves(entries)
        del gain, shared
        return magnitude.relu() * (entries.pre > 0)

    def gate(self, entries: Entries, /) -> Tensor | None:
        """Positive part of the gate."""
        return entries.pre.relu()

    def gradients(self, entries: Entries, dvalues: Tensor, dgate: Tensor | None, /) -> Gradients:
        """The magnitude's error goes to magnitude and encoder, the gate's error and penalty to gate and encoder."""
        assert dgate is not None
        gain, shared, magnitude = _halves(entries)
        is_open = entries.pre > 0
        through = dvalues * (is_open & (magnitude > 0))
        push = entries.pressure if entries.norms is None else entries.pressure * entries.at(entries.norms)
        gate = (dgate + push) * is_open
        own = {"r_mag": through * gain * shared, "b_mag": through, "b_enc": gate}
        weighted = entries.pressure * entries.pre.relu()
        return Gradients(through * gain + gate, own, norm=weighted, penalty=entries.weighted(weighted).sum())

    def fitted(self, vectors: Vectors, _threshold: Tensor, /) -> dict[str, Tensor]:
        """The factor's logarithm and the magnitude's bias."""
        return {"r_mag": vectors["r_mag"], "b_mag": vectors["b_mag"]}


def _halves(entries: Entries) -> tuple[Tensor, Tensor, Tensor]:
    """Factor, shared product of input and encoder, magnitude before its positive part."""
    gain = entries.at(entries.vectors["r_mag"].exp())
    shared = entries.pre - entries.at(entries.vectors["b_enc"])
    return gain, shared, gain * shared + entries.at(entries.vectors["b_mag"])
