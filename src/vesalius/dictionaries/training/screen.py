"""The bfloat16 screen: pre-activations that could be chosen are found in bfloat16 and computed again in float32.

With x = xb + xr and w = wb + wr (rounded part and rest), |x w - xb wb| <= |xr| |w| + |xb| |wr| (Cauchy and Schwarz);
the rounding of sum and result is added. So an exact value differs from the rough one by no more than a margin that is
known per row, and what stays below a level by twice that margin cannot be among the chosen: the chosen latents are
those of float32, not nearly so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vesalius.dictionaries.training.choose import (
    kept,
    kth_of_rows,
    largest,
    padded,
    reaching,
    row_bound,
    scratch,
)
from vesalius.dictionaries.training.codes import SparsePiece
from vesalius.dictionaries.training.products import by_column, dots
from vesalius.jobs.workers import Workers
from vesalius.model.products import Half

ROUNDING = 2.0**-7
"""Of a rough value, relative to its size and the bias's: twice what one rounding to bfloat16 can be off."""
_SUMMING = 2.0**-23
"""Relative error per summand of two sums in float32, the rough one and the exact one."""
_MOST = 8
"""A piece in which more than one entry in _MOST passes the screen is computed in float32 at once."""


_LATENTS = 512
_ROWS = 512
"""About as many as are screened together; the layout is chosen for them, no number depends on it."""
_ABOVE = 1.0001
"""So that norms are not rounded down."""


@dataclass(frozen=True)
class Screen:
    """An encoder [latent, d] with its rounded copy and what the margin needs of it."""

    encoder: Tensor
    bias: Tensor
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
            rest = rows - rounded[cut].copy_(rows)
            return torch.stack([torch.linalg.vecdot(part, part).max() for part in (rows, rest)])

        found = torch.stack(workers.map(norms, range(0, len(encoder), _LATENTS))).amax(0).sqrt() * _ABOVE
        half = Half(rounded, _ROWS)
        return cls(encoder, bias, half, float(found[0]), float(found[1]), float(bias.abs().max()))

    def rough(self, x: Tensor) -> Tensor:
        """[rows, latent] bfloat16: pre-activations from products in bfloat16."""
        return self.rounded.linear(x.bfloat16(), self.bias.bfloat16())

    def spread(self, x: Tensor) -> Tensor:
        """[rows]: how far an exact product can be from the rough one, but for the rounding of the result."""
        rounded = x.bfloat16().float()
        summing = _SUMMING * x.shape[1] * self.norm
        spread = (x - rounded).norm(dim=1) * self.norm + rounded.norm(dim=1) * (self.rest + summing)
        return (1 + ROUNDING) * spread

    def margin(self, spread: Tensor, level: Tensor) -> Tensor:
        """[rows]: how far an exact pre-activation near the level [rows] or [] can be from the rough one."""
        return spread + ROUNDING * (level.abs() + self.largest_bias)

    def exact(self, x: Tensor, piece: SparsePiece) -> Tensor:
        """The pre-activations of a piece's entries, computed in float32."""
        # Latent by latent: the rows of a piece stay in cache, all of the encoder does not.
        order, rows, begins = by_column(piece.columns, piece.offsets, piece.n_latents)
        columns, found = piece.columns[order], x.new_empty(len(order))
        found[order] = dots(x, self.encoder, columns, begins[:-1], rows) + self.bias[columns]
        return found

    def top_of_rows(self, x: Tensor, k: int) -> SparsePiece | None:
        """The k largest of each row; None where the screen does not pay.

        The k-th largest rough value less a margin is a bound for the exact one: only what could reach that is computed.
        """
        rough = self.rough(x)
        bound = row_bound(_keys(rough), k)
        # As integers, positive numbers of bfloat16 have their order; negative ones only that they are smaller.
        if bound is None or int(bound.min()) <= 0:
            return None
        spread = self.spread(x)
        found = _reaching(rough, self._lowest(spread, bound.view(torch.bfloat16).float()))
        if _too_many(found, rough):
            return None
        least = self._lowest(spread, kth_of_rows(padded(found, found.pre), k))
        possible = kept(found, found.pre >= least[found.bags])
        possible.pre = self.exact(x, possible)
        return largest(possible, k)

    def _lowest(self, spread: Tensor, level: Tensor) -> Tensor:
        """[rows]: what a rough value must reach for the exact one to reach those whose rough ones reach the level."""
        return level - 2 * self.margin(spread, level)

    def above(self, x: Tensor, floor: Tensor) -> SparsePiece | None:
        """The entries at or above the floor, [latent] or []; None where the screen does not pay."""
        rough = self.rough(x)
        margin = self.margin(self.spread(x), floor.abs().max())
        if floor.ndim:
            found = reaching(_float(rough).add_(margin[:, None]), floor)
        else:
            found = _reaching(rough, floor - margin)
        if _too_many(found, rough):
            return None
        piece = SparsePiece(found.columns, found.offsets, self.exact(x, found), found.n_latents)
        return kept(piece, piece.pre >= (piece.at(floor) if floor.ndim else floor))


def _keys(rough: Tensor) -> Tensor:
    """Numbers of bfloat16 as integers of the same bits."""
    return rough.view(torch.int16)


def _float(rough: Tensor) -> Tensor:
    """Scratch: gone at this thread's next."""
    return scratch.like(rough, torch.float32).copy_(rough)


def _reaching(rough: Tensor, level: Tensor) -> SparsePiece:
    """The entries that are at least the level [rows]; compared as integers where that is the same."""
    if float(level.min()) <= 0:
        return reaching(_float(rough), level[:, None])
    below = (level * (1 - ROUNDING)).bfloat16()  # rounded down, so that nothing is lost
    found = reaching(_keys(rough), _keys(below)[:, None])
    found.pre = _as_float(found.pre)
    return found


def _as_float(keys: Tensor) -> Tensor:
    return keys.view(torch.bfloat16).float()


def _too_many(piece: SparsePiece, rough: Tensor) -> bool:
    return len(piece.pre) * _MOST > rough.numel()
