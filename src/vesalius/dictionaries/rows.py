"""Dictionaries that normalise each row of activations before encoding, and undo it after decoding.

`layer_norm` subtracts the row's mean and divides by its standard deviation (Gao et al. 2024, A.1; OpenAI's and some
SAELens dictionaries). `constant_norm` gives each row the norm sqrt(width) (SAELens).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vesalius.errors import UnknownNameError

ROW_NORMS = ("none", "layer_norm", "constant_norm")
# What both libraries add to the standard deviation. It is not added back when the norm is undone; nor is it here.
_EPS = 1e-5
_TINY = 1e-30


@dataclass(frozen=True)
class Units:
    """What undoes the normalising of rows: times size, plus centre."""

    size: Tensor | float = 1.0
    """[..., 1] per row."""
    centre: Tensor | float = 0.0
    """[..., 1] per row."""

    def restored(self, rows: Tensor) -> Tensor:
        """Rows in the units of the activations."""
        return rows if isinstance(self.size, float) else rows * self.size + self.centre

    def cut(self, lead: Sequence[int]) -> Units:
        """The same for rows of another leading shape."""
        if isinstance(self.size, float):
            return self
        centre = self.centre.reshape(*lead, 1) if isinstance(self.centre, Tensor) else self.centre
        return Units(self.size.reshape(*lead, 1), centre)


def check_row_norm(name: str) -> None:
    """Raises UnknownNameError listing the known ways."""
    if name not in ROW_NORMS:
        raise UnknownNameError("way to normalise rows", name, ROW_NORMS)


def normalised(rows: Tensor, row_norm: str) -> tuple[Tensor, Units]:
    """Rows [..., width] normalised, and what undoes it."""
    if row_norm == "none":
        return rows, Units()
    if row_norm == "constant_norm":
        size = rows.norm(dim=-1, keepdim=True).clamp(min=_TINY) / rows.shape[-1] ** 0.5
        return rows / size, Units(size)
    centre = rows.mean(-1, keepdim=True)
    centred = rows - centre
    size = centred.std(-1, keepdim=True)
    return centred / (size + _EPS), Units(size, centre)


def all_normalised(rows: Sequence[Tensor], row_norm: str) -> tuple[list[Tensor], list[Units]]:
    """`normalised` for the rows of every site."""
    pairs = [normalised(tensor, row_norm) for tensor in rows]
    return [values for values, _ in pairs], [units for _, units in pairs]
