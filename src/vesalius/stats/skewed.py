"""p-values of t that hold when groups are skewed: how often a one-sided claim would be wrong, at the worst.

Student's t is about normal groups. When a few templates in a hundred have a large effect of the other sign, a sample of
twelve usually misses them: its mean is too good and its spread too small, and of 12 log-normal groups a t-test at
.00025 errs in 3 %. No test can see what was not drawn, and a correction by the sample's own skewness can't either (a
sample without its tail looks symmetric). So t is compared with what it does when groups are log-normal (standard normal
logarithm, skewness 6.2) with the long tail on the side against the claim, and the larger of that p-value and Student's
is taken. Nothing is said about distributions with longer tails than that.

A p-value is never below 2^-G either: with G groups that is the chance that all have one sign when either is as likely.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from vesalius.stats.arrays import Floats

LEVELS = (0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.025, 0.01, 0.005, 0.0025, 0.001, 0.0005, 0.00025, 0.0001, 5e-05)
# Groups -> t that is exceeded with these probabilities by the mean of left-skewed log-normal groups, each of the true
# mean 0. Simulated, 10 million samples up to 32 groups and at least 1 million above; `tests/test_inference.py` draws
# some of them again.
CRITICAL = {
    6: (-0.92, -0.446, 0.394, 1.809, 3.862, 5.609, 7.543, 10.44, 12.92, 15.7, 19.92, 23.57, 27.87, 33.95, 39.2),
    7: (-0.925, -0.455, 0.361, 1.699, 3.582, 5.142, 6.836, 9.31, 11.39, 13.68, 17.06, 19.83, 22.89, 27.6, 31.69),
    8: (-0.931, -0.463, 0.336, 1.615, 3.371, 4.796, 6.326, 8.533, 10.35, 12.34, 15.17, 17.56, 20.13, 23.9, 26.86),
    10: (-0.94, -0.473, 0.298, 1.493, 3.078, 4.329, 5.649, 7.499, 8.987, 10.57, 12.83, 14.65, 16.56, 19.23, 21.47),
    12: (-0.949, -0.484, 0.271, 1.409, 2.878, 4.017, 5.193, 6.822, 8.117, 9.487, 11.38, 12.91, 14.46, 16.75, 18.43),
    14: (-0.956, -0.49, 0.251, 1.346, 2.732, 3.787, 4.87, 6.349, 7.511, 8.724, 10.4, 11.72, 13.05, 14.94, 16.37),
    16: (-0.964, -0.498, 0.234, 1.295, 2.618, 3.613, 4.626, 5.997, 7.068, 8.173, 9.71, 10.93, 12.12, 13.78, 15.15),
    20: (-0.975, -0.507, 0.21, 1.222, 2.455, 3.364, 4.274, 5.492, 6.429, 7.391, 8.682, 9.696, 10.73, 12.2, 13.27),
    24: (-0.985, -0.515, 0.192, 1.17, 2.337, 3.187, 4.033, 5.148, 6, 6.863, 8.018, 8.908, 9.804, 11.03, 11.99),
    32: (-1.001, -0.526, 0.167, 1.098, 2.178, 2.95, 3.706, 4.69, 5.432, 6.173, 7.17, 7.911, 8.718, 9.737, 10.5),
    48: (-1.024, -0.543, 0.136, 1.013, 1.997, 2.683, 3.346, 4.194, 4.834, 5.447, 6.256, 6.877, 7.455, 8.252, 8.877),
    64: (-1.04, -0.553, 0.118, 0.966, 1.897, 2.535, 3.148, 3.924, 4.504, 5.066, 5.779, 6.323, 6.858, 7.58, 8.085),
    96: (-1.062, -0.567, 0.097, 0.91, 1.779, 2.367, 2.918, 3.613, 4.111, 4.605, 5.235, 5.718, 6.181, 6.758, 7.228),
    128: (-1.079, -0.576, 0.086, 0.878, 1.711, 2.266, 2.784, 3.43, 3.898, 4.351, 4.942, 5.366, 5.783, 6.334, 6.784),
    192: (-1.103, -0.589, 0.07, 0.838, 1.627, 2.146, 2.625, 3.221, 3.652, 4.063, 4.594, 4.971, 5.336, 5.76, 6.115),
    256: (-1.117, -0.596, 0.061, 0.817, 1.581, 2.08, 2.531, 3.09, 3.489, 3.871, 4.367, 4.74, 5.121, 5.592, 5.935),
    512: (-1.15, -0.613, 0.044, 0.773, 1.491, 1.952, 2.365, 2.868, 3.233, 3.581, 4.009, 4.322, 4.624, 4.982, 5.277),
    1024: (-1.18, -0.627, 0.033, 0.744, 1.432, 1.865, 2.249, 2.718, 3.047, 3.354, 3.744, 4.006, 4.268, 4.647, 4.928),
}  # fmt: skip
_GROUPS = np.array(list(CRITICAL), dtype=np.float64)
_TABLE = np.array(list(CRITICAL.values()))
_LOG_LEVELS = np.log(np.array(LEVELS))


def smallest_p(groups: float) -> float:
    """2^-groups, the smallest p-value that a one-sided test of so many groups can have."""
    return float(0.5**groups)


def skewed_p(t: ArrayLike, groups: float) -> Floats:
    """One-sided p-values of `t [...]` (small when t is large) that hold for normal and for skewed groups.

    groups: effective number, df + 1; of fewer than 6 the table knows nothing, and 6 is taken.
    """
    t = np.asarray(t, dtype=np.float64)
    row = _row(groups)
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = np.interp(t, row, _LOG_LEVELS)
        # Beyond the table the tail of t falls as a power of it, and ever faster: the last slope is on the safe side.
        beyond = _LOG_LEVELS[-1] + _slope(row) * (np.log(np.maximum(t, row[-1])) - np.log(row[-1]))
    skewed = np.exp(np.where(t > row[-1], beyond, inside))
    student = special.stdtr(groups - 1, -t)
    return np.asarray(np.maximum(np.maximum(student, skewed), smallest_p(groups)))


def critical_t(level: float, groups: float) -> float:
    """The smallest t whose `skewed_p` is at most `level` (at most .5); infinite when so few groups never reach it."""
    if level < smallest_p(groups):
        return float("inf")
    row, log = _row(groups), float(np.log(level))
    if log < _LOG_LEVELS[-1]:
        skewed = float(row[-1] * np.exp((log - _LOG_LEVELS[-1]) / _slope(row)))
    else:
        skewed = float(np.interp(-log, -_LOG_LEVELS, row))
    return max(skewed, float(special.stdtrit(groups - 1, 1 - level)))


def _row(groups: float) -> Floats:
    """Critical values for a number of groups between those of the table."""
    logs = np.log(_GROUPS)
    place = float(np.clip(np.log(groups), logs[0], logs[-1]))
    after = int(np.clip(np.searchsorted(logs, place), 1, len(logs) - 1))
    share = (place - logs[after - 1]) / (logs[after] - logs[after - 1])
    return np.asarray((1 - share) * _TABLE[after - 1] + share * _TABLE[after])


def _slope(row: Floats) -> float:
    return float((_LOG_LEVELS[-1] - _LOG_LEVELS[-2]) / (np.log(row[-1]) - np.log(row[-2])))
