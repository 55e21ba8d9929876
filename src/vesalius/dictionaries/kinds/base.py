"""What a kind of dictionary is: how latents come from pre-activations, and what its loss asks of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

Vectors = Mapping[str, Tensor]
"""Per-latent vectors by name: `b_enc` always, and those the activation needs (`threshold`, `r_mag`, `b_mag`)."""


class Activation(Protocol):
    """From pre-activations (input times encoder plus b_enc) to latents, in a fitted dictionary."""

    name: str
    extras: tuple[str, ...]
    """Vectors it needs beside b_enc: [latent], or [] for one number for all."""
    local: bool
    """Whether a latent depends on its own pre-activation only."""

    def latents(self, pre: Tensor, vectors: Vectors, k: int, /) -> Tensor:
        """[..., latent], zero where inactive, never negative."""
        ...
