"""Choosing entries from dense pre-activations, piece by piece; the pre-activations never leave the cache.

Exact, and faster than sorting: the k-th largest of group maxima is a lower bound of the k-th largest of all, and few
entries reach it. On the CPU comparing and partitioning is NumPy's work, which has vector instructions for both.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

from vesalius.dictionaries.training.codes import SparsePiece

_LEAST_GROUPS, _GROUPS_PER_K, _LEAST_SIZE = 128, 4, 8


class _Scratch(threading.local):
    """Memory that a thread uses again: fresh memory costs more than what is done in it."""

    def __init__(self) -> None:
        self._held: dict[torch.dtype, Tensor] = {}

    def like(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory of a tensor's shape and device."""
        held = self._held.get(dtype)
        if held is None or held.numel() < tensor.numel() or held.device != tensor.device:
            held = self._held[dtype] = torch.empty(tensor.numel(), dtype=dtype, device=tensor.device)
        return held[: tensor.numel()].view(tensor.shape)


scratch = _Scratch()


def kth_of_rows(values: Tensor, k: int) -> Tensor:
    """[rows]: the k-th largest of each row."""
    if values.device.type != "cpu":
        return values.topk(k, dim=1, sorted=False).values.amin(1)
    place = values.shape[1] - k
    return torch.from_numpy(np.partition(values.numpy(), place, axis=1)[:, place].copy())


def row_bound(pre: Tensor, k: int) -> Tensor | None:
    """[rows]: a number that at least k entries of each row reach; None where rows are too short for it to pay."""
    groups = max(_LEAST_GROUPS, 1 << (_GROUPS_PER_K * k - 1).bit_length())
    size = pre.shape[1] // groups
    if size < _LEAST_SIZE:
        return None
    return kth_of_rows(pre[:, : size * groups].unflatten(1, (size, groups)).amax(1), k)


def reaching(pre: Tensor, level: Tensor) -> SparsePiece:
    """The entries that are at least the level, columns rising within a row.

    pre: [rows, latent]. level: [rows, 1], [latent] or [].
    """
    rows, n_latents = pre.shape
    flat = _reached(pre, level)
    begins = torch.arange(rows + 1, device=pre.device) * n_latents
    piece = SparsePiece(flat, torch.searchsorted(flat, begins), pre.reshape(-1)[flat], n_latents)
    piece.columns = flat - piece.bags * n_latents
    return piece


def _reached(pre: Tensor, level: Tensor) -> Tensor:
    """Flat indices, rising."""
    if pre.device.type != "cpu":
        return (pre >= level).view(-1).nonzero()[:, 0]
    mask = scratch.like(pre, torch.bool).numpy()
    np.greater_equal(pre.numpy(), level.numpy(), out=mask)
    return torch.from_numpy(np.flatnonzero(mask))


def padded(piece: SparsePiece, values: Tensor) -> Tensor:
    """[rows, most entries of a row]: one value per entry, row by row, filled with -inf."""
    counts = piece.offsets.diff()
    width = int(counts.max())
    steps = torch.arange(len(counts), device=counts.device) * width
    place = torch.arange(len(values), device=counts.device) - (piece.offsets[:-1] - steps)[piece.bags]
    filled = values.new_full((len(counts) * width,), -torch.inf)
    filled[place] = values
    return filled.view(-1, width)


def largest(piece: SparsePiece, k: int) -> SparsePiece:
    """The k largest entries of each row of a piece in which every row has at least k."""
    least = kth_of_rows(padded(piece, piece.pre), k)
    found = kept(piece, piece.pre >= least[piece.bags])
    return found if len(found.pre) == k * len(least) else _without_ties(found, k)


def _without_ties(piece: SparsePiece, k: int) -> SparsePiece:
    """The k first of the largest of each row, where several are equal to the k-th."""
    order = torch.argsort(piece.pre, descending=True, stable=True)
    order = order[torch.argsort(piece.bags[order], stable=True)]
    rank = torch.arange(len(order), device=order.device) - piece.offsets[:-1][piece.bags]
    mask = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    mask[order[rank < k]] = True
    return kept(piece, mask)


def top_of_rows(pre: Tensor, k: int) -> SparsePiece:
    """The k largest entries of each row of [rows, latent]."""
    bound = row_bound(pre, k)
    if bound is not None:
        return largest(reaching(pre, bound[:, None]), k)
    values, columns = pre.topk(k, dim=1, sorted=False)
    offsets = torch.arange(len(pre) + 1, device=pre.device) * k
    return SparsePiece(columns.reshape(-1), offsets, values.reshape(-1), pre.shape[1])


def kept(piece: SparsePiece, mask: Tensor) -> SparsePiece:
    """The entries of a piece where the mask [entries] is true."""
    before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
    return SparsePiece(piece.columns[mask], before[piece.offsets], piece.pre[mask], piece.n_latents)


def grouped(piece: SparsePiece, ends: tuple[int, ...]) -> SparsePiece:
    """The same entries in one bag per row and group of latents; columns must rise within a row."""
    if len(ends) == 1:
        return piece
    group = torch.bucketize(piece.columns, torch.tensor(ends, device=piece.columns.device), right=True)
    bags = piece.bags * len(ends) + group
    begins = torch.arange((len(piece.offsets) - 1) * len(ends) + 1, device=bags.device)
    return SparsePiece(piece.columns, torch.searchsorted(bags, begins), piece.pre, piece.n_latents)
