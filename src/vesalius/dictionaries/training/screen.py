"""The bfloat16 screen: pre-activations that could be chosen are found in bfloat16 and computed again in float32.

With x = xb + xr and w = wb + wr (rounded part and rest), |x w - xb wb| <= |xr| |w| + |xb| |wr| (Cauchy and Schwarz);
the rounding of sum and result is added. So an exact value differs from the rough one by no more than a margin that is
known per row, and what stays below a level by twice that margin cannot be among the chosen: the chosen latents are
those of float32, not nearly so.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vesalius.dictionaries.training.choose import kept, largest, passing, row_bound
from vesalius.dictionaries.training.codes import SparsePiece
from vesalius.dictionaries.training.products import dots, linear

ROUNDING = 2.0**-8
"""Twice the relative error of rounding to bfloat16."""
_SUMMING = 2.0**-23
"""Relative error per summand of two sums in float32, the rough one and the exact one."""
_MOST = 8
"""A piece in which more than one entry in _MOST passes the screen is computed in float32 at once."""


@dataclass(frozen=True)
class Screen:
    """An encoder [latent, d] with its rounded copy and what the margin needs of it."""

    encoder: Tensor
    bias: Tensor
    rounded: Tensor
    norm: float
    """Largest norm of a row, of what rounding took from a row, and largest bias."""
    rest: float
    largest_bias: float

    @classmethod
    def of(cls, encoder: Tensor, bias: Tensor) -> Screen:
        """Screen of an encoder as it is now."""
        rounded = encoder.bfloat16()
        rest = (encoder - rounded).norm(dim=1).max()
        return cls(encoder, bias, rounded, float(encoder.norm(dim=1).max()), float(rest), float(bias.abs().max()))

    def rough(self, x: Tensor) -> Tensor:
        """[rows, latent] float32: pre-activations from products in bfloat16."""
        return linear(x.bfloat16(), self.rounded) + self.bias

    def margin(self, x: Tensor, level: Tensor) -> Tensor:
        """[rows]: how far an exact pre-activation near the level [rows] or [] can be from the rough one."""
        rounded = x.bfloat16().float()
        size = rounded.norm(dim=1)
        summing = _SUMMING * x.shape[1] * self.norm
        spread = (x - rounded).norm(dim=1) * self.norm + size * (self.rest + summing)
        return (1 + ROUNDING) * spread + ROUNDING * (level.abs() + self.largest_bias)

    def exact(self, x: Tensor, piece: SparsePiece) -> SparsePiece:
        """The piece with its pre-activations computed in float32."""
        pre = dots(x, self.encoder, piece.columns, piece.offsets[:-1], piece.bags) + self.bias[piece.columns]
        return SparsePiece(piece.columns, piece.offsets, pre, piece.n_latents)

    def top_of_rows(self, x: Tensor, k: int) -> SparsePiece | None:
        """The k largest of each row; None where the screen does not pay."""
        rough = self.rough(x)
        bound = row_bound(rough, k)
        if bound is None:
            return None
        level = bound - 2 * self.margin(x, bound)
        found = passing(rough, rough >= level[:, None])
        return None if _too_many(found, rough) else largest(self.exact(x, found), k)

    def above(self, x: Tensor, floor: Tensor) -> SparsePiece | None:
        """The entries above the floor, [latent] or []; None where the screen does not pay."""
        rough = self.rough(x)
        margin = self.margin(x, floor.abs().max())
        found = passing(rough, rough.add_(margin[:, None]) > floor)
        if _too_many(found, rough):
            return None
        piece = self.exact(x, found)
        return kept(piece, piece.pre > (piece.at(floor) if floor.ndim else floor))


def _too_many(piece: SparsePiece, rough: Tensor) -> bool:
    return len(piece.pre) * _MOST > rough.numel()
