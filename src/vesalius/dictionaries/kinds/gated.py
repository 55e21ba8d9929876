"""Gated dictionaries: one half decides which latents are active, the other how strongly (Rajamanoharan et al. 2024)."""

from __future__ import annotations

from torch import Tensor

from vesalius.dictionaries.kinds.base import Vectors


class Gated:
    """Where pre > 0: relu(exp(r_mag) (pre - b_enc) + b_mag). b_enc is the gate's bias."""

    name = "gated"
    extras: tuple[str, ...] = ("r_mag", "b_mag")
    local = True

    def latents(self, pre: Tensor, vectors: Vectors, _k: int) -> Tensor:
        """Magnitude where the gate is open."""
        magnitude = vectors["r_mag"].exp() * (pre - vectors["b_enc"]) + vectors["b_mag"]
        return magnitude.relu() * (pre > 0)
