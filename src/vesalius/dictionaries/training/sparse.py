"""Sparse codes: the entries of a matrix of latents that take part in a step, how they are chosen, and their products.

Entries are chosen from dense pre-activations chunk by chunk, so that the pre-activations never leave the cache. That is
exact, and faster than sorting: the k-th largest of group maxima is a lower bound of the k-th largest of all, and few
entries reach it. On the CPU comparing and partitioning is NumPy's work, which has vector instructions for both.

A *bag* is one row's share of one group of latents, as in `torch.nn.EmbeddingBag`; without groups (all kinds but
matryoshka) bags are rows.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from scipy.sparse import csr_array
from torch import Tensor

_LEAST_GROUPS, _GROUPS_PER_K, _LEAST_SIZE = 128, 4, 8
# What autograd calls for embedding_bag's weights; nothing public computes these products without the dense matrix.
_DOTS: Any = getattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", None)
_DOTS_CHUNK = 65536


class SparseChunk:
    """The entries of a chunk of rows, bag by bag.

    columns: [entry] latent of each. offsets: [bag + 1] where each bag begins. pre: [entry] pre-activations.
    """

    def __init__(self, columns: Tensor, offsets: Tensor, pre: Tensor, n_latents: int) -> None:
        self.columns, self.offsets, self.pre, self.n_latents = columns, offsets, pre, n_latents
        self.values = self.dpre = pre

    def per_entry(self, per_latent: Tensor) -> Tensor:
        """A vector [latent] spread over the entries."""
        return per_latent[self.columns]

    def decode(self, weights: Tensor, decoder: Float[Tensor, "latent d"]) -> Float[Tensor, "bag d"]:
        """Sums of weight times decoder row."""
        return weighted_sums(decoder, self.columns, self.offsets[:-1], weights)

    def dots(self, table: Float[Tensor, "bag d"], decoder: Float[Tensor, "latent d"]) -> Tensor:
        """Per entry, its bag's row of the table times its latent's row of the decoder."""
        return dots(table, decoder, self.columns, self.offsets[:-1], self.bags)

    @property
    def bags(self) -> Int[Tensor, " entry"]:
        """Number of each entry's bag."""
        counts = self.offsets.diff()
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)

    def sum_per_latent(self, per_entry: Tensor) -> Float[Tensor, " latent"]:
        """float64 sums over the entries of each latent."""
        # Of no entries at all bincount gives integers, whatever the weights.
        return torch.bincount(self.columns, weights=per_entry.double(), minlength=self.n_latents).double()

    def keep(self, values: Tensor, dpre: Tensor) -> None:
        """Store what `outer` will need: the entries' values and the gradients of their pre-activations."""
        self.values, self.dpre = values, dpre

    def where(self, mask: Tensor) -> SparseChunk:
        """The entries where the mask [entry] is true."""
        before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
        return SparseChunk(self.columns[mask], before[self.offsets], self.pre[mask], self.n_latents)

    def grouped(self, ends: tuple[int, ...]) -> SparseChunk:
        """The same entries in one bag per row and group of latents; columns must rise within a row."""
        if len(ends) == 1:
            return self
        group = torch.bucketize(self.columns, torch.tensor(ends, device=self.columns.device), right=True)
        bags = self.bags * len(ends) + group
        begins = torch.arange((len(self.offsets) - 1) * len(ends) + 1, device=bags.device)
        return SparseChunk(self.columns, torch.searchsorted(bags, begins), self.pre, self.n_latents)


class SparseCodes:
    """The entries of all chunks of a batch, sorted by latent."""

    def __init__(self, chunks: Sequence[SparseChunk], n_groups: int) -> None:
        columns = torch.cat([chunk.columns for chunk in chunks])
        counts = torch.cat([chunk.offsets.diff() for chunk in chunks])
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        order, bags, self._begins = by_column(columns, offsets, chunks[0].n_latents)
        # Inputs come one per row, output gradients one per bag.
        rows = bags if n_groups == 1 else bags.div(n_groups, rounding_mode="floor")
        self._of = {
            "values": (torch.cat([chunk.values for chunk in chunks])[order], bags),
            "dpre": (torch.cat([chunk.dpre for chunk in chunks])[order], rows),
        }

    def outer(self, which: str, table: Tensor, start: int, stop: int) -> Tensor:
        """As `Codes.outer`."""
        weights, rows = self._of[which]
        first, last = int(self._begins[start]), int(self._begins[stop])
        return weighted_sums(table, rows[first:last], self._begins[start:stop] - first, weights[first:last])


# Choosing entries


class _Scratch(threading.local):
    """Memory that a thread uses again: fresh memory costs more than what is done in it."""

    def __init__(self) -> None:
        self._memory: dict[torch.dtype, Tensor] = {}

    def like(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory of a tensor's shape and device."""
        memory = self._memory.get(dtype)
        if memory is None or memory.numel() < tensor.numel() or memory.device != tensor.device:
            memory = self._memory[dtype] = torch.empty(tensor.numel(), dtype=dtype, device=tensor.device)
        return memory[: tensor.numel()].view(tensor.shape)


scratch = _Scratch()


def kth_of_rows(values: Shaped[Tensor, "row column"], k: int) -> Shaped[Tensor, " row"]:
    """The k-th largest of each row."""
    if values.device.type != "cpu":
        return values.topk(k, dim=1, sorted=False).values.amin(1)
    place = values.shape[1] - k
    return torch.from_numpy(np.partition(values.numpy(), place, axis=1)[:, place].copy())


def lower_bound(pre: Shaped[Tensor, "row latent"], k: int) -> Shaped[Tensor, " row"] | None:
    """A number that at least k entries of each row reach; None where rows are too short for it to pay."""
    groups = max(_LEAST_GROUPS, 1 << (_GROUPS_PER_K * k - 1).bit_length())
    # Few entries pass a bound from several groups per wanted entry; more groups would only make the first pass slower.
    size = pre.shape[1] // groups
    if size < _LEAST_SIZE:
        return None
    return kth_of_rows(pre[:, : size * groups].unflatten(1, (size, groups)).amax(1), k)


def entries_from(pre: Shaped[Tensor, "row latent"], level: Tensor) -> SparseChunk:
    """The entries that are at least the level ([row, 1], [latent] or []), columns rising in a row."""
    rows, n_latents = pre.shape
    flat = _flat_entries(pre, level)
    begins = torch.arange(rows + 1, device=pre.device) * n_latents
    chunk = SparseChunk(flat, torch.searchsorted(flat, begins), pre.reshape(-1)[flat], n_latents)
    # Only now: which row an entry is in is known by where its row begins.
    chunk.columns = flat - chunk.bags * n_latents
    return chunk


def _flat_entries(pre: Tensor, level: Tensor) -> Tensor:
    """Flat indices, rising."""
    if pre.device.type != "cpu":
        return (pre >= level).view(-1).nonzero()[:, 0]
    # NumPy compares with vector instructions and finds the true bytes faster than nonzero() does.
    mask = scratch.like(pre, torch.bool).numpy()
    np.greater_equal(pre.numpy(), level.numpy(), out=mask)
    return torch.from_numpy(np.flatnonzero(mask))


def padded(chunk: SparseChunk) -> Float[Tensor, "row most"]:
    """Pre-activations row by row, filled with -inf up to the most entries of a row."""
    counts = chunk.offsets.diff()
    width = int(counts.max())
    steps = torch.arange(len(counts), device=counts.device) * width
    place = torch.arange(len(chunk.pre), device=counts.device) - (chunk.offsets[:-1] - steps)[chunk.bags]
    filled = chunk.pre.new_full((len(counts) * width,), -torch.inf)
    filled[place] = chunk.pre
    return filled.view(-1, width)


def k_largest(chunk: SparseChunk, k: int) -> SparseChunk:
    """The k largest entries of each row of a chunk in which every row has at least k."""
    smallest = kth_of_rows(padded(chunk), k)
    found = chunk.where(chunk.pre >= smallest[chunk.bags])
    return found if len(found.pre) == k * len(smallest) else _without_ties(found, k)


def _without_ties(chunk: SparseChunk, k: int) -> SparseChunk:
    """The first k of the largest of each row, where several are equal to the k-th."""
    # Ties are rare (zeros of rounded inputs), so that a full sort of the few entries left costs nothing that counts.
    order = torch.argsort(chunk.pre, descending=True, stable=True)
    order = order[torch.argsort(chunk.bags[order], stable=True)]
    rank = torch.arange(len(order), device=order.device) - chunk.offsets[:-1][chunk.bags]
    mask = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    mask[order[rank < k]] = True
    return chunk.where(mask)


def top_of_rows(pre: Float[Tensor, "row latent"], k: int) -> SparseChunk:
    """The k largest entries of each row."""
    bound = lower_bound(pre, k)
    if bound is not None:
        return k_largest(entries_from(pre, bound[:, None]), k)
    # Few latents, or many of them wanted: then PyTorch's own selection is as fast.
    values, columns = pre.topk(k, dim=1, sorted=False)
    offsets = torch.arange(len(pre) + 1, device=pre.device) * k
    return SparseChunk(columns.reshape(-1), offsets, values.reshape(-1), pre.shape[1])


# Products


def weighted_sums(
    table: Float[Tensor, "column d"], columns: Tensor, offsets: Tensor, weights: Tensor
) -> Float[Tensor, "bag d"]:
    """For each row of a sparse matrix the sum of weight times table[column]."""
    return torch.nn.functional.embedding_bag(columns, table, offsets, mode="sum", per_sample_weights=weights)


def dots(
    left: Float[Tensor, "row d"],
    table: Float[Tensor, "column d"],
    columns: Int[Tensor, " entry"],
    offsets: Tensor,
    rows: Int[Tensor, " entry"],
) -> Float[Tensor, " entry"]:
    """left[row] times table[column] for every entry, without making the dense product."""
    if _DOTS is not None:
        found: Tensor = _DOTS(left, table, columns, offsets, rows, 0)
        return found
    # In pieces, since gathered rows of all entries would be far larger than the batch.
    pieces = zip(rows.split(_DOTS_CHUNK), columns.split(_DOTS_CHUNK), strict=True)
    return torch.cat([torch.linalg.vecdot(left[r], table[c]) for r, c in pieces])


def by_column(
    columns: Int[Tensor, " entry"], offsets: Tensor, n_columns: int
) -> tuple[Int[Tensor, " entry"], Int[Tensor, " entry"], Int[Tensor, " columns_and_1"]]:
    """(order, rows, offsets): the entries sorted by column, each column's by row; where each column begins.

    offsets: [row + 1]; the returned one is [n_columns + 1].
    """
    if columns.device.type != "cpu":
        order = columns.argsort(stable=True)
        counts = torch.bincount(columns, minlength=n_columns)
        rows = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=columns.device), offsets.diff())
        return order, rows[order], torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    # SciPy's conversion is a counting sort, linear in the entries where argsort is not.
    shape = (len(offsets) - 1, n_columns)
    numbers = np.arange(len(columns))
    turned = csr_array((numbers, columns.numpy(), offsets.numpy()), shape=shape).tocsc()
    return _int64(turned.data), _int64(turned.indices), _int64(turned.indptr)


def _int64(array: Any) -> Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.int64))
