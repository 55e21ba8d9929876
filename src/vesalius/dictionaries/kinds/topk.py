"""TopK dictionaries: of each row the k largest positive pre-activations (Gao et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from vesalius.dictionaries.kinds.base import Vectors


class TopK:
    """The k largest pre-activations of a row, negative ones as zero."""

    name = "topk"
    extras: tuple[str, ...] = ()
    local = False

    def latents(self, pre: Tensor, _vectors: Vectors, k: int) -> Tensor:
        """At most k of a row are positive."""
        values, indices = pre.topk(min(k, pre.shape[-1]), dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter_(-1, indices, values.relu())
