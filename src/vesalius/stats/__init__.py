"""Every p-value and interval of the package. NumPy and SciPy only; values are one number per example, float64."""

from __future__ import annotations

from vesalius.stats.arrays import Interval
from vesalius.stats.clustered import (
    Means,
    TTest,
    clustered_means,
    clustered_t,
    group_mean,
    groups_to_decide,
    intraclass_correlation,
    n_to_decide,
    tost,
)
from vesalius.stats.dependence import IndependenceTest, hsic_test
from vesalius.stats.exact import binomial_test, clopper_pearson, even_odds_test
from vesalius.stats.measurement import Measurement, measure, measure_share, measure_totals
from vesalius.stats.multiplicity import bh, by, holm
from vesalius.stats.resampling import (
    ResamplingTest,
    bootstrap_interval,
    bootstrap_of_sums,
    draws_needed,
    interval_of_sums,
    max_t,
    permutation_test,
    rank_p,
    sign_flip_test,
    wild_bootstrap,
)
from vesalius.stats.skewed import critical_t, skewed_p

__all__ = [
    "IndependenceTest",
    "Interval",
    "Means",
    "Measurement",
    "ResamplingTest",
    "TTest",
    "bh",
    "binomial_test",
    "bootstrap_interval",
    "bootstrap_of_sums",
    "by",
    "clopper_pearson",
    "clustered_means",
    "clustered_t",
    "critical_t",
    "draws_needed",
    "even_odds_test",
    "group_mean",
    "groups_to_decide",
    "holm",
    "hsic_test",
    "interval_of_sums",
    "intraclass_correlation",
    "max_t",
    "measure",
    "measure_share",
    "measure_totals",
    "n_to_decide",
    "permutation_test",
    "rank_p",
    "sign_flip_test",
    "skewed_p",
    "tost",
    "wild_bootstrap",
]
