"""Toy models of superposition do what is known of them: a phase boundary, polytopes, half a dimension per feature."""

from __future__ import annotations

import pytest
import torch

from vesalius.dictionaries import dimensionality
from vesalius.errors import InputError
from vesalius.toys import toy_models


@pytest.mark.parametrize(
    ("importance", "probability", "loss"),
    [(0.5, 0.1, 0.00248), (0.5, 0.3, 0.02174), (0.5, 0.45, None), (0.25, 0.3, None)],
)
def test_where_two_features_are_rare_they_share_one_dimension_in_opposite_directions(
    importance: float, probability: float, loss: float | None
) -> None:
    """The boundary is where the exact optimum has it: .45 to .50 for importance 1/2, .30 to .35 for 1/4. Without biases
    it would be at 4I/(2+5I), .444 and .308."""
    found = toy_models(2, 1, probability, importance=(1, importance), steps=500, lr=0.03)
    first, second = found.W[found.best].flatten().tolist()
    assert first * second < -0.7
    assert loss is None or float(found.loss.min()) == pytest.approx(loss, rel=0.02)


@pytest.mark.parametrize(
    ("importance", "probability", "loss"), [(0.5, 0.5, 0.05207), (0.5, 1.0, 0.04164), (0.25, 0.35, None)]
)
@pytest.mark.slow
def test_where_they_are_dense_the_more_important_one_has_it_alone(
    importance: float, probability: float, loss: float | None
) -> None:
    found = toy_models(2, 1, probability, importance=(1, importance), steps=500, lr=0.03)
    first, second = found.W[found.best].flatten().abs().tolist()
    assert (first, second) == (pytest.approx(1, abs=1e-3), pytest.approx(0, abs=1e-3))
    assert loss is None or float(found.loss.min()) == pytest.approx(loss, rel=0.02)


@pytest.mark.parametrize(
    ("n", "hidden", "shape"), [(5, 2, [0.4] * 5), (3, 2, [0.5, 0.5, 1.0]), (4, 3, [0.5, 0.5, 1.0, 1.0])],
    ids=["pentagon", "a pair and one alone", "a pair and two alone"],
)  # fmt: skip
def test_rare_features_settle_on_polytopes(n: int, hidden: int, shape: list[float]) -> None:
    """Feature dimensionality of a pentagon is 2/5, of an opposite pair 1/2 (Elhage et al. 2022)."""
    found = toy_models(n, hidden, 0.05, steps=1500, instances=4)
    assert found.represented[found.best] == n
    dims = dimensionality(found.W[found.best]).sort().values
    torch.testing.assert_close(dims, torch.tensor(shape, dtype=torch.float64), atol=0.02, rtol=0.0)


@pytest.mark.slow
def test_many_features_take_about_half_a_dimension_each() -> None:
    """D* = m / |W|², which the paper sees stay near 1/2 (opposite pairs) over a range of sparsities."""
    found = toy_models(200, 20, 0.3, steps=1500, instances=1)
    assert 20 / float(found.W.square().sum()) == pytest.approx(0.5, abs=0.05)
    assert int(found.represented) == pytest.approx(40, abs=4)


@pytest.mark.slow
def test_dense_features_get_a_dimension_each_and_the_rest_none() -> None:
    found = toy_models(5, 2, 1.0, importance=[0.9**n for n in range(5)], steps=1500)
    assert found.represented[found.best] == 2
    kept = dimensionality(found.W[found.best])
    assert kept.sort(descending=True).values[:2].tolist() == pytest.approx([1, 1], abs=0.02)


def test_the_seed_decides() -> None:
    one, other, third = (toy_models(5, 2, 0.1, steps=20, seed=seed).W for seed in (0, 0, 1))
    assert torch.equal(one, other) and not torch.equal(one, third)


@pytest.mark.parametrize(("n", "hidden", "p", "importance"), [(0, 1, 0.1, None), (2, 1, 0.0, None), (2, 1, 0.1, [1.0])])
def test_toys_that_cannot_be_are_refused(n: int, hidden: int, p: float, importance: list[float] | None) -> None:
    with pytest.raises(InputError, match="toy models need at least one feature"):
        toy_models(n, hidden, p, importance=importance)
