"""Products with a sparse matrix of latents: with `products.linear` of the model room, what a training step is made of.

A sparse matrix is kept row by row: `columns` and weights of the entries, and `offsets`, where each row begins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

_DOTS: Any = getattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", None)
_DOTS_CHUNK = 65536


def weighted_sums(table: Tensor, columns: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """[rows, d]: for each row of a sparse matrix the sum of weight times table[column]. table: [columns, d]."""
    return torch.nn.functional.embedding_bag(columns, table, offsets, mode="sum", per_sample_weights=weights)


def dots(left: Tensor, table: Tensor, columns: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
    """[entries]: left[row] times table[column] for every entry, without making the dense product."""
    if _DOTS is not None:
        found: Tensor = _DOTS(left, table, columns, offsets, rows, 0)
        return found
    pieces = zip(rows.split(_DOTS_CHUNK), columns.split(_DOTS_CHUNK), strict=True)
    return torch.cat([torch.linalg.vecdot(left[r], table[c]) for r, c in pieces])


def by_column(columns: Tensor, offsets: Tensor, n_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order, rows, offsets): the entries sorted by column, each column's by row; where each column begins.

    offsets: [rows + 1]; the returned one is [n_columns + 1].
    """
    if columns.device.type != "cpu":
        order = columns.argsort(stable=True)
        counts = torch.bincount(columns, minlength=n_columns)
        rows = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=columns.device), offsets.diff())
        return order, rows[order], torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    shape = (len(offsets) - 1, n_columns)
    numbers = np.arange(len(columns))
    turned = csr_array((numbers, columns.numpy(), offsets.numpy()), shape=shape).tocsc()
    return _int64(turned.data), _int64(turned.indices), _int64(turned.indptr)


def _int64(array: Any) -> Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.int64))
