"""Are two variables independent? A kernel test that sees more than correlation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from vesalius.errors import InputError
from vesalius.stats.arrays import Floats, Groups, Labels, finite, group, positive_draws


@dataclass(frozen=True)
class IndependenceTest:
    """The biased HSIC estimate and its permutation p-value (small: the variables depend on each other)."""

    statistic: float
    p: float
    draws: int


def hsic_test(
    x: ArrayLike, y: ArrayLike, clusters: Labels | None = None, draws: int = 999, seed: int = 0
) -> IndependenceTest:
    """Permutation test of H0: x and y are independent, by the Hilbert-Schmidt criterion (Gretton et al. 2007, eq. 4).

    x `[example]` or `[example, dim]`, y likewise. Gaussian kernels; the bandwidth is the median of the non-zero
    distances of EACH variable (never across the two). p = (b + 1) / (B + 1).

    clusters: one label per example. Examples of a cluster are not exchangeable, so that whole clusters are permuted:
    the kernels are averaged over pairs of clusters, and the statistic is that of the clusters without a cluster's
    kernel with itself, which depends on its size. What happens within clusters is then not seen.

    Raises InputError for fewer than 4 or unequal numbers of examples or clusters, for a variable that is constant and
    for one whose distances can't be computed with; NotFiniteError.
    """
    first, second = _table(x, "x"), _table(y, "y")
    if len(first) != len(second) or len(first) < 4:
        raise InputError(f"x has {len(first)} and y {len(second)} examples; need the same number, at least 4")
    kernels = _gaussian(first, "x"), _gaussian(second, "y")
    if clusters is not None:
        of = group(clusters, len(first))
        if of.count < 4:
            raise InputError(f"{of.count} clusters; at least 4 are needed to permute them")
        kernels = _between(kernels[0], of), _between(kernels[1], of)
    k, kernel = _centred(kernels[0]), kernels[1]
    if clusters is not None:
        np.fill_diagonal(k, 0.0)
    observed = float(np.vdot(k, kernel))
    rng, n = np.random.default_rng(seed), len(k)
    orders = (rng.permutation(n) for _ in range(positive_draws(draws)))
    null = np.array([np.vdot(k, kernel[np.ix_(order, order)]) for order in orders])
    beyond = int(np.count_nonzero(null >= observed - 1e-12 * abs(observed)))
    return IndependenceTest(observed / n**2, (beyond + 1) / (draws + 1), draws)


def _table(values: ArrayLike, name: str) -> Floats:
    array = finite(values, name)
    if array.ndim not in (1, 2):
        raise InputError(f"{name} must have shape [example] or [example, dim]; got {array.shape}")
    return array.reshape(len(array), -1)


def _gaussian(points: Floats, name: str) -> Floats:
    if not np.any(np.ptp(points, axis=0)):
        raise InputError(f"{name} is constant; whether it depends on anything can't be asked of these examples")
    with np.errstate(over="ignore", invalid="ignore"):
        squared = np.sum((points[:, None, :] - points[None, :, :]) ** 2, axis=-1)
    apart = squared[squared > 0]
    # Ties are dropped from the median: half the scores being equal would give a bandwidth of 0.
    bandwidth = float(np.median(apart)) if len(apart) else 0.0
    if not (np.isfinite(squared).all() and 0 < 2 * bandwidth < np.inf):
        raise InputError(f"distances in {name} are too large or too small to be squared; rescale it (say, z-scores)")
    return np.exp(-squared / (2 * bandwidth))


def _between(kernel: Floats, of: Groups) -> Floats:
    """Mean kernel of different clusters, `[cluster, cluster]`; on the diagonal the mean of the others in its row."""
    means = np.zeros((of.count, len(of.codes)))
    means[of.codes, np.arange(len(of.codes))] = 1 / np.bincount(of.codes)[of.codes]
    table = means @ kernel @ means.T
    np.fill_diagonal(table, 0.0)
    np.fill_diagonal(table, table.sum(1) / (of.count - 1))
    return np.asarray(table)


def _centred(kernel: Floats) -> Floats:
    return kernel - kernel.mean(axis=0) - kernel.mean(axis=1)[:, None] + kernel.mean()
