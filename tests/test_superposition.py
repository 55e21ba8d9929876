"""Measures of superposition: closed forms of polytopes, and dictionaries whose sharing is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import vesalius as vs
from vesalius.dictionaries import SUPERPOSED, Dictionary, dimensionality, superposition
from vesalius.errors import InputError

SITE = vs.Site.parse("layers.0.mlp_post")


def polygon(n: int) -> Tensor:
    angles = torch.arange(n, dtype=torch.float64) * 2 * math.pi / n
    return torch.stack([angles.cos(), angles.sin()], 1)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (torch.tensor([[1.0], [-1.0]]), 1 / 2),
        (polygon(3), 2 / 3),
        (torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]), 3 / 4),
        (polygon(5), 2 / 5),
        (polygon(7), 2 / 7),
        (torch.eye(4), 1.0),
    ],
    ids=["digon", "triangle", "tetrahedron", "pentagon", "heptagon", "orthogonal"],
)
def test_feature_dimensionality_of_polytopes(rows: Tensor, expected: float) -> None:
    """Elhage et al. 2022: of any size, since only the first factor is normalised away."""
    for size in (1.0, 0.3):
        found = dimensionality(size * rows)
        torch.testing.assert_close(found, torch.full_like(found, expected), atol=1e-12 if size == 1 else 1e-6, rtol=0.0)


def test_a_direction_of_zero_has_no_dimension_and_takes_none() -> None:
    assert dimensionality(torch.tensor([[1.0, 0.0], [0.0, 0.0]])).tolist() == [1.0, 0.0]


def made(directions: Tensor) -> Dictionary:
    """ReLU latents that read and write these directions, each of unit norm."""
    width = directions.shape[1]
    return Dictionary(
        "relu", (SITE,), (SITE,), (directions.T.contiguous(),), (directions,), torch.zeros(len(directions)),
        (torch.zeros(width),),
    )  # fmt: skip


def test_latents_that_are_neurons_share_nothing() -> None:
    x = torch.rand(2000, 16, generator=torch.Generator().manual_seed(0))
    found = superposition(made(torch.eye(16)), x)
    assert set(found.values) == set(found.null) == set(SUPERPOSED)
    for name in ("latents_per_neuron", "neurons_per_latent", "dimensionality"):
        np.testing.assert_allclose(found.values[name], 1.0, rtol=1e-6)
    np.testing.assert_allclose(found.values["interference"], 0.0, atol=1e-12)
    # Of a direction that is uniform on the sphere the fourth powers sum to 3 / (d + 2).
    assert np.mean(1 / found.null["neurons_per_latent"]) == pytest.approx(3 / 18, rel=0.25)
    assert np.median(found.null["interference"]) > 0.1


def test_an_opposite_pair_shares_its_neuron_and_never_interferes() -> None:
    x = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    found = superposition(made(torch.cat([torch.eye(4), -torch.eye(4)])), x)
    np.testing.assert_allclose(found.values["latents_per_neuron"], 2.0, rtol=0.05)
    np.testing.assert_allclose(found.values["dimensionality"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(found.values["interference"], 0.0, atol=1e-12)


def test_interference_is_that_of_a_loop() -> None:
    directions = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), dim=1)
    coder, x = made(directions), torch.randn(400, 4, generator=torch.Generator().manual_seed(2))
    found = superposition(coder, x, n=10**6)
    rows = vs.data.TensorSource(x).sample(2 * 10**6, seed=0)[0][: len(x) // 2]
    latents = coder.encode(rows)
    for j in range(6):
        other = own = 0.0
        for row in latents:
            if row[j] > 0:
                rest = sum(float(row[k]) * float(directions[k] @ directions[j]) for k in range(6) if k != j)
                other, own = other + rest**2, own + float(row[j]) ** 2
        assert found.values["interference"][j] == pytest.approx(other / own, rel=1e-4)


def test_it_prints_shows_and_writes_itself() -> None:
    found = superposition(made(torch.eye(4)), torch.rand(100, 4))
    assert repr(found).startswith("Superposition(medians: latents_per_neuron 1 (random ")
    assert "random directions" in found._repr_html_()
    assert found.to_json()["values"]["dimensionality"]["median"] == pytest.approx(1.0)


def test_what_has_no_units_to_share_is_refused() -> None:
    silent = Dictionary(
        "relu", (SITE,), (SITE,), (torch.eye(3),), (torch.eye(3),), torch.full((3,), -9.0), (torch.zeros(3),)
    )
    with pytest.raises(InputError, match="0 latents fire in"):
        superposition(silent, torch.rand(50, 3))
    two = Dictionary(
        "relu", (SITE,), (SITE, vs.Site.parse("layers.1.mlp_post")), (torch.eye(3),), (torch.eye(3), torch.eye(3)),
        torch.zeros(3), (torch.zeros(3), torch.zeros(3)),
    )  # fmt: skip
    with pytest.raises(InputError, match="writes 2"):
        superposition(two, (torch.rand(50, 3), torch.rand(50, 3)))
