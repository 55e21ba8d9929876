"""BatchTopK dictionaries: k per row on average, chosen over the whole batch (Bussmann et al. 2024).

In training the k times rows largest pre-activations of a batch are active; a fitted dictionary uses one threshold, a
running mean of the smallest chosen one, so that a row's latents don't depend on the rows beside it.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vesalius.dictionaries.config import TrainConfig
from vesalius.dictionaries.kinds.base import Entries, Gradients, Vectors, strongest


class BatchTopK:
    """pre where pre > threshold, one number for all latents (or [latent])."""

    name = "batchtopk"
    extras: tuple[str, ...] = ("threshold",)
    local = True
    activation = "batchtopk"
    selection: Literal["row", "batch", "local"] = "batch"

    def latents(self, pre: Tensor, vectors: Vectors, _k: int, /) -> Tensor:
        """The positive part above the threshold."""
        return pre.relu() * (pre > vectors["threshold"])

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
        """The error's, where the latent is positive."""
        return Gradients(dvalues * (entries.pre > 0))

    def fitted(self, _vectors: Vectors, threshold: Tensor, /) -> dict[str, Tensor]:
        """The threshold."""
        return {"threshold": threshold}
