"""Laws of the statistics, against SciPy, brute force and closed forms."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as reference

from vesalius import stats
from vesalius.errors import InputError, NotFiniteError, UnknownNameError

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=40)


def clustered_sample(rng: np.random.Generator, groups: int, size: int, icc: float) -> tuple[np.ndarray, np.ndarray]:
    shared = rng.normal(size=(groups, 1)) * math.sqrt(icc)
    own = rng.normal(size=(groups, size)) * math.sqrt(1 - icc)
    return (shared + own).ravel(), np.repeat(np.arange(groups), size)


def sandwich(x: np.ndarray, labels: np.ndarray, of: np.ndarray) -> float:
    """Cluster-robust variance of the mean over groups `of`, as a weighted regression in matrices, uncorrected."""
    sizes = {label: np.count_nonzero(of == label) for label in set(of.tolist())}
    weights = np.diag([1 / sizes[label] for label in of.tolist()])
    design = np.ones((len(x), 1))
    bread = np.linalg.inv(design.T @ weights @ design)
    residuals = weights @ (x - design @ (bread @ design.T @ weights @ x))
    meat = np.zeros((1, 1))
    for label in set(labels.tolist()):
        score = design[labels == label].T @ residuals[labels == label]
        meat += np.outer(score, score)
    return float((bread @ meat @ bread)[0, 0])


# --- clustered t -----------------------------------------------------------------------------------------------------


def test_without_clusters_it_is_the_ordinary_t_test() -> None:
    x = np.random.default_rng(0).normal(0.3, 1, 23)
    ours, theirs = stats.clustered_t(x, null=0.1), reference.ttest_1samp(x, 0.1)
    assert ours.t == pytest.approx(theirs.statistic)
    assert ours.p_two_sided == pytest.approx(theirs.pvalue)
    assert ours.p_greater == pytest.approx(reference.ttest_1samp(x, 0.1, alternative="greater").pvalue)
    assert ours.p_less == pytest.approx(1 - ours.p_greater)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))


def test_one_way_is_the_t_test_of_group_means_and_a_sandwich_on_unbalanced_groups() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 9, 60)
    x = rng.normal(size=60) + rng.normal(size=9)[labels]
    means = np.array([x[labels == g].mean() for g in range(9)])
    ours = stats.clustered_t(x, labels)
    assert ours.estimate == pytest.approx(means.mean()) != pytest.approx(x.mean())
    assert ours.se**2 == pytest.approx(sandwich(x, labels, labels) * 9 / 8)
    assert (ours.df, ours.n, ours.n_groups, ours.effective_groups) == (8, 60, 9, 9)
    assert ours.p_greater == pytest.approx(reference.ttest_1samp(means, 0, alternative="greater").pvalue)


def test_balanced_groups_give_the_t_test_of_group_means() -> None:
    x, labels = clustered_sample(np.random.default_rng(2), 12, 5, 0.4)
    means = x.reshape(12, 5).mean(axis=1)
    assert stats.clustered_t(x, labels).p_two_sided == pytest.approx(reference.ttest_1samp(means, 0).pvalue)


def test_two_way_is_the_sum_of_two_sandwiches_less_that_of_their_intersection() -> None:
    rng = np.random.default_rng(3)
    first, second = rng.integers(0, 10, 200), rng.integers(0, 8, 200)
    tables = [rng.normal(size=200) + rng.normal(size=10)[first] + rng.normal(size=8)[second] for _ in range(3)]
    tests = [stats.clustered_t(x, first, second) for x in tables]
    parts = [[sandwich(x, of, first) for of in (first, second, first * 100 + second)] for x in tables]
    both = [a + b - c for a, b, c in parts]
    assert all(total > max(a, b) for total, (a, b, _) in zip(both, parts, strict=True))
    # One factor for all data of the design makes it unbiased, and is no less than that of the templates alone.
    factors = [test.se**2 / total for test, total in zip(tests, both, strict=True)]
    assert factors == pytest.approx([factors[0]] * 3) and 10 / 9 <= factors[0] < 1.5
    assert tests[0].df <= 7 and tests[0].effective_groups == tests[0].df + 1


def test_two_way_reduces_to_one_way_when_the_second_clusters_are_singletons() -> None:
    x, labels = clustered_sample(np.random.default_rng(4), 12, 5, 0.4)
    assert stats.clustered_t(x, labels, range(60)) == stats.clustered_t(x, labels)


def test_two_way_variance_is_never_below_a_one_way_variance() -> None:
    rng = np.random.default_rng(5)
    for _ in range(50):
        first, second = rng.integers(0, 4, 12), rng.integers(0, 4, 12)
        if len(set(first)) < 2 or len(set(second)) < 2:
            continue
        x = rng.normal(size=12)
        larger = max(stats.clustered_t(x, first).se, sandwich(x, second, first) ** 0.5)
        assert stats.clustered_t(x, first, second).se >= larger * (1 - 1e-12)


def test_clustered_interval_covers_at_icc_point_four_and_the_naive_one_does_not() -> None:
    rng = np.random.default_rng(6)
    covered, naive = 0, 0
    for _ in range(1000):
        x, labels = clustered_sample(rng, 16, 8, 0.4)
        clustered, plain = stats.clustered_t(x, labels), stats.clustered_t(x)
        covered += clustered.low <= 0 <= clustered.high
        naive += plain.low <= 0 <= plain.high
    assert 930 <= covered <= 970
    assert naive < 800  # positive control: ignoring the templates is visibly wrong


def test_constant_values_are_judged_by_their_side_of_the_null() -> None:
    above, equal = stats.clustered_t([0.3] * 6, null=0.1), stats.clustered_t([0.3] * 6, null=0.3)
    assert (above.p_greater, above.p_less, above.p_two_sided) == (2**-6, 1, 2**-5)  # six of one sign, and no more
    assert (above.low, above.high, above.se) == (0.3, 0.3, 0)
    assert (equal.p_greater, equal.p_less, equal.p_two_sided, equal.t) == (1, 1, 1, 0)
    assert stats.clustered_t([0.1 + 0.2, 0.3, 0.3], "abc").se == 0  # differing by rounding only


def test_group_sums_that_happen_to_agree_do_not_make_certainty() -> None:
    x = np.array([1.0, 3.0, 0.5, 3.5])
    test = stats.clustered_t(x, "aabb")
    assert test.se == pytest.approx(stats.clustered_t(x).se)
    assert 0.05 < test.p_two_sided < 1


def test_what_cannot_be_tested_is_refused() -> None:
    with pytest.raises(InputError, match="1 group; a clustered statistic needs at least 2"):
        stats.clustered_t([1, 2, 3], "aaa")
    with pytest.raises(InputError, match="values holds 1 example"):
        stats.clustered_t([1.0])
    with pytest.raises(InputError, match="2 group labels for 3 values"):
        stats.clustered_t([1, 2, 3], "ab")
    with pytest.raises(InputError, match="at most 2"):
        stats.clustered_t([1, 2, 3], "abc", "abc", "abc")
    with pytest.raises(InputError, match="one number per example"):
        stats.clustered_t([[1.0, 2.0]])
    with pytest.raises(NotFiniteError, match=r"values\[1\] is nan"):
        stats.clustered_t([1, math.nan, 3])


def test_equivalence_is_shown_by_tight_values_only() -> None:
    rng = np.random.default_rng(7)
    tight, wide = rng.normal(0, 0.1, 40), rng.normal(0, 3, 40)
    assert stats.tost(tight, 0.2) < 0.001
    assert stats.tost(wide, 0.2) > 0.2
    each = [reference.ttest_1samp(tight, side, alternative=a).pvalue for side, a in ((-0.2, "greater"), (0.2, "less"))]
    assert stats.tost(tight, 0.2) == pytest.approx(max(each))
    with pytest.raises(InputError, match="delta must be positive"):
        stats.tost(tight, 0)


def test_n_to_decide_is_the_first_n_with_that_power() -> None:
    x = np.random.default_rng(8).normal(0.4, 1, 12)
    effect = x.mean() / x.std(ddof=1)

    def power(n: int) -> float:
        critical = reference.t.ppf(0.95, n - 1)
        return float(reference.nct.sf(critical, n - 1, effect * math.sqrt(n)))

    needed = int(stats.n_to_decide(x))
    assert power(needed) >= 0.8 > power(needed - 1)
    assert stats.n_to_decide(-x) == math.inf
    assert stats.n_to_decide([1.0, 1.0, 1.0]) == 5  # four of one sign are a chance of 1 in 16


def test_n_to_decide_pays_for_the_design_effect_and_delivers_the_power() -> None:
    rng = np.random.default_rng(9)
    x, labels = clustered_sample(rng, 400, 8, 0.4)
    x += 0.25 - x.mean()
    needed = stats.n_to_decide(x, labels)
    assert needed > 2.5 * stats.n_to_decide(x)  # design effect 1 + 7 * .4 = 3.8
    groups = math.ceil(needed / 8)
    draws = (clustered_sample(rng, groups, 8, 0.4) for _ in range(400))
    hits = sum(stats.clustered_t(values + 0.25, of).p_greater <= 0.05 for values, of in draws)
    assert 0.73 <= hits / 400 <= 0.87


def test_intraclass_correlation_finds_what_was_planted() -> None:
    rng = np.random.default_rng(10)
    assert stats.intraclass_correlation(*clustered_sample(rng, 600, 5, 0.4)) == pytest.approx(0.4, abs=0.04)
    assert stats.intraclass_correlation(*clustered_sample(rng, 600, 5, 0.0)) == pytest.approx(0.0, abs=0.04)


def test_intraclass_correlation_by_hand_on_unbalanced_groups() -> None:
    # Groups (1, 3) and (5, 7, 9): MSB = 30, MSW = 10/3, n0 = 5 - 13/5 = 2.4.
    expected = (30 - 10 / 3) / (30 + 1.4 * 10 / 3)
    assert stats.intraclass_correlation([1, 3, 5, 7, 9], "aabbb") == pytest.approx(expected)
    with pytest.raises(InputError, match="values that vary"):
        stats.intraclass_correlation([2, 2, 2], "aab")


# --- resampling ------------------------------------------------------------------------------------------------------


def test_sign_flips_equal_brute_force() -> None:
    x = np.array([0.9, -0.2, 1.4, 0.3, 0.8, -0.1])
    flipped = [float(np.mean(x * s)) for s in itertools.product([1, -1], repeat=6)]
    test = stats.sign_flip_test(x)
    assert test.exact and test.draws == 64
    assert test.p_greater == pytest.approx(np.mean(np.array(flipped) >= x.mean() - 1e-12))
    assert test.p_two_sided == pytest.approx(np.mean(np.abs(flipped) >= abs(x.mean()) - 1e-12))


def test_sign_flips_move_whole_clusters() -> None:
    test = stats.sign_flip_test([1.0] * 12, clusters=[0] * 4 + [1] * 4 + [2] * 4)
    assert (test.p_greater, test.draws) == (1 / 8, 8)
    assert stats.sign_flip_test([1.0] * 12).p_greater == 1 / 2**12  # positive control: examples taken as independent


def test_monte_carlo_p_values_are_never_zero_and_repeat_with_the_seed() -> None:
    x = np.ones(40)
    assert stats.sign_flip_test(x, draws=99).p_greater == 1 / 100
    assert stats.permutation_test(x + np.arange(40), -np.arange(40.0), draws=99).p_greater == 1 / 100
    noisy = np.random.default_rng(0).normal(0.2, 1, 40)
    first, again, other = (stats.sign_flip_test(noisy, draws=200, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_permutations_equal_scipy() -> None:
    a, b = [1.1, 2.3, 0.7, 3.1], [0.2, 0.9, 1.5]

    def difference(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean(x) - np.mean(y))

    exact = reference.permutation_test((a, b), difference, n_resamples=math.inf, alternative="greater")
    test = stats.permutation_test(a, b)
    assert test.exact and test.draws == 35
    assert test.p_greater == pytest.approx(exact.pvalue)
    assert stats.permutation_test(a, b, draws=20).exact is False


def test_wild_bootstrap_holds_its_level_with_few_unequal_groups_and_sees_effects() -> None:
    rng = np.random.default_rng(11)
    sizes = [2, 2, 3, 4, 6, 8, 12, 20]
    labels = np.repeat(np.arange(8), sizes)
    shared = rng.normal(size=(400, 8))[:, labels] * math.sqrt(0.4)
    table = shared + rng.normal(size=(400, len(labels))) * math.sqrt(0.6)
    null = np.mean([stats.wild_bootstrap(x, labels, draws=199).p_two_sided <= 0.05 for x in table])
    power = np.mean([stats.wild_bootstrap(x + 1.5, labels, draws=199).p_greater <= 0.05 for x in table[:60]])
    assert null <= 0.09
    assert power >= 0.8


def test_wild_bootstrap_enumerates_rademacher_weights_when_it_can() -> None:
    x, labels = clustered_sample(np.random.default_rng(12), 13, 3, 0.4)
    test = stats.wild_bootstrap(x + 0.3, labels, draws=10000)
    assert test.exact and test.draws == 2**13
    assert test.statistic == pytest.approx(stats.clustered_t(x + 0.3, labels).t)
    assert not stats.wild_bootstrap(x, labels, draws=500).exact
    assert stats.wild_bootstrap(x, labels, null=float(x.mean()), draws=500).p_two_sided > 0.9


def test_a_rank_p_value_needs_enough_draws() -> None:
    assert stats.rank_p(3.0, [1, 2, 3, 4]) == 3 / 5
    assert stats.rank_p(9.0, np.zeros(19)) == pytest.approx(0.05)
    assert stats.draws_needed(1) == 19
    assert stats.draws_needed(300) == 5999
    for m, alpha in itertools.product((1, 3, 7, 301), (0.05, 0.01, 0.1)):
        needed = stats.draws_needed(m, alpha)
        assert 1 / (needed + 1) <= alpha / m * (1 + 1e-9) < 1 / needed


def test_max_t_holds_the_family_wise_error_under_dependence_and_finds_the_planted() -> None:
    rng = np.random.default_rng(13)
    wrong, found = 0, 0
    for seed in range(200):
        shared = rng.normal(size=(30, 1))
        table = shared * 0.7 + rng.normal(size=(30, 50)) * 0.7
        wrong += stats.max_t(table, draws=199, seed=seed).min() <= 0.05
        table[:, 7] += 1.2
        found += stats.max_t(table, draws=199, seed=seed)[7] <= 0.05
    assert wrong / 200 <= 0.09
    assert found / 200 >= 0.9


def test_max_t_of_one_test_is_the_sign_flip_test() -> None:
    x, labels = clustered_sample(np.random.default_rng(14), 9, 4, 0.4)
    x = x + 0.5
    one = stats.sign_flip_test(x, labels)
    assert stats.max_t(x[:, None], labels)[0] == pytest.approx(one.p_two_sided)
    assert stats.max_t(x[:, None], labels, alternative="greater")[0] == pytest.approx(one.p_greater)
    assert stats.max_t(np.zeros((5, 2))).tolist() == [1, 1]
    with pytest.raises(UnknownNameError, match="unknown alternative 'both'"):
        stats.max_t(x[:, None], alternative="both")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["BCa", "percentile"])
def test_bootstrap_intervals_agree_with_scipy(method: str) -> None:
    x = np.random.default_rng(15).exponential(size=60)
    theirs = reference.bootstrap((x,), np.mean, n_resamples=9999, method=method, random_state=1).confidence_interval
    ours = stats.bootstrap_interval(x, draws=9999, method=method.lower())  # type: ignore[arg-type]
    assert tuple(ours) == pytest.approx(tuple(theirs), abs=0.02)


def test_bootstrap_intervals_resample_clusters_and_cover() -> None:
    rng = np.random.default_rng(16)
    samples = [clustered_sample(rng, 25, 6, 0.4) for _ in range(300)]
    clustered = [stats.bootstrap_interval(x, of, draws=400, seed=i) for i, (x, of) in enumerate(samples)]
    naive = [stats.bootstrap_interval(x, draws=400, seed=i) for i, (x, _) in enumerate(samples)]
    assert 0.89 <= np.mean([low <= 0 <= high for low, high in clustered]) <= 0.98
    assert np.mean([low <= 0 <= high for low, high in naive]) < 0.85


def test_bootstrap_takes_statistics_of_columns() -> None:
    table = np.column_stack([np.full(10, 2.0), np.arange(1.0, 11)])
    low, high = stats.bootstrap_interval(table, statistic=lambda t: float(t[:, 0].mean() / t[:, 1].mean()), draws=200)
    assert low < 2 / 5.5 < high
    plain = stats.bootstrap_interval(table[:, 1], draws=200)
    assert stats.bootstrap_interval(table[:, 1], statistic=lambda v: float(v.mean()), draws=200) == plain
    with pytest.raises(InputError, match="pass statistic="):
        stats.bootstrap_interval(table)


# --- many tests ------------------------------------------------------------------------------------------------------


def holm_by_definition(p: list[float]) -> list[float]:
    """Smallest level at which the step-down procedure rejects each hypothesis."""
    ranked = sorted(range(len(p)), key=p.__getitem__)
    adjusted = [0.0] * len(p)
    for place, test in enumerate(ranked):
        adjusted[test] = min(1.0, max((len(p) - i) * p[ranked[i]] for i in range(place + 1)))
    return adjusted


@given(P_VALUES)
@settings(max_examples=60, deadline=None)
def test_holm_equals_its_definition(p: list[float]) -> None:
    assert stats.holm(p) == pytest.approx(holm_by_definition(p))


@given(P_VALUES)
@settings(max_examples=60, deadline=None)
def test_false_discovery_corrections_equal_scipy(p: list[float]) -> None:
    assert stats.bh(p) == pytest.approx(reference.false_discovery_control(p, method="bh"))
    assert stats.by(p) == pytest.approx(reference.false_discovery_control(p, method="by"))


def test_p_values_outside_the_unit_interval_are_refused() -> None:
    with pytest.raises(InputError, match=r"p\[1\] is 1\.5"):
        stats.bh([0.1, 1.5])
    with pytest.raises(NotFiniteError, match=r"p\[0\] is nan"):
        stats.holm([math.nan])


def t_test_columns(table: np.ndarray) -> np.ndarray:
    return np.asarray(reference.ttest_1samp(table, 0).pvalue)


def test_300_null_tests_give_15_false_positives_and_after_correction_hardly_any() -> None:
    rng = np.random.default_rng(17)
    tables = rng.normal(size=(200, 30, 300))
    p = np.stack([t_test_columns(table) for table in tables])
    raw = (p <= 0.05).sum(axis=1)
    assert 14 <= raw.mean() <= 16
    assert (raw > 0).all()  # positive control: uncorrected, every run "finds" something
    for adjust in (stats.holm, stats.bh):
        assert np.mean([adjust(row).min() <= 0.05 for row in p]) <= 0.07 + 0.02


def test_planted_effects_are_found_at_the_promised_rate_of_false_discoveries() -> None:
    rng = np.random.default_rng(18)
    false_share, power = [], []
    for _ in range(400):
        table = rng.normal(size=(50, 300))
        table[:, :10] += 1.0
        found = stats.bh(t_test_columns(table)) <= 0.1
        false_share.append(found[10:].sum() / max(1, found.sum()))
        power.append(found[:10].mean())
    # For independent tests the rate is exactly the share of true nulls times the level, 290/300 * .1.
    assert np.mean(false_share) == pytest.approx(0.0967, abs=0.011)
    assert np.mean(power) > 0.8


# --- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_binomial_tests_equal_scipy(alternative: str) -> None:
    for k, n, p in itertools.product((0, 3, 7, 12), (12,), (0.1, 0.5, 0.9)):
        theirs = reference.binomtest(k, n, p, alternative=alternative).pvalue
        assert stats.binomial_test(k, n, p, alternative) == pytest.approx(theirs, abs=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("n", "critical", "p"), [(50, 37, 0.0280), (100, 69, 0.0398), (200, 132, 0.0475), (1000, 626, 0.0495)]
)
def test_equivalence_of_circuit_and_model_is_rejected_from_the_published_counts(
    n: int, critical: int, p: float
) -> None:
    assert stats.even_odds_test(critical, n) == pytest.approx(p, abs=5e-5)
    assert stats.even_odds_test(n - critical, n) == pytest.approx(p, abs=5e-5)
    assert stats.even_odds_test(critical - 1, n) > 0.05


@pytest.mark.parametrize(("k", "p"), [(60, 0.5433), (65, 0.1795), (70, 0.0248), (75, 0.0012)])
def test_equivalence_at_one_hundred_prompts(k: int, p: float) -> None:
    assert stats.even_odds_test(k, 100) == pytest.approx(p, abs=5e-5)


def test_sufficiency_needs_96_and_minimality_fails_at_84_of_100() -> None:
    assert stats.binomial_test(96, 100, 0.9, "greater") < 0.05 < stats.binomial_test(95, 100, 0.9, "greater")
    assert stats.binomial_test(84, 100, 0.9, "less") < 0.05 < stats.binomial_test(85, 100, 0.9, "less")
    assert stats.binomial_test(100, 100, 0.9, "greater") == pytest.approx(2.66e-5, abs=5e-8)


def test_a_thousand_of_a_thousand_is_not_certainty() -> None:
    assert stats.clopper_pearson(1000, 1000) == pytest.approx((0.9963, 1.0), abs=5e-5)
    assert stats.clopper_pearson(1000, 1000, one_sided="lower") == pytest.approx((0.9970, 1.0), abs=5e-5)
    assert stats.clopper_pearson(0, 10, one_sided="upper").low == 0


def test_exact_intervals_equal_scipy() -> None:
    for k in (0, 1, 5, 9, 10):
        theirs = reference.binomtest(k, 10).proportion_ci(0.9, method="exact")
        assert stats.clopper_pearson(k, 10, 0.9) == pytest.approx((theirs.low, theirs.high))


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(InputError, match="11 of 10"):
        stats.binomial_test(11, 10)
    with pytest.raises(InputError, match="level must lie strictly between 0 and 1"):
        stats.clopper_pearson(1, 10, level=1.0)
    with pytest.raises(UnknownNameError, match="unknown side 'left'; known: lower, upper"):
        stats.clopper_pearson(1, 10, one_sided="left")  # type: ignore[arg-type]


# --- dependence ------------------------------------------------------------------------------------------------------


def test_hsic_rejects_independent_variables_at_its_level() -> None:
    rng = np.random.default_rng(19)
    tests = [stats.hsic_test(*rng.normal(size=(2, 40)), draws=99, seed=i) for i in range(300)]
    assert 0.025 <= np.mean([test.p <= 0.05 for test in tests]) <= 0.085
    assert min(test.p for test in tests) >= 1 / 100


def test_hsic_sees_what_correlation_does_not() -> None:
    rng = np.random.default_rng(20)
    x = np.linspace(-2, 2, 80)
    y = x**2 + 0.3 * rng.normal(size=80)
    assert abs(np.corrcoef(x, y)[0, 1]) < 0.1
    assert stats.hsic_test(x, y).p < 0.01


def test_hsic_bandwidth_belongs_to_each_variable() -> None:
    rng = np.random.default_rng(21)
    x = rng.normal(size=50)
    y = np.abs(x) + 0.1 * rng.normal(size=50)
    assert stats.hsic_test(x * 1e6, y * 1e-3).statistic == pytest.approx(stats.hsic_test(x, y).statistic)


def test_hsic_statistic_equals_the_trace_formula() -> None:
    rng = np.random.default_rng(22)
    x, y = rng.normal(size=(2, 12))

    def gram(v: np.ndarray) -> np.ndarray:
        squares = np.array([[(a - b) ** 2 for a in v] for b in v])
        return np.exp(-squares / (2 * np.median(squares[~np.eye(12, dtype=bool)])))

    centre = np.eye(12) - 1 / 12
    expected = np.trace(gram(x) @ centre @ gram(y) @ centre) / 144
    assert stats.hsic_test(x, y).statistic == pytest.approx(expected)


def test_what_hsic_cannot_be_asked_is_refused() -> None:
    with pytest.raises(InputError, match="x is constant"):
        stats.hsic_test(np.zeros(10), np.arange(10.0))
    with pytest.raises(InputError, match=r"y\[1\] is 1e\+200"):
        stats.hsic_test(np.arange(10.0), np.arange(10.0) * 1e200)
    with pytest.raises(InputError, match="distances in x are too large or too small"):
        stats.hsic_test(np.arange(10.0) * 1e-200, np.arange(10.0))
    with pytest.raises(InputError, match="x has 3 and y 4 examples"):
        stats.hsic_test([1, 2, 3], [1, 2, 3, 4])
    with pytest.raises(InputError, match="2 clusters"):
        stats.hsic_test(np.arange(6.0), np.arange(6.0), clusters="aaabbb")


# --- measurement -----------------------------------------------------------------------------------------------------


def test_a_measurement_carries_the_clustered_interval_and_survives_json() -> None:
    x, labels = clustered_sample(np.random.default_rng(23), 5, 4, 0.4)
    groups = {"template": [f"t{i}" for i in labels], "other": ["z"] * 20}
    made = stats.measure("effect of <head>", x, groups=groups, unit="logits", seed=3, cost={"forwards": 20})
    test = stats.clustered_t(x, labels)
    assert (made.estimate, made.low, made.high, made.n_groups) == (test.estimate, test.low, test.high, 5)
    assert made.effective_groups == 5
    assert stats.Measurement(**json.loads(json.dumps(made.to_json()))) == made
    assert "effect of &lt;head&gt;" in made._repr_html_()


def test_a_measurement_refuses_what_is_not_a_number_and_names_where() -> None:
    with pytest.raises(NotFiniteError, match=r"values\[2\] is inf"):
        stats.measure("m", [1.0, 2.0, math.inf])
    numbers = {"estimate": 1.5, "low": 1.0, "high": 2.0, "n_groups": 2}
    with pytest.raises(NotFiniteError, match=r"measurement 'm': values\[1\] is nan"):
        stats.Measurement(name="m", values=(1.0, math.nan), n=2, **numbers)
    with pytest.raises(NotFiniteError, match="estimate is nan"):
        stats.Measurement(name="m", values=(1.0, 2.0), n=2, **{**numbers, "estimate": math.nan})
    with pytest.raises(InputError, match="n is 3 but there are 2 values"):
        stats.Measurement(name="m", values=(1.0, 2.0), n=3, **numbers)
    with pytest.raises(InputError, match="1 labels of 'template' for 2 values"):
        stats.Measurement(name="m", values=(1.0, 2.0), n=2, groups={"template": ("a",)}, **numbers)


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_a_bootstrap_of_sums_is_the_bootstrap_of_the_examples(method: str) -> None:
    x = np.random.default_rng(0).gamma(2.0, size=(23, 2))
    ratio = lambda totals: totals[..., 0] / totals[..., 1]  # noqa: E731
    fast = stats.bootstrap_of_sums(x, ratio, draws=300, method=method)  # type: ignore[arg-type]
    slow = stats.bootstrap_interval(x, statistic=lambda rows: ratio(rows.sum(0)), draws=300, method=method)  # type: ignore[arg-type]
    assert np.allclose(fast, slow)


def test_a_bootstrap_of_sums_covers_a_ratio_in_unequal_groups() -> None:
    rng, hits = np.random.default_rng(1), 0
    for trial in range(200):
        sizes = rng.integers(1, 20, 40)
        level = rng.normal(2.0, 0.5, 40)
        low, high = stats.bootstrap_of_sums(
            np.stack([level * sizes, sizes], 1), lambda totals: totals[..., 0] / totals[..., 1], draws=300, seed=trial
        )
        hits += low <= 2.0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_a_bootstrap_of_sums_refuses_one_group() -> None:
    with pytest.raises(InputError, match="at least 2 groups"):
        stats.bootstrap_of_sums([[1.0, 2.0]], lambda totals: totals[..., 0])
    with pytest.raises(UnknownNameError):
        stats.bootstrap_of_sums([[1.0], [2.0]], lambda totals: totals[..., 0], method="normal")  # type: ignore[arg-type]


def test_a_measurement_of_too_few_groups_has_no_interval_and_one_end_is_refused() -> None:
    plain: dict[str, Any] = {"name": "m", "values": (1.0,), "estimate": 1.0, "n": 1, "n_groups": 1}
    found = stats.Measurement(**plain, low=None, high=None)
    assert stats.Measurement(**json.loads(json.dumps(found.to_json()))) == found
    assert "<td>none</td>" in found._repr_html_()
    with pytest.raises(InputError, match=r"an interval has two ends; got 0\.5 and None"):
        stats.Measurement(**plain, low=0.5, high=None)


def test_a_ratio_of_sums_is_measured_with_one_value_per_group() -> None:
    totals = np.random.default_rng(0).random((20, 2)) + 0.5
    ratio = lambda t: t[..., 0] / t[..., 1]  # noqa: E731
    found = stats.measure_totals("ratio", totals, ratio, draws=500, seed=3, unit="nats", cost={"rows": 9})
    assert found.estimate == pytest.approx(totals[:, 0].sum() / totals[:, 1].sum())
    assert found.values == pytest.approx(tuple(totals[:, 0] / totals[:, 1]))
    assert (found.low, found.high) == tuple(stats.interval_of_sums(totals, ratio, draws=500, seed=3))
    plain = stats.bootstrap_of_sums(totals, ratio, draws=500, seed=3)
    assert found.low is not None and found.high is not None and found.low <= plain.low < plain.high <= found.high
    assert (found.n, found.n_groups, found.unit, found.cost) == (20, 20, "nats", {"rows": 9})


def test_an_interval_is_not_stretched_to_hold_its_estimate() -> None:
    """Resampling that moves a statistic says nothing about where the estimate may lie."""
    totals = np.random.default_rng(0).random((20, 2)) + 0.5
    ratio = lambda t: t[..., 0] / t[..., 1]  # noqa: E731
    found = stats.measure_totals("ratio", totals, ratio, estimate=4.0)
    assert (found.estimate, found.low, found.high) == (4.0, None, None)
    assert "which does not hold the estimate" in found.diagnostics["no_interval"]
    equal = stats.measure_totals("ratio", np.tile([[0.1, 0.3]], (7, 1)), ratio)
    assert equal.low is not None and equal.high is not None and equal.low <= equal.estimate <= equal.high
    assert equal.high - equal.low < 1e-12


def test_groups_for_which_a_ratio_is_not_defined_have_no_value() -> None:
    ratio = lambda t: t[..., 0] / t[..., 1]  # noqa: E731
    found = stats.measure_totals("ratio", [[1.0, 2.0], [0.0, 0.0], [3.0, 2.0]], ratio)
    assert (found.values, found.groups, found.n_groups) == ((0.5, 1.5), {"group": ("0", "2")}, 3)
    assert found.estimate == 1.0
    alone = stats.measure_totals("ratio", [[1.0, 2.0]], ratio, estimate=0.25)
    assert (alone.estimate, alone.low, alone.high) == (0.25, None, None)
    with pytest.raises(NotFiniteError, match="estimate"):
        stats.measure_totals("ratio", [[0.0, 0.0], [0.0, 0.0]], ratio)
