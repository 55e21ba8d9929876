"""ReLU dictionaries: a latent is the positive part of its pre-activation; an L1 penalty keeps them few.

The penalty weighs each latent with the norm of its decoder row, summed over sites (Anthropic, April 2024; for
crosscoders Lindsey et al. 2024), so that it cannot be evaded by small latents and large rows.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vesalius.dictionaries.config import TrainConfig
from vesalius.dictionaries.kinds.base import Entries, Gradients, Vectors, strongest


class Relu:
    """relu(pre)."""

    name = "relu"
    extras: tuple[str, ...] = ()
    local = True
    activation = "relu"
    selection: Literal["row", "batch", "local"] = "local"

    def latents(self, pre: Tensor, _vectors: Vectors, _k: int, /) -> Tensor:
        """The positive part."""
        return pre.relu()

    def sparse(self, pre: Tensor, vectors: Vectors, k: int, /) -> tuple[Tensor, Tensor]:
        """Those that are not zero."""
        return strongest(self.latents(pre, vectors, k))

    def start(self, _config: TrainConfig, _pre: Tensor, /) -> dict[str, Tensor]:
        """None."""
        return {}

    def floor(self, _vectors: Vectors, _config: TrainConfig, /) -> Tensor | None:
        """Zero."""
        return None

    def values(self, entries: Entries, /) -> Tensor:
        """The positive part."""
        return entries.pre.relu()

    def gate(self, _entries: Entries, /) -> Tensor | None:
        """None."""
        return None

    def gradients(self, entries: Entries, dvalues: Tensor, _dgate: Tensor | None, /) -> Gradients:
        """Error, plus the penalty's constant push times the decoder norm."""
        values = entries.pre.relu()
        push = entries.pressure if entries.norms is None else entries.pressure * entries.at(entries.norms)
        weighted = entries.pressure * values
        return Gradients((dvalues + push) * (entries.pre > 0), norm=weighted, penalty=entries.weighted(weighted).sum())

    def fitted(self, _vectors: Vectors, _threshold: Tensor, /) -> dict[str, Tensor]:
        """None."""
        return {}
