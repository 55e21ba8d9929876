"""The bfloat16 screen: pre-activations that could be chosen are found in bfloat16 and computed again in float32.

With x = xb + xr and w = wb + wr (rounded part and rest), |x w - xb wb| <= |xr| |w| + |xb| |wr| (Cauchy and Schwarz);
the rounding of sum and result is added. So an exact value differs from the rough one by no more than a margin that is
known per row, and what stays below a level by twice that margin cannot be among the chosen: the chosen latents are
those of float32, not nearly so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import BFloat16, Float
from torch import Tensor

from vesalius.dictionaries.training.sparse import (
    SparseChunk,
    by_column,
    dots,
    entries_from,
    k_largest,
    kth_of_rows,
    lower_bound,
    padded,
    scratch,
)
from vesalius.jobs.workers import Workers
from vesalius.model.products import Half

ROUNDING = 2.0**-7
"""Of a rough value, relative to its size and the bias's: twice what one rounding to bfloat16 can be off."""
_SUMMING = 2.0**-23
"""Relative error per summand of two sums in float32, the rough one and the exact one."""
_MOST = 8
"""A chunk in which more than one entry in _MOST passes the screen is computed in float32 at once."""
_LATENTS = 512
_ROWS = 512
"""About as many as are screened together; the layout is chosen for them, no number depends on it."""
_ABOVE = 1.0001
"""So that norms are not rounded down."""


@dataclass(frozen=True)
class Screen:
    """An encoder with its rounded copy and what the margin needs of it."""

    encoder: Float[Tensor, "latent d"]
    bias: Float[Tensor, " latent"]
    rounded: Half
    norm: float
    """Largest norm of a row, of what rounding took from a row, and largest bias."""
    rest: float
    largest_bias: float

    @classmethod
    def of(cls, encoder: Tensor, bias: Tensor, workers: Workers) -> Screen:
        """Screen of an encoder as it is now."""
        rounded = torch.empty_like(encoder, dtype=torch.bfloat16)

        def norms(start: int) -> Tensor:
            cut = slice(start, start + _LATENTS)
            rows = encoder[cut]
            # Measured, because what theory allows for would let more through.
            rest = rows - rounded[cut].copy_(rows)
            return torch.stack([torch.linalg.vecdot(part, part).max() for part in (rows, rest)])

        found = torch.stack(workers.map(norms, range(0, len(encoder), _LATENTS))).amax(0).sqrt() * _ABOVE
        # Laid out once a step for all chunks of rows.
        half = Half(rounded, _ROWS)
        return cls(encoder, bias, half, float(found[0]), float(found[1]), float(bias.abs().max()))

    def rough(self, x: Float[Tensor, "row d"]) -> BFloat16[Tensor, "row latent"]:
        """Pre-activations from products in bfloat16."""
        return self.rounded.linear(x.bfloat16(), self.bias.bfloat16())

    def spread(self, x: Float[Tensor, "row d"]) -> Float[Tensor, " row"]:
        """How far an exact product can be from the rough one, but for the rounding of the result."""
        rounded = x.bfloat16().float()
        summing = _SUMMING * x.shape[1] * self.norm
        spread = (x - rounded).norm(dim=1) * self.norm + rounded.norm(dim=1) * (self.rest + summing)
        return (1 + ROUNDING) * spread

    def margin(self, spread: Tensor, level: Tensor) -> Tensor:
        """[row]: how far an exact pre-activation near the level [row] or [] can be from the rough one."""
        return spread + ROUNDING * (level.abs() + self.largest_bias)

    def exact(self, x: Float[Tensor, "row d"], chunk: SparseChunk) -> Float[Tensor, " entry"]:
        """The pre-activations of a chunk's entries, computed in float32."""
        # Latent by latent: the rows of a chunk stay in cache, all of the encoder does not.
        order, rows, begins = by_column(chunk.columns, chunk.offsets, chunk.n_latents)
        columns, found = chunk.columns[order], x.new_empty(len(order))
        found[order] = dots(x, self.encoder, columns, begins[:-1], rows) + self.bias[columns]
        return found

    def top_of_rows(self, x: Tensor, k: int) -> SparseChunk | None:
        """The k largest of each row; None where the screen does not pay.

        The k-th largest rough value less a margin is a bound for the exact one: only what could reach that is computed.
        """
        rough = self.rough(x)
        bound = lower_bound(_as_integers(rough), k)
        # As integers, positive numbers of bfloat16 have their order; negative ones only that they are smaller.
        if bound is None or int(bound.min()) <= 0:
            return None
        # The margin depends on the row alone, so it is computed once for the bound and for the k-th largest.
        spread = self.spread(x)
        found = _entries_from(rough, self._lowest(spread, bound.view(torch.bfloat16).float()))
        if _too_many(found, rough):
            return None
        smallest = self._lowest(spread, kth_of_rows(padded(found), k))
        possible = found.where(found.pre >= smallest[found.bags])
        possible.pre = self.exact(x, possible)
        return k_largest(possible, k)

    def _lowest(self, spread: Tensor, level: Tensor) -> Tensor:
        """[row]: what a rough value must reach for the exact one to reach those whose rough ones reach the level."""
        return level - 2 * self.margin(spread, level)

    def above(self, x: Tensor, floor: Tensor) -> SparseChunk | None:
        """The entries at or above the floor, [latent] or []; None where the screen does not pay."""
        rough = self.rough(x)
        margin = self.margin(self.spread(x), floor.abs().max())
        if floor.ndim:
            found = entries_from(_float(rough).add_(margin[:, None]), floor)
        else:
            found = _entries_from(rough, floor - margin)
        if _too_many(found, rough):
            return None
        chunk = SparseChunk(found.columns, found.offsets, self.exact(x, found), found.n_latents)
        return chunk.where(chunk.pre >= (chunk.per_entry(floor) if floor.ndim else floor))


def _as_integers(rough: Tensor) -> Tensor:
    """Numbers of bfloat16 as integers of the same bits, which NumPy compares several times faster."""
    return rough.view(torch.int16)


def _float(rough: Tensor) -> Tensor:
    """In this thread's scratch memory: overwritten by its next use."""
    return scratch.like(rough, torch.float32).copy_(rough)


def _entries_from(rough: Tensor, level: Tensor) -> SparseChunk:
    """The entries that are at least the level [row]; compared as integers where that is the same."""
    if float(level.min()) <= 0:
        return entries_from(_float(rough), level[:, None])
    below = (level * (1 - ROUNDING)).bfloat16()  # rounded down, so that nothing is lost
    found = entries_from(_as_integers(rough), _as_integers(below)[:, None])
    found.pre = found.pre.view(torch.bfloat16).float()
    return found


def _too_many(chunk: SparseChunk, rough: Tensor) -> bool:
    return len(chunk.pre) * _MOST > rough.numel()
