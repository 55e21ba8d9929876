"""Kinds that choose latents by count: TopK, BatchTopK and Matryoshka. k keeps them few, and there is no penalty.

TopK takes of each row the k largest positive pre-activations (Gao et al. 2024). BatchTopK takes of a batch the k per
row largest (Bussmann et al. 2024); when fitted, one threshold takes the place of the comparison within a batch, the
running mean of the smallest pre-activation that was chosen, so that a row's latents don't depend on the rows beside it.
Matryoshka chooses as BatchTopK does, and its error is the mean over nested prefixes of the latents of the error of
reconstructing with that prefix alone, so that the first latents learn what is general (Bussmann et al. 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vesalius.dictionaries.kinds.base import Activation, Kind, Vectors


def _topk_dense(pre: Tensor, _vectors: Vectors, k: int) -> Tensor:
    values, indices = pre.topk(min(k, pre.shape[-1]), dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter_(-1, indices, values.relu())


def _topk_sparse(pre: Tensor, _vectors: Vectors, k: int) -> tuple[Tensor, Tensor]:
    values, indices = pre.topk(min(k, pre.shape[-1]), dim=-1)
    width = int((values > 0).sum(1).max()) if values.numel() else 0
    return indices[:, :width], values[:, :width].relu()


def above_threshold(pre: Tensor, vectors: Vectors, _k: int) -> Tensor:
    """The positive part where pre > threshold, [latent] or one number for all."""
    return pre.relu() * (pre > vectors["threshold"])


def _threshold(_vectors: Vectors, threshold: Tensor) -> dict[str, Tensor]:
    return {"threshold": threshold}


TOPK_ACTIVATION = Activation("topk", _topk_dense, independent=False, own_sparse=_topk_sparse)
BATCHTOPK_ACTIVATION = Activation("batchtopk", above_threshold, extras=("threshold",))

TOPK = Kind("topk", "topk", "row")
BATCHTOPK = Kind("batchtopk", "batchtopk", "batch", fitted_extras=_threshold)
# The prefixes are in TrainConfig.prefixes, and the training loop decodes each of them for every kind: one is the rule.
MATRYOSHKA = Kind("matryoshka", "batchtopk", "batch", fitted_extras=_threshold)
