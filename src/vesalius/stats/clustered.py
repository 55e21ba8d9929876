"""Student's t for values that come in groups: one-way and two-way clustered, equivalence, planning.

Prompts written from one template are not independent (an intraclass correlation of .4 is common), so an ordinary
t interval is far too narrow. The variance of the mean is computed from sums of residuals per group instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from vesalius.errors import InputError
from vesalius.stats.arrays import Floats, Groups, Labels, at_least_two, group, group_sums, probability, vector

_LARGEST_N = 10**12


@dataclass(frozen=True)
class TTest:
    """A t-test of the mean of per-example values against a null value, with its interval.

    `p_greater` is the p-value of H0: mean <= null (small when the mean is larger), `p_less` of H0: mean >= null.
    `n_groups` is the number of groups of the clustering with the fewest; without clusters it is n.
    """

    estimate: float
    se: float
    df: float
    t: float
    p_greater: float
    p_less: float
    p_two_sided: float
    low: float
    high: float
    n: int
    n_groups: int


def clustered_t(values: ArrayLike, *clusters: Labels, null: float = 0.0, level: float = 0.95) -> TTest:
    """t-test of mean(values) against `null`, with a variance that respects up to two clusterings.

    values `[example]`; each of `clusters` one label per example.

    - no clusters: the ordinary one-sample t, df = n - 1.
    - one: cluster-robust with the small-sample factor G/(G-1) (CR1; Cameron & Miller 2015, sec. VI.B), df = G - 1.
      With balanced groups this is the t-test of the G group means.
    - two: V1 + V2 - V12 (Cameron, Gelbach & Miller 2011, eq. 2.11), never below the larger of V1 and V2,
      df = min(G) - 1.

    Degenerate variances: constant values have se = 0, an interval of one point and p-values of 0 or 1 by the side of
    the null on which they lie (both 1 when they equal it). Values that vary although all group sums agree would give a
    clustered variance of exactly 0; the variance for independent values is used instead.

    Raises InputError with fewer than 2 values, fewer than 2 groups or more than 2 clusterings; NotFiniteError.
    """
    x = vector(values, at_least=2)
    probability(level, "level")
    groups = _groups(clusters, len(x))
    estimate = float(x.mean())
    smallest = min(g.count for g in groups)
    if _constant(x):
        return _constant_test(estimate, null, len(x), smallest)
    se = math.sqrt(_variance(x, groups))
    return _test(estimate, se, null, level, len(x), smallest)


def tost(values: ArrayLike, delta: float, *clusters: Labels) -> float:
    """p-value of H0: |mean| >= delta: the larger of two one-sided clustered t-tests (Schuirmann 1987).

    A small p says that the mean lies within +-delta. values `[example]`, delta > 0 in their unit. Raises InputError.
    """
    if not delta > 0:
        raise InputError(f"delta must be positive; got {delta}")
    above = clustered_t(values, *clusters, null=-delta).p_greater
    below = clustered_t(values, *clusters, null=delta).p_less
    return max(above, below)


def n_to_decide(
    values: ArrayLike, *clusters: Labels, null: float = 0.0, alpha: float = 0.05, power: float = 0.8
) -> float:
    """Smallest n at which the one-sided t-test of mean > null reaches `power`, if the effect is the observed one.

    The variance per example includes the observed design effect; groups are assumed to be added at the observed size,
    so that df grows with n (noncentral t). Returns math.inf when the estimate lies on the wrong side of null.
    Raises InputError as `clustered_t`.
    """
    probability(alpha, "alpha")
    probability(power, "power")
    test = clustered_t(values, *clusters, null=null)
    effect = test.estimate - null
    if effect <= 0:
        return math.inf
    smallest = math.ceil(2 * test.n / test.n_groups)  # two groups: below that there is no test
    if test.se == 0:
        return float(smallest)
    return _first_n(effect / (test.se * math.sqrt(test.n)), test.n_groups / test.n, alpha, power, smallest)


def groups_to_decide(effect: float, *, alpha: float = 0.05, power: float = 0.8) -> int:
    """Smallest number of independent groups at which the one-sided t-test reaches `power`.

    effect: how far the mean lies beyond the null, in standard deviations between groups. Raises InputError for one that
    is not positive.
    """
    probability(alpha, "alpha")
    probability(power, "power")
    if not effect > 0:
        raise InputError(f"effect must be positive; got {effect}")
    return int(_first_n(effect, 1.0, alpha, power, 2))


def intraclass_correlation(values: ArrayLike, groups: Labels) -> float:
    """Share of variance between groups: (MSB - MSW) / (MSB + (n0 - 1) MSW), the one-way random ANOVA estimator.

    n0 is the effective group size of an unbalanced design (Donner 1986, eq. 2). Can be slightly negative; it is not
    clipped. Raises InputError for fewer than 2 groups, no group of 2, or values that do not vary.
    """
    x = vector(values, at_least=2)
    g = at_least_two(group(groups, len(x)))
    sizes = np.bincount(g.codes, minlength=g.count)
    if g.count == len(x) or _constant(x):
        raise InputError("an intraclass correlation needs values that vary and a group of at least 2 examples")
    means = group_sums(x, g) / sizes
    between = float(np.sum(sizes * (means - x.mean()) ** 2)) / (g.count - 1)
    within = float(np.sum((x - means[g.codes]) ** 2)) / (len(x) - g.count)
    size = (len(x) - float(np.sum(sizes**2)) / len(x)) / (g.count - 1)
    return (between - within) / (between + (size - 1) * within)


def _groups(clusters: tuple[Labels, ...], n: int) -> tuple[Groups, ...]:
    if len(clusters) > 2:
        raise InputError(f"{len(clusters)} clusterings given; at most 2 are supported (template and names)")
    if not clusters:
        return (Groups(np.arange(n), n),)
    return tuple(at_least_two(group(labels, n)) for labels in clusters)


def _constant(x: Floats) -> bool:
    return float(np.ptp(x)) <= 8 * float(np.finfo(np.float64).eps) * float(np.abs(x).max())


def _variance(x: Floats, groups: tuple[Groups, ...]) -> float:
    residuals = x - x.mean()
    parts = [_one_way(residuals, g) for g in groups]
    variance = max(parts)
    if len(groups) == 2:
        variance = max(variance, sum(parts) - _one_way(residuals, _intersection(*groups)))
    independent = float(residuals @ residuals) / (len(x) * (len(x) - 1))
    return variance if variance > 1e-20 * independent else independent


def _one_way(residuals: Floats, groups: Groups) -> float:
    sums = group_sums(residuals, groups)
    return float(sums @ sums) / len(residuals) ** 2 * groups.count / (groups.count - 1)


def _intersection(first: Groups, second: Groups) -> Groups:
    cells, codes = np.unique(first.codes * second.count + second.codes, return_inverse=True)
    # One cell would mean that both clusterings have one group, which was refused before.
    return Groups(codes, len(cells))


def _constant_test(estimate: float, null: float, n: int, n_groups: int) -> TTest:
    side = 0.0 if math.isclose(estimate, null, rel_tol=1e-12) else math.copysign(1.0, estimate - null)
    t = side * math.inf if side else 0.0
    greater, less, both = float(side <= 0), float(side >= 0), float(side == 0)
    return TTest(estimate, 0.0, n_groups - 1.0, t, greater, less, both, estimate, estimate, n, n_groups)


def _test(estimate: float, se: float, null: float, level: float, n: int, n_groups: int) -> TTest:
    df = n_groups - 1.0
    t = (estimate - null) / se
    greater, less = float(special.stdtr(df, -t)), float(special.stdtr(df, t))
    half = float(special.stdtrit(df, 0.5 + level / 2)) * se
    both = min(1.0, 2 * min(greater, less))
    return TTest(estimate, se, df, t, greater, less, both, estimate - half, estimate + half, n, n_groups)


def _power(n: float, effect: float, groups_per_example: float, alpha: float) -> float:
    df = max(1.0, n * groups_per_example - 1)
    critical = float(special.stdtrit(df, 1 - alpha))
    shift = effect * math.sqrt(n)
    # Beyond this the power is 1 to double precision, and the noncentral t is slow and fragile.
    return 1.0 if shift > critical + 40 else 1 - float(special.nctdtr(df, shift, critical))


def _first_n(effect: float, groups_per_example: float, alpha: float, power: float, smallest: int) -> float:
    low, high = smallest - 1, smallest
    while _power(high, effect, groups_per_example, alpha) < power:
        low, high = high, 2 * high
        if high > _LARGEST_N:
            return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _power(middle, effect, groups_per_example, alpha) >= power else (middle, high)
    return float(high)
