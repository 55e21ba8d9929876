"""JumpReLU dictionaries: a latent is its pre-activation where that passes the latent's own threshold."""

from __future__ import annotations

from torch import Tensor

from vesalius.dictionaries.kinds.base import Vectors


class JumpRelu:
    """pre where pre > threshold (never negative). threshold: [latent], or [] for one number."""

    name = "jumprelu"
    extras: tuple[str, ...] = ("threshold",)
    local = True

    def latents(self, pre: Tensor, vectors: Vectors, _k: int) -> Tensor:
        """The positive part above the threshold."""
        return pre.relu() * (pre > vectors["threshold"])
