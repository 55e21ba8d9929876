"""Corrections for many tests: adjusted p-values in the order given."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from vesalius.errors import InputError
from vesalius.stats.arrays import Floats, vector


def holm(p: ArrayLike) -> Floats:
    """Holm's step-down adjusted p-values `[test]`: control of the family-wise error under any dependence (1979)."""
    values = _p_values(p)
    m, order = len(values), np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * (m - np.arange(m)))
    return _restore(stepped, order)


def bh(p: ArrayLike) -> Floats:
    """Benjamini-Hochberg adjusted p-values `[test]`: false discovery rate, independent or positively dependent."""
    values = _p_values(p)
    return _step_up(values, 1.0)


def by(p: ArrayLike) -> Floats:
    """Benjamini-Yekutieli adjusted p-values `[test]`: false discovery rate under any dependence (2001, thm 1.3)."""
    values = _p_values(p)
    return _step_up(values, float(np.sum(1 / np.arange(1, len(values) + 1))))


def _step_up(values: Floats, factor: float) -> Floats:
    m, order = len(values), np.argsort(values, kind="stable")
    scaled = values[order] * m * factor / np.arange(1, m + 1)
    return _restore(np.minimum.accumulate(scaled[::-1])[::-1], order)


def _restore(adjusted: Floats, order: np.ndarray[tuple[int], np.dtype[np.intp]]) -> Floats:
    result = np.empty_like(adjusted)
    result[order] = np.minimum(adjusted, 1.0)
    return result


def _p_values(p: ArrayLike) -> Floats:
    values = vector(p, "p")
    outside = np.flatnonzero((values < 0) | (values > 1))
    if len(outside):
        raise InputError(f"p[{outside[0]}] is {values[outside[0]]}; p-values lie between 0 and 1")
    return values
