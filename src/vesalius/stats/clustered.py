"""Student's t for values that come in groups: one-way and two-way clustered, equivalence, planning.

Prompts written from one template are not independent (an intraclass correlation of .4 is common), so an ordinary
t interval is far too narrow. What is estimated is the mean over groups of the first clustering, each counting once
(`stats.design`); the variance respects every clustering.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from vesalius.errors import InputError
from vesalius.stats.arrays import Floats, Labels, at_least_two, finite, group, group_sums, probability, vector
from vesalius.stats.design import Design, design
from vesalius.stats.skewed import critical_t, skewed_p, smallest_p

_LARGEST_N = 10**12


@dataclass(frozen=True)
class TTest:
    """A t-test of the mean over groups against a null value, with its interval.

    `p_greater` is the p-value of H0: mean <= null (small when the mean is larger), `p_less` of H0: mean >= null; none
    is below 2^-effective_groups. `n_groups` is the number of groups of the clustering with the fewest; without clusters
    it is n. `effective_groups` is df + 1: how many independent groups, all alike, would be as sure.
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
    effective_groups: float

    @property
    def p_greater_skewed(self) -> float:
        """`p_greater` that holds for skewed groups as well; see `stats.skewed`."""
        return self.p_greater if self.se == 0 else float(skewed_p(self.t, self.effective_groups))

    @property
    def p_less_skewed(self) -> float:
        """`p_less` that holds for skewed groups as well."""
        return self.p_less if self.se == 0 else float(skewed_p(-self.t, self.effective_groups))


@dataclass(frozen=True)
class Means:
    """Means over groups of many variables on the same examples, with standard errors, both `[variable]`."""

    estimate: Floats
    se: Floats
    df: float
    effective_groups: float

    def t(self, null: float = 0.0) -> Floats:
        """Distance from null in standard errors: 0 at null, and infinite where values that don't vary miss it."""
        away = np.where(np.isclose(self.estimate, null, rtol=1e-12, atol=0.0), 0.0, self.estimate - null)
        sided = np.where(away == 0, 0.0, np.copysign(np.inf, away))
        return np.where(self.se > 0, away / np.where(self.se > 0, self.se, 1.0), sided)

    def interval(self, level: float = 0.95) -> tuple[Floats, Floats]:
        """Both ends of each t interval."""
        half = float(special.stdtrit(self.df, 0.5 + probability(level, "level") / 2)) * self.se
        return self.estimate - half, self.estimate + half

    @property
    def p_two_sided(self) -> Floats:
        """Student's p-values of H0: mean = 0."""
        return np.asarray(2 * special.stdtr(self.df, -np.abs(self.t())))


def group_mean(values: ArrayLike, labels: Labels | None = None) -> float:
    """Mean of values `[example]` over groups, each counting once: what `clustered_t` estimates. One group will do."""
    x = vector(values)
    if labels is None:
        return float(x.mean())
    g = group(labels, len(x))
    return float((group_sums(x, g) / np.bincount(g.codes)).mean())


def clustered_means(values: ArrayLike, *clusters: Labels) -> Means:
    """`clustered_t` of many variables at once. values: `[variable, example]`. Raises InputError, NotFiniteError."""
    table = finite(values)
    if table.ndim != 2 or table.shape[1] < 2:
        raise InputError(f"values must be [variable, example] of at least 2 examples; got {table.shape}")
    how = design(clusters, table.shape[1])
    constant = np.ptp(table, axis=1) <= 8 * np.finfo(np.float64).eps * np.abs(table).max(axis=1)
    estimate = np.where(constant, table[:, 0], table @ how.weights)
    return Means(estimate, np.where(constant, 0.0, np.sqrt(how.variance(table))), how.df, how.effective_groups)


def clustered_t(values: ArrayLike, *clusters: Labels, null: float = 0.0, level: float = 0.95) -> TTest:
    """t-test of the mean over groups against `null`, with a variance that respects up to two clusterings.

    values `[example]`; each of `clusters` one label per example, which may name several groups ("Mary|John").

    - no clusters: the ordinary one-sample t, df = n - 1.
    - one: the t-test of the G group means, whatever the groups' sizes; df = G - 1.
    - two: the mean over groups of the first; variance V1 + V2 - V12 (Cameron, Gelbach & Miller 2011, eq. 2.11), never
      below the larger of V1 and V2, with the bias correction and the degrees of freedom of Bell & McCaffrey (2002), at
      most min(G) - 1. So it is for labels that name several groups.

    Degenerate variances: constant values have se = 0, an interval of one point and p-values of 2^-G or 1 by the side of
    the null on which they lie (both 1 when they equal it). Values that vary although all group sums agree would give a
    clustered variance of exactly 0; the variance for independent values is used instead.

    Raises InputError with fewer than 2 values, fewer than 2 groups or more than 2 clusterings; NotFiniteError.
    """
    x = vector(values, at_least=2)
    probability(level, "level")
    how = design(clusters, len(x))
    if _constant(x):
        return _constant_test(float(x.mean()), null, len(x), how)
    return _test(float(x @ how.weights), math.sqrt(how.variance(x[None])[0]), null, level, len(x), how)


def tost(values: ArrayLike, delta: float, *clusters: Labels, skewed: bool = False) -> float:
    """p-value of H0: |mean| >= delta: the larger of two one-sided clustered t-tests (Schuirmann 1987).

    A small p says that the mean lies within +-delta. values `[example]`, delta > 0 in their unit. skewed: p-values that
    hold for skewed groups as well. Raises InputError.
    """
    if not delta > 0:
        raise InputError(f"delta must be positive; got {delta}")
    above, below = clustered_t(values, *clusters, null=-delta), clustered_t(values, *clusters, null=delta)
    if skewed:
        return max(above.p_greater_skewed, below.p_less_skewed)
    return max(above.p_greater, below.p_less)


def n_to_decide(
    values: ArrayLike,
    *clusters: Labels,
    null: float = 0.0,
    alpha: float = 0.05,
    power: float = 0.8,
    skewed: bool = False,
) -> float:
    """Smallest n at which the one-sided t-test of mean > null reaches `power`, if the effect is the observed one.

    The variance per example includes the observed design effect; groups are assumed to be added at the observed size,
    so that df grows with n (noncentral t). skewed: of the test that holds for skewed groups, which takes more. Returns
    math.inf when the estimate lies on the wrong side of null. Raises InputError as `clustered_t`.
    """
    probability(alpha, "alpha")
    probability(power, "power")
    test = clustered_t(values, *clusters, null=null)
    effect = test.estimate - null
    if effect <= 0:
        return math.inf
    smallest = math.ceil(_fewest(alpha) * test.n / test.effective_groups)
    if test.se == 0:
        return float(smallest)
    share = test.effective_groups / test.n
    return _first_n(effect / (test.se * math.sqrt(test.n)), share, alpha, power, smallest, skewed)


def groups_to_decide(effect: float, *, alpha: float = 0.05, power: float = 0.8, skewed: bool = False) -> int:
    """Smallest number of independent groups at which the one-sided t-test reaches `power`.

    effect: how far the mean lies beyond the null, in standard deviations between groups. skewed: of the test that holds
    for skewed groups. Raises InputError for an effect that is not positive.
    """
    probability(alpha, "alpha")
    probability(power, "power")
    if not effect > 0:
        raise InputError(f"effect must be positive; got {effect}")
    return int(_first_n(effect, 1.0, alpha, power, _fewest(alpha), skewed))


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


def _constant(x: Floats) -> bool:
    return float(np.ptp(x)) <= 8 * float(np.finfo(np.float64).eps) * float(np.abs(x).max())


def _constant_test(estimate: float, null: float, n: int, how: Design) -> TTest:
    side = 0.0 if math.isclose(estimate, null, rel_tol=1e-12) else math.copysign(1.0, estimate - null)
    t = side * math.inf if side else 0.0
    least = smallest_p(how.effective_groups)
    greater, less, both = (1.0 if side <= 0 else least), (1.0 if side >= 0 else least), (2 * least if side else 1.0)
    return TTest(
        estimate, 0.0, how.df, t, greater, less, both, estimate, estimate, n, how.smallest, how.effective_groups
    )


def _test(estimate: float, se: float, null: float, level: float, n: int, how: Design) -> TTest:
    t, least = (estimate - null) / se, smallest_p(how.effective_groups)
    greater, less = (max(least, float(special.stdtr(how.df, side))) for side in (-t, t))
    half = float(special.stdtrit(how.df, 0.5 + level / 2)) * se
    both = min(1.0, 2 * min(greater, less))
    low, high = estimate - half, estimate + half
    return TTest(estimate, se, how.df, t, greater, less, both, low, high, n, how.smallest, how.effective_groups)


def _fewest(alpha: float) -> int:
    """Groups with which a p-value of alpha can be reached at all."""
    return max(2, math.ceil(-math.log2(alpha) - 1e-12))


def _power(n: float, effect: float, groups_per_example: float, alpha: float, skewed: bool) -> float:
    df = max(1.0, n * groups_per_example - 1)
    critical = critical_t(alpha, df + 1) if skewed else float(special.stdtrit(df, 1 - alpha))
    shift = effect * math.sqrt(n)
    # Beyond this the power is 1 to double precision, and the noncentral t is slow and fragile.
    return 1.0 if shift > critical + 40 else 1 - float(special.nctdtr(df, shift, critical))


def _first_n(
    effect: float, groups_per_example: float, alpha: float, power: float, smallest: int, skewed: bool
) -> float:
    def enough(n: int) -> bool:
        return _power(n, effect, groups_per_example, alpha, skewed) >= power

    low, high = smallest - 1, smallest
    while not enough(high):
        low, high = high, 2 * high
        if high > _LARGEST_N:
            return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return float(high)
