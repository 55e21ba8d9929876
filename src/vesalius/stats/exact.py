"""Exact statements about counts: binomial tests and intervals."""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy import special

from vesalius.errors import InputError, UnknownNameError
from vesalius.stats.arrays import Floats, Interval, probability

Alternative = Literal["two-sided", "greater", "less"]


def binomial_test(k: int, n: int, p: float = 0.5, alternative: Alternative = "two-sided") -> float:
    """Exact p-value of k successes in n trials under H0: success probability p.

    Two-sided adds all outcomes that are no more probable than the observed one. Raises InputError, UnknownNameError.
    """
    _counts(k, n)
    if not 0 <= p <= 1:
        raise InputError(f"p must lie between 0 and 1; got {p}")
    if alternative == "greater":
        return _at_least(k, n, p)
    if alternative == "less":
        return 1.0 if k == n else float(special.bdtr(k, n, p))
    if alternative != "two-sided":
        raise UnknownNameError("alternative", alternative, ["two-sided", "greater", "less"])
    mass = _mass(n, p)
    return min(1.0, float(mass[mass <= mass[k] * (1 + 1e-7)].sum()))


def even_odds_test(wins: int, n: int, epsilon: float = 0.1) -> float:
    """p-value of H0: |P(win) - 1/2| < epsilon, the equivalence test of circuits (Shi et al. 2024, sec. 3.1).

    A small p says that circuit and model do NOT win equally often. Count wins, not mean differences; drop ties before,
    and say so. Not rejecting is no proof of equivalence. Raises InputError.
    """
    _counts(wins, n)
    if not 0 <= epsilon < 0.5:
        raise InputError(f"epsilon must lie in [0, 0.5); got {epsilon}")
    mass = _mass(n, 0.5 + epsilon)
    far = np.abs(2 * np.arange(n + 1) - n) >= abs(2 * wins - n)
    return min(1.0, float(mass[far].sum()))


def clopper_pearson(
    k: int, n: int, level: float = 0.95, one_sided: Literal["lower", "upper"] | None = None
) -> Interval:
    """Exact interval of a success probability from k of n (Clopper & Pearson 1934).

    one_sided="lower" gives [bound, 1], "upper" gives [0, bound], each at the full level. 1000 of 1000 is [.9963, 1],
    never "1.00 +- 0". Raises InputError, UnknownNameError.
    """
    _counts(k, n)
    if one_sided not in (None, "lower", "upper"):
        raise UnknownNameError("side", str(one_sided), ["lower", "upper"])
    tail = (1 - probability(level, "level")) / (1 if one_sided else 2)
    low = 0.0 if k == 0 or one_sided == "upper" else float(special.betaincinv(k, n - k + 1, tail))
    high = 1.0 if k == n or one_sided == "lower" else float(special.betaincinv(k + 1, n - k, 1 - tail))
    return Interval(low, high)


def _at_least(k: int, n: int, p: float) -> float:
    return 1.0 if k == 0 else float(special.bdtrc(k - 1, n, p))


def _mass(n: int, p: float) -> Floats:
    k = np.arange(n + 1)
    ways = special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
    return np.asarray(np.exp(ways + special.xlogy(k, p) + special.xlog1py(n - k, -p)))


def _counts(k: int, n: int) -> None:
    if n < 1 or not 0 <= k <= n:
        raise InputError(f"{k} of {n}: need n >= 1 and 0 <= k <= n")
