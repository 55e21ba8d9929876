"""B-splines by the recursion of Cox and de Boor (de Boor 1978, A Practical Guide to Splines, chapter IX)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.errors import InputError

DEGREE = 3
"""Cubic: the curve and its slope and bend have no jumps."""


def uniform_knots(
    low: Float[Tensor, " column"], high: Float[Tensor, " column"], intervals: int, degree: int = DEGREE
) -> Float[Tensor, "column knot"]:
    """Evenly spaced knots with `intervals` steps from low to high, and `degree` more of them on either side.

    Raises InputError for no interval, and for a column whose low is not under its high.
    """
    if intervals < 1:
        raise InputError(f"a spline needs at least one interval; got {intervals}")
    if not bool((high > low).all()):
        column = int((high <= low).nonzero()[0])
        raise InputError(f"column {column} runs from {float(low[column])} to {float(high[column])}: nothing to bend on")
    step = (high - low) / intervals
    numbers = torch.arange(-degree, intervals + degree + 1, device=low.device)
    return low[:, None] + step[:, None] * numbers.to(low)


def b_splines(
    values: Float[Tensor, "row column"], knots: Float[Tensor, "column knot"], degree: int = DEGREE
) -> Float[Tensor, "row column basis"]:
    """Every basis function of every column at these values; `knot - degree - 1` of them, which sum to 1 between the
    inner knots. Values beyond the outermost inner knots count as lying on them: a curve goes on flat."""
    low, high = knots[:, degree], knots[:, -degree - 1]
    # A hair inside, since the last interval is open at its end.
    inside = torch.minimum(torch.maximum(values, low), high - (high - low) * 1e-6)[..., None]
    found = ((inside >= knots[:, :-1]) & (inside < knots[:, 1:])).to(values)
    for order in range(1, degree + 1):
        rise = (inside - knots[:, : -order - 1]) / (knots[:, order:-1] - knots[:, : -order - 1])
        fall = (knots[:, order + 1 :] - inside) / (knots[:, order + 1 :] - knots[:, 1:-order])
        found = rise * found[..., :-1] + fall * found[..., 1:]
    return found
