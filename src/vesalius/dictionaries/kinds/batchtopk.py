"""BatchTopK dictionaries: k per row on average, chosen over the whole batch (Bussmann et al. 2024).

In training the k times rows largest pre-activations of a batch are active; a fitted dictionary uses one threshold, so
that a row's latents don't depend on the rows beside it.
"""

from __future__ import annotations

from torch import Tensor

from vesalius.dictionaries.kinds.base import Vectors


class BatchTopK:
    """pre where pre > threshold, one number for all latents (or [latent])."""

    name = "batchtopk"
    extras: tuple[str, ...] = ("threshold",)
    local = True

    def latents(self, pre: Tensor, vectors: Vectors, _k: int) -> Tensor:
        """The positive part above the threshold."""
        return pre.relu() * (pre > vectors["threshold"])
