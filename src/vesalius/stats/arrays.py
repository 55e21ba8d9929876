"""Checked inputs of every statistic: finite float64 values `[example]` and group labels as integer codes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vesalius.errors import InputError, NotFiniteError

Floats = NDArray[np.float64]
Labels = Sequence[Hashable]
LARGEST = 1e150
"""Values beyond it have no square, and so no variance."""


class Interval(NamedTuple):
    """Two ends of a confidence interval, in the unit of the values."""

    low: float
    high: float


@dataclass(frozen=True)
class Groups:
    """Labels as integers: `codes [example]` in `0 .. count - 1`."""

    codes: NDArray[np.intp]
    count: int


def finite(values: ArrayLike, name: str = "values") -> Floats:
    """The values as float64, any shape. Raises NotFiniteError naming the first that is not finite or beyond 1e150."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{name} must be numbers; {error}") from error
    bad = np.argwhere(~(np.abs(array) <= LARGEST))
    if len(bad):
        index = tuple(int(i) for i in bad[0])
        where = index[0] if len(index) == 1 else index
        raise NotFiniteError(f"{name}[{where}] is {array[index]}; drop or repair that example before testing")
    return array


def vector(values: ArrayLike, name: str = "values", at_least: int = 1) -> Floats:
    """The values as a finite float64 `[example]` of at least `at_least` examples, or InputError."""
    array = finite(values, name)
    if array.ndim != 1:
        raise InputError(f"{name} must be one number per example, shape [example]; got shape {array.shape}")
    if len(array) < at_least:
        raise InputError(f"{name} holds {len(array)} example(s); at least {at_least} are needed")
    return array


def group(labels: Labels | NDArray[Any], n: int) -> Groups:
    """Integer codes of the labels, in order of first appearance. Raises InputError on a wrong length."""
    if len(labels) != n:
        raise InputError(f"{len(labels)} group labels for {n} values; give one label per example")
    seen: dict[Hashable, int] = {}
    codes = np.fromiter((seen.setdefault(label, len(seen)) for label in labels), dtype=np.intp, count=n)
    return Groups(codes, len(seen))


def at_least_two(groups: Groups) -> Groups:
    """Refuses a single group: its variance cannot be estimated."""
    if groups.count < 2:
        raise InputError(f"{groups.count} group; a clustered statistic needs at least 2 groups (add templates)")
    return groups


def group_sums(values: Floats, groups: Groups) -> Floats:
    """Sum of the values in each group, `[group]`."""
    return np.asarray(np.bincount(groups.codes, weights=values, minlength=groups.count), dtype=np.float64)


def probability(value: float, name: str) -> float:
    """A number strictly between 0 and 1, or InputError."""
    if not 0.0 < value < 1.0:
        raise InputError(f"{name} must lie strictly between 0 and 1; got {value}")
    return float(value)


def positive_draws(draws: int) -> int:
    """At least one draw, or InputError."""
    if draws < 1:
        raise InputError(f"draws must be at least 1; got {draws}")
    return int(draws)
