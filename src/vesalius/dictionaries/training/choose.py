"""Choosing entries from dense pre-activations, piece by piece; the pre-activations never leave the cache.

Exact, and faster than sorting: the k-th largest of group maxima is a lower bound of the k-th largest of all, and few
entries pass it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vesalius.dictionaries.training.codes import SparsePiece
from vesalius.dictionaries.training.products import nonzero

_LEAST_GROUPS, _GROUPS_PER_K, _LEAST_SIZE = 128, 4, 8


def row_bound(pre: Tensor, k: int) -> Tensor | None:
    """[rows]: a number that at least k entries of each row reach; None where rows are too short for it to pay."""
    groups = max(_LEAST_GROUPS, 1 << (_GROUPS_PER_K * k - 1).bit_length())
    size = pre.shape[1] // groups
    if size < _LEAST_SIZE:
        return None
    maxima = pre[:, : size * groups].unflatten(1, (size, groups)).amax(1)
    return maxima.topk(k, dim=1, sorted=False).values.amin(1)


def passing(pre: Tensor, mask: Tensor) -> SparsePiece:
    """The entries where the mask is true, columns rising within a row. pre, mask: [rows, latent]."""
    rows, n_latents = pre.shape
    flat = nonzero(mask)
    begins = torch.arange(rows + 1, device=pre.device) * n_latents
    offsets = torch.searchsorted(flat, begins)
    piece = SparsePiece(flat, offsets, pre.reshape(-1)[flat], n_latents)
    piece.columns = flat - piece.bags * n_latents
    return piece


def largest(piece: SparsePiece, k: int) -> SparsePiece:
    """The k largest entries of each row of a piece in which every row has at least k."""
    counts = piece.offsets.diff()
    width = int(counts.max())
    place = (
        torch.arange(len(piece.pre), device=counts.device) - (piece.offsets[:-1] - _steps(counts, width))[piece.bags]
    )
    pre = piece.pre.new_full((len(counts) * width,), -torch.inf)
    columns = torch.zeros(len(pre), dtype=torch.long, device=counts.device)
    pre[place], columns[place] = piece.pre, piece.columns
    values, at = pre.view(-1, width).topk(k, dim=1, sorted=False)
    return _square(columns.view(-1, width).gather(1, at), values, piece.n_latents)


def _steps(counts: Tensor, width: int) -> Tensor:
    return torch.arange(len(counts), device=counts.device) * width


def top_of_rows(pre: Tensor, k: int) -> SparsePiece:
    """The k largest entries of each row of [rows, latent]."""
    bound = row_bound(pre, k)
    if bound is None:
        values, columns = pre.topk(k, dim=1, sorted=False)
        return _square(columns, values, pre.shape[1])
    return largest(passing(pre, pre >= bound[:, None]), k)


def _square(columns: Tensor, pre: Tensor, n_latents: int) -> SparsePiece:
    offsets = torch.arange(len(pre) + 1, device=pre.device) * pre.shape[1]
    return SparsePiece(columns.reshape(-1), offsets, pre.reshape(-1), n_latents)


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
