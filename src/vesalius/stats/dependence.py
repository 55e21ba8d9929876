"""Are two variables independent? A kernel test that sees more than correlation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from vesalius.errors import InputError
from vesalius.stats.arrays import Floats, finite, positive_draws


@dataclass(frozen=True)
class IndependenceTest:
    """The biased HSIC estimate and its permutation p-value (small: the variables depend on each other)."""

    statistic: float
    p: float
    draws: int


def hsic_test(x: ArrayLike, y: ArrayLike, draws: int = 999, seed: int = 0) -> IndependenceTest:
    """Permutation test of H0: x and y are independent, by the Hilbert-Schmidt criterion (Gretton et al. 2007, eq. 4).

    x `[example]` or `[example, dim]`, y likewise. Gaussian kernels; the bandwidth is the median of the non-zero
    distances of EACH variable (never across the two). p = (b + 1) / (B + 1). A constant is independent of everything:
    statistic 0, p 1. Raises InputError for fewer than 4 or unequal numbers of examples.
    """
    first, second = _table(x, "x"), _table(y, "y")
    if len(first) != len(second) or len(first) < 4:
        raise InputError(f"x has {len(first)} and y {len(second)} examples; need the same number, at least 4")
    k, kernel = _centred(_gaussian(first)), _gaussian(second)
    observed = float(np.vdot(k, kernel))
    if not np.any(np.ptp(first, axis=0)) or not np.any(np.ptp(second, axis=0)):
        return IndependenceTest(0.0, 1.0, positive_draws(draws))
    rng, n = np.random.default_rng(seed), len(first)
    orders = (rng.permutation(n) for _ in range(positive_draws(draws)))
    null = np.array([np.vdot(k, kernel[np.ix_(order, order)]) for order in orders])
    beyond = int(np.count_nonzero(null >= observed * (1 - 1e-12)))
    return IndependenceTest(observed / n**2, (beyond + 1) / (draws + 1), draws)


def _table(values: ArrayLike, name: str) -> Floats:
    array = finite(values, name)
    if array.ndim not in (1, 2):
        raise InputError(f"{name} must have shape [example] or [example, dim]; got {array.shape}")
    return array.reshape(len(array), -1)


def _gaussian(points: Floats) -> Floats:
    squared = np.sum((points[:, None, :] - points[None, :, :]) ** 2, axis=-1)
    apart = squared[squared > 0]
    # Ties are dropped from the median: half the scores being equal would give a bandwidth of 0.
    bandwidth = float(np.median(apart)) if len(apart) else 1.0
    return np.exp(-squared / (2 * bandwidth))


def _centred(kernel: Floats) -> Floats:
    return kernel - kernel.mean(axis=0) - kernel.mean(axis=1)[:, None] + kernel.mean()
