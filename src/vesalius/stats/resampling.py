"""Tests and intervals by resampling: wild bootstrap, sign flips, permutations, ranks, bootstrap intervals.

Monte Carlo p-values are (b + 1) / (B + 1), never 0 (Phipson & Smyth 2010); an exact enumeration contains the observed
arrangement, so that its p-value is b / B.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from vesalius.errors import InputError, UnknownNameError
from vesalius.stats.arrays import (
    Floats,
    Groups,
    Interval,
    Labels,
    at_least_two,
    finite,
    group,
    group_sums,
    positive_draws,
    probability,
    vector,
)

_WEBB = np.sqrt(np.array([0.5, 1.0, 1.5]))
_WEBB_UP_TO = 12  # groups; with so few, Rademacher weights give too coarse a set of p-values (Webb 2014)
FEWEST_GROUPS = 6
"""Of fewer groups no interval is stated: their spread is too uncertain."""
_STUDENTISED_UP_TO = 40  # groups; beyond, the bootstrap and the t interval agree well enough
Statistic = Callable[[Floats], float]


@dataclass(frozen=True)
class ResamplingTest:
    """p-values of a resampling test. `exact` says that every arrangement was enumerated."""

    statistic: float
    p_greater: float
    p_less: float
    p_two_sided: float
    draws: int
    exact: bool


def wild_bootstrap(
    values: ArrayLike, clusters: Labels, null: float = 0.0, draws: int = 9999, seed: int = 0
) -> ResamplingTest:
    """Wild cluster bootstrap-t of H0: mean = null, null imposed (Cameron, Gelbach & Miller 2008, sec. III).

    values and clusters `[example]`. Webb's six-point weights up to 12 groups, Rademacher above; Rademacher weights are
    enumerated when 2^G <= draws. The statistic is the clustered t. Raises InputError for fewer than 2 groups.
    """
    x = vector(values, at_least=2) - null
    g = at_least_two(group(clusters, len(x)))
    sums, sizes = group_sums(x, g), np.bincount(g.codes, minlength=g.count).astype(np.float64)
    weights, exact = _wild_weights(g.count, positive_draws(draws), np.random.default_rng(seed))
    observed = float(_bootstrap_t(sums[None, :], sizes)[0])
    return _test(observed, _bootstrap_t(weights * sums, sizes), exact)


def sign_flip_test(
    values: ArrayLike, clusters: Labels | None = None, null: float = 0.0, draws: int = 9999, seed: int = 0
) -> ResamplingTest:
    """Sign-flip test of H0: values are symmetric about null; whole clusters flip together.

    values `[example]`. The statistic is the mean minus null. Enumerates all 2^G flips when 2^G <= draws.
    """
    x = vector(values) - null
    sums = x if clusters is None else group_sums(x, group(clusters, len(x)))
    signs, exact = _signs(len(sums), positive_draws(draws), np.random.default_rng(seed))
    return _test(float(x.mean()), signs @ sums / len(x), exact)


def permutation_test(a: ArrayLike, b: ArrayLike, draws: int = 9999, seed: int = 0) -> ResamplingTest:
    """Permutation test of H0: a `[n_a]` and b `[n_b]` are exchangeable; the statistic is mean(a) - mean(b).

    Enumerates all splits when there are at most `draws`.
    """
    first, second = vector(a, "a"), vector(b, "b")
    pooled, size = np.concatenate([first, second]), len(first)
    chosen, exact = _subsets(len(pooled), size, positive_draws(draws), np.random.default_rng(seed))
    sums = pooled[chosen].sum(axis=1)
    means = sums / size - (pooled.sum() - sums) / len(second)
    return _test(float(first.mean() - second.mean()), means, exact)


def rank_p(observed: float, draws: ArrayLike) -> float:
    """One-sided p-value of `observed` among null draws `[draw]`: (1 + #{draw >= observed}) / (draws + 1)."""
    null = vector(draws, "draws")
    return float(1 + np.count_nonzero(null >= finite(observed, "observed"))) / (len(null) + 1)


def draws_needed(m_claims: int, alpha: float = 0.05) -> int:
    """Smallest number of draws with which `rank_p` can reach alpha / m_claims."""
    probability(alpha, "alpha")
    if m_claims < 1:
        raise InputError(f"m_claims must be at least 1; got {m_claims}")
    return math.ceil(m_claims / alpha * (1 - 1e-12)) - 1


def max_t(
    values: ArrayLike,
    clusters: Labels | None = None,
    alternative: Literal["two-sided", "greater", "less"] = "two-sided",
    draws: int = 9999,
    seed: int = 0,
) -> Floats:
    """Family-wise adjusted p-values `[test]`: single-step max-T over sign flips (Westfall & Young 1993, alg. 2.5).

    values `[example, test]`: column j holds the per-example effects of test j, with H0 symmetric about 0. Examples (or
    clusters) flip together for all tests, so that the dependence between tests is kept. A column of zeros has p = 1.
    """
    table = finite(values)
    if table.ndim != 2 or 0 in table.shape:
        raise InputError(f"values must have shape [example, test] and not be empty; got {table.shape}")
    studentised = _studentised(table, clusters)
    signs, exact = _signs(len(studentised), positive_draws(draws), np.random.default_rng(seed))
    observed = _tail(studentised.sum(axis=0), alternative)
    largest = np.sort(_tail(signs @ studentised, alternative).max(axis=1))
    beyond = len(largest) - np.searchsorted(largest, observed - 1e-9)
    return beyond / len(largest) if exact else (beyond + 1) / (len(largest) + 1)


def bootstrap_interval(
    values: ArrayLike,
    clusters: Labels | None = None,
    statistic: Statistic | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    method: Literal["bca", "percentile"] = "bca",
) -> Interval:
    """Bootstrap interval of a statistic (default: the mean), resampling examples or whole clusters.

    values `[example]`, or `[example, column]` for a statistic of several columns such as a ratio of means. BCa is bias
    corrected and accelerated by the jackknife over clusters (Efron 1987, sec. 2-6). Raises InputError for fewer than 2
    groups, UnknownNameError for another method.
    """
    x = finite(values)
    if method not in ("bca", "percentile"):
        raise UnknownNameError("bootstrap method", method, ["bca", "percentile"])
    if x.ndim == 0 or (x.ndim > 1 and statistic is None):
        raise InputError(f"the mean needs values of shape [example]; got {x.shape} (pass statistic= for columns)")
    g = at_least_two(group(range(len(x)) if clusters is None else clusters, len(x)))
    tails = np.array([0.5 - probability(level, "level") / 2, 0.5 + level / 2])
    whole, replicates, jackknife = _replicates(x, g, statistic, positive_draws(draws), np.random.default_rng(seed))
    if method == "bca":
        tails = _bca(tails, whole, replicates, jackknife)
    low, high = np.quantile(replicates, tails)
    return Interval(float(low), float(high))


def bootstrap_of_sums(
    sums: ArrayLike,
    statistic: Callable[[Floats], Floats],
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    method: Literal["bca", "percentile"] = "bca",
) -> Interval:
    """Bootstrap interval of a statistic of column totals, resampling groups.

    sums: [group, column], each group's totals. statistic: [..., column] totals to [...], over any leading axes. It is
    `bootstrap_interval` with the groups as examples and the statistic of summed columns, draw for draw, without adding
    them up anew in every draw. Raises InputError for fewer than 2 groups, NotFiniteError.
    """
    x = finite(sums, "sums")
    if method not in ("bca", "percentile"):
        raise UnknownNameError("bootstrap method", method, ["bca", "percentile"])
    if x.ndim != 2 or len(x) < 2:
        raise InputError(f"sums must be [group, column] of at least 2 groups; got {x.shape}")
    n, rng = len(x), np.random.default_rng(seed)
    picks = rng.integers(0, n, (positive_draws(draws), n))
    times = np.stack([np.bincount(pick, minlength=n) for pick in picks]).astype(np.float64)
    replicates = finite(statistic(times @ x), "bootstrap replicate")
    tails = np.array([0.5 - probability(level, "level") / 2, 0.5 + level / 2])
    if method == "bca":
        whole = float(statistic(x.sum(0)))
        tails = _bca(tails, whole, replicates, finite(statistic(x.sum(0) - x), "jackknife value"))
    low, high = np.quantile(replicates, tails)
    return Interval(float(low), float(high))


def interval_of_sums(
    sums: ArrayLike,
    statistic: Callable[[Floats], Floats],
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    method: Literal["bca", "percentile"] = "bca",
) -> Interval:
    """`bootstrap_of_sums`, widened where groups are few: a bootstrap of 6 to 12 groups covers .82 to .88 at .95.

    The union with the jackknife's t interval on G - 1 degrees of freedom, and, with method "bca" and up to 40 groups,
    with the bootstrap-t (Efron & Tibshirani 1993, sec. 12.5), which follows skewness. Raises InputError for fewer than
    6 groups, otherwise as `bootstrap_of_sums`.
    """
    x = finite(sums, "sums")
    if x.ndim == 2 and len(x) < FEWEST_GROUPS:
        raise InputError(f"{len(x)} groups are too few for an interval; at least {FEWEST_GROUPS} are needed")
    found = [bootstrap_of_sums(x, statistic, level=level, draws=draws, seed=seed, method=method)]
    whole, spread = float(statistic(x.sum(0))), _jackknife_se(x, np.ones((1, len(x))), statistic)[0]
    tails = np.array([0.5 - level / 2, 0.5 + level / 2])
    if spread > 0:
        found.append(Interval(*(whole + special.stdtrit(len(x) - 1, tails) * spread).tolist()))
    if spread > 0 and method == "bca" and len(x) <= _STUDENTISED_UP_TO:
        t = _studentised_draws(x, statistic, whole, draws, seed)
        if len(t):
            found.append(Interval(*(whole - np.quantile(t, tails[::-1]) * spread).tolist()))
    return Interval(min(low for low, _ in found), max(high for _, high in found))


def _studentised_draws(x: Floats, statistic: Callable[[Floats], Floats], whole: float, draws: int, seed: int) -> Floats:
    """Distance of resampled statistics from the whole one in standard errors of their own, where these are defined."""
    picks = np.random.default_rng(seed).integers(0, len(x), (draws, len(x)))
    times = np.stack([np.bincount(pick, minlength=len(x)) for pick in picks]).astype(np.float64)
    parts = np.array_split(times, max(1, times.size * x.shape[1] // 2_000_000))
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.concatenate([(statistic(p @ x) - whole) / _jackknife_se(x, p, statistic) for p in parts])
    return np.asarray(t[np.isfinite(t)])


def _jackknife_se(x: Floats, times: Floats, statistic: Callable[[Floats], Floats]) -> Floats:
    """Jackknife standard errors `[draw]` of samples that hold each group `times [draw, group]`."""
    n = len(x)
    with np.errstate(divide="ignore", invalid="ignore"):
        without = statistic((times @ x)[:, None] - x)
        without = np.where(times > 0, without, 0.0)
        away = without - (times * without).sum(1, keepdims=True) / n
        return np.asarray(np.sqrt((n - 1) / n * (times * away**2).sum(1)))


def _signs(n: int, draws: int, rng: np.random.Generator) -> tuple[Floats, bool]:
    if n < 63 and 2**n <= draws:
        bits = np.arange(2**n)[:, None] >> np.arange(n) & 1
        return np.where(bits == 1, -1.0, 1.0), True
    return np.where(rng.integers(0, 2, (draws, n)) == 1, -1.0, 1.0), False


def _wild_weights(n: int, draws: int, rng: np.random.Generator) -> tuple[Floats, bool]:
    if n > _WEBB_UP_TO:
        return _signs(n, draws, rng)
    return np.concatenate([-_WEBB, _WEBB])[rng.integers(0, 6, (draws, n))], False


def _bootstrap_t(sums: Floats, sizes: Floats) -> Floats:
    """Clustered t `[draw]` from sums per group `[draw, group]`, for the null value 0."""
    n, groups = sizes.sum(), len(sizes)
    means = sums.sum(axis=1) / n
    scores = sums - means[:, None] * sizes
    se = np.sqrt(np.einsum("dg,dg->d", scores, scores) * groups / (groups - 1)) / n
    flat = se <= 1e-14 * np.abs(sums).max(axis=1) / n
    sided = np.where(means == 0, 0.0, np.copysign(np.inf, means))
    return np.where(flat, sided, means / np.where(flat, 1.0, se))


def _subsets(n: int, size: int, draws: int, rng: np.random.Generator) -> tuple[NDArray[np.intp], bool]:
    if math.comb(n, size) <= draws:
        return np.array(list(itertools.combinations(range(n), size)), dtype=np.intp), True
    return np.argsort(rng.random((draws, n)), axis=1)[:, :size], False


def _test(observed: float, null: Floats, exact: bool) -> ResamplingTest:
    greater = _p(null, observed, exact)
    less = _p(-null, -observed, exact)
    both = _p(np.abs(null), abs(observed), exact)
    return ResamplingTest(observed, greater, less, both, len(null), exact)


def _p(null: Floats, observed: float, exact: bool) -> float:
    # Arrangements that tie with the observed one differ from it by rounding, and must count.
    slack = 1e-10 * abs(observed) if math.isfinite(observed) else 0.0
    beyond = int(np.count_nonzero(null >= observed - slack))
    return beyond / len(null) if exact else (beyond + 1) / (len(null) + 1)


def _studentised(table: Floats, clusters: Labels | None) -> Floats:
    sums = table
    if clusters is not None:
        g = group(clusters, len(table))
        sums = np.stack([group_sums(column, g) for column in table.T], axis=1)
    # Flips leave the sum of squares as it is, so that dividing by it once ranks draws exactly as t would.
    norms = np.sqrt(np.sum(sums**2, axis=0))
    return sums / np.where(norms > 0, norms, 1.0)


def _tail(statistics: Floats, alternative: str) -> Floats:
    known = {"two-sided": np.abs, "greater": np.positive, "less": np.negative}
    if alternative not in known:
        raise UnknownNameError("alternative", alternative, known)
    return np.asarray(known[alternative](statistics))


def _replicates(
    x: Floats, g: Groups, statistic: Statistic | None, draws: int, rng: np.random.Generator
) -> tuple[float, Floats, Floats]:
    picks = rng.integers(0, g.count, (draws, g.count))
    if statistic is None:
        sums, sizes = group_sums(x, g), np.bincount(g.codes, minlength=g.count)
        left_out = (sums.sum() - sums) / (len(x) - sizes)
        return float(x.mean()), sums[picks].sum(axis=1) / sizes[picks].sum(axis=1), left_out
    order = np.argsort(g.codes, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(g.codes))[:-1])
    drawn = np.array([statistic(x[np.concatenate([members[i] for i in pick])]) for pick in picks])
    left_out = np.array([statistic(x[g.codes != i]) for i in range(g.count)])
    return float(statistic(x)), finite(drawn, "bootstrap replicate"), finite(left_out, "jackknife value")


def _bca(tails: Floats, whole: float, replicates: Floats, jackknife: Floats) -> Floats:
    below = np.count_nonzero(replicates < whole) + 0.5 * np.count_nonzero(replicates == whole)
    share = np.clip(below / len(replicates), 0.5 / len(replicates), 1 - 0.5 / len(replicates))
    bias, z = special.ndtri(share), special.ndtri(tails)
    away = jackknife.mean() - jackknife
    spread = float(np.sum(away**2)) ** 1.5
    acceleration = float(np.sum(away**3)) / (6 * spread) if spread > 0 else 0.0
    return np.asarray(special.ndtr(bias + (bias + z) / (1 - acceleration * (bias + z))))
