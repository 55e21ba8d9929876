"""Probes: the plane of scikit-learn is the minimum that SciPy finds; scale and shift change nothing."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from scipy.optimize import minimize

from vesalius.concepts.classifier import Plane, logistic, mean_difference
from vesalius.errors import InputError, NotFiniteError


def two_classes(n: int = 80, width: int = 5, gap: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3 == 0
    x = rng.normal(size=(n, width)) * np.array([1, 2, 0.1, 5, 1])[:width] + 3
    x[y, 0] += gap
    return x, y


@pytest.mark.parametrize("penalty", [0.1, 1.0, 30.0])
def test_logistic_regression_is_the_minimum_that_another_optimiser_finds(penalty: float) -> None:
    x, y = two_classes()
    z = (x - x.mean(0)) / x.std(0)

    def loss(w: np.ndarray) -> float:
        return float(np.logaddexp(0, -np.where(y, 1, -1) * (z @ w[:-1] + w[-1])).sum() + penalty / 2 * w[:-1] @ w[:-1])

    best = minimize(loss, np.zeros(6), method="BFGS", options={"gtol": 1e-7})
    found = logistic(x, y, penalty=penalty)
    assert np.allclose(found.scores(x), z @ best.x[:-1] + best.x[-1], atol=1e-3)


def test_it_finds_a_class_and_not_noise() -> None:
    x, y = two_classes(n=400, gap=4.0)
    seen, unseen = np.arange(400) < 200, np.arange(400) >= 200
    assert logistic(x[seen], y[seen]).accuracy(x[unseen], y[unseen]) > 0.95
    noise = np.random.default_rng(1).permutation(y)
    assert logistic(x[seen], noise[seen]).accuracy(x[unseen], noise[unseen]) < 0.75  # two thirds are outside


def test_scaling_and_shifting_columns_changes_no_prediction() -> None:
    x, y = two_classes()
    moved = x * np.array([3.0, 0.01, 100.0, 1.0, 7.0]) - 50
    assert np.allclose(logistic(x, y).scores(x), logistic(moved, y).scores(moved), atol=1e-3)


def test_columns_that_do_not_vary_get_no_weight() -> None:
    x, y = two_classes()
    x[:, 2] = 4.0
    found = logistic(x, y)
    assert found.weights[2] == 0
    assert np.isfinite(found.weights).all()


def test_the_mean_difference_lies_half_way() -> None:
    x = np.array([[0.0, 0.0], [0.0, 2.0], [4.0, 0.0], [4.0, 2.0]])
    found = mean_difference(x, np.array([False, False, True, True]))
    assert (found.weights.tolist(), found.bias) == ([4.0, 0.0], -8.0)
    assert found.predict(np.array([[1.9, 9.0], [2.1, -9.0]])).tolist() == [False, True]


@pytest.mark.parametrize("fit", [logistic, mean_difference])
def test_what_cannot_be_fitted_is_refused(fit) -> None:  # type: ignore[no-untyped-def]
    x, y = two_classes()
    with pytest.raises(InputError, match="all 80 examples are outside the class; a probe needs both"):
        fit(x, y & False)
    with pytest.raises(InputError, match=r"got \(80, 5\) and \(79,\)"):
        fit(x, y[:-1])
    x[3, 1] = np.nan
    with pytest.raises(NotFiniteError, match="row 3 holds NaN"):
        fit(x, y)
    with pytest.raises(InputError, match="penalty must be positive"):
        logistic(*two_classes(), penalty=0)


def test_a_plane_is_what_it_says() -> None:
    plane = Plane(np.array([1.0, -1.0]), 0.5)
    assert plane.scores(np.array([[1.0, 2.0]])).tolist() == [-0.5]


def test_scikit_learn_is_imported_when_a_probe_is_fitted_and_not_before() -> None:
    code = (
        "import sys, numpy as np, vesalius.concepts.classifier as c; print('sklearn' in sys.modules);"
        "c.logistic(np.eye(4), np.arange(4) > 1); print('sklearn' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
