"""TopK dictionaries: of each row the k largest positive pre-activations (Gao et al. 2024)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vesalius.dictionaries.config import TrainConfig
from vesalius.dictionaries.kinds.base import Entries, Gradients, Vectors


class TopK:
    """The k largest pre-activations of a row, negative ones as zero."""

    name = "topk"
    extras: tuple[str, ...] = ()
    local = False
    activation = "topk"
    selection: Literal["row", "batch", "local"] = "row"

    def latents(self, pre: Tensor, _vectors: Vectors, k: int, /) -> Tensor:
        """At most k of a row are positive."""
        values, indices = pre.topk(min(k, pre.shape[-1]), dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter_(-1, indices, values.relu())

    def sparse(self, pre: Tensor, _vectors: Vectors, k: int, /) -> tuple[Tensor, Tensor]:
        """Those that are not zero."""
        values, indices = pre.topk(min(k, pre.shape[-1]), dim=-1)
        width = int((values > 0).sum(1).max()) if values.numel() else 0
        return indices[:, :width], values[:, :width].relu()

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

    def fitted(self, _vectors: Vectors, _threshold: Tensor, /) -> dict[str, Tensor]:
        """None: k decides."""
        return {}
