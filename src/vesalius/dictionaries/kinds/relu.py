"""ReLU dictionaries: a latent is the positive part of its pre-activation; an L1 penalty keeps them few."""

from __future__ import annotations

from torch import Tensor

from vesalius.dictionaries.kinds.base import Vectors


class Relu:
    """relu(pre)."""

    name = "relu"
    extras: tuple[str, ...] = ()
    local = True

    def latents(self, pre: Tensor, _vectors: Vectors, _k: int) -> Tensor:
        """The positive part."""
        return pre.relu()
