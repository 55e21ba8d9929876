"""Writing what was read changes nothing; writing something else changes that part only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vesalius as vs
from vesalius.errors import InputError, NotFiniteError
from vesalius.parts import Part, as_part

RESID, HEADS = vs.Site("resid_post", 1), vs.Site("z", 1)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts() -> list[tuple[Part, Tensor]]:
    resid, heads, pattern = randn(2, 5, 8), randn(2, 5, 3, 4), randn(2, 3, 5, 5)
    return [
        (vs.Unit(RESID), resid), (vs.Unit(RESID[2]), resid), (vs.head(1, 2), heads), (vs.Unit(HEADS), heads),
        (vs.neuron(1, 3), resid), (vs.Unit(vs.Site("pattern", 1, 1)), pattern), (vs.Direction(RESID, randn(8)), resid),
        (vs.Direction(HEADS[1], randn(4)), heads), (vs.Subspace(RESID, randn(3, 8)), resid),
        (vs.Subspace(HEADS[0], randn(2, 4)), heads),
    ]  # fmt: skip


@pytest.mark.parametrize(("part", "whole"), parts(), ids=lambda item: type(item).__name__)
def test_writing_what_was_read_changes_nothing(part: Part, whole: Tensor) -> None:
    assert torch.allclose(part.write(whole, part.read(whole)), whole, atol=1e-12)


@pytest.mark.parametrize(("part", "whole"), parts(), ids=lambda item: type(item).__name__)
def test_what_was_written_is_read_and_the_given_tensor_is_left_alone(part: Part, whole: Tensor) -> None:
    before = whole.clone()
    value = torch.randn(part.read(whole).shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    assert torch.allclose(part.read(part.write(whole, value)), value, atol=1e-12)
    assert torch.equal(whole, before)


def test_a_unit_writes_its_own_slice_only() -> None:
    whole = randn(2, 5, 3, 4)
    written = vs.head(1, 2).write(whole, torch.zeros(2, 5, 4, dtype=torch.float64))
    assert not written[:, :, 2].any()
    assert torch.equal(written[:, :, :2], whole[:, :, :2])


def test_a_unit_past_the_end_is_refused() -> None:
    with pytest.raises(InputError, match=r"layers.1.z\[3\]: the tensor there has 3 of these, numbered from 0"):
        vs.head(1, 3).read(randn(2, 5, 3, 4))
    with pytest.raises(InputError, match="has 3 of these"):
        vs.head(1, 3).write(randn(2, 5, 3, 4), randn(2, 5, 4))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 8))
def test_a_subspace_changes_nothing_outside_itself(seed: int, rank: int) -> None:
    space, whole = vs.Subspace(RESID, randn(rank, 8, seed=seed)), randn(2, 5, 8, seed=seed + 1)
    assert torch.allclose(space.basis @ space.basis.T, torch.eye(rank, dtype=torch.float64), atol=1e-10)
    outside = torch.eye(8, dtype=torch.float64) - space.basis.T @ space.basis
    written = space.write(whole, randn(2, 5, rank, seed=seed + 2))
    assert torch.allclose(written @ outside, whole @ outside, atol=1e-10)


def test_a_subspace_spans_what_it_was_given() -> None:
    given_rows = randn(3, 8)
    space = vs.Subspace(RESID, given_rows)
    assert torch.allclose(given_rows @ space.basis.T @ space.basis, given_rows, atol=1e-10)


def test_a_direction_is_a_subspace_of_rank_one() -> None:
    vector, whole = randn(8), randn(2, 5, 8, seed=3)
    direction, space = vs.Direction(RESID, vector), vs.Subspace(RESID, vector[None])
    assert torch.allclose(direction.read(whole).abs(), space.read(whole)[..., 0].abs())
    zero = torch.zeros(2, 5, dtype=torch.float64)
    assert torch.allclose(direction.write(whole, zero), space.write(whole, zero[..., None]))


def test_the_angle_is_the_cosine_and_only_within_one_site() -> None:
    one, other = vs.Direction(RESID, randn(8)), vs.Direction(RESID, randn(8, seed=1))
    cosine = torch.nn.functional.cosine_similarity(one.vector, other.vector, dim=0)
    assert one.angle(other) == pytest.approx(float(cosine))
    assert one.angle(one) == pytest.approx(1)
    with pytest.raises(InputError, match="cannot be compared: different spaces"):
        one.angle(vs.Direction(vs.Site("resid_post", 2), randn(8)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: vs.Direction(RESID, torch.zeros(8)), InputError, "one non-zero vector"),
        (lambda: vs.Direction(RESID, torch.ones(2, 8)), InputError, r"one non-zero vector; got shape \(2, 8\)"),
        (lambda: vs.Direction(RESID, torch.tensor([1.0, float("nan")])), NotFiniteError, "resid_post holds NaN"),
        (lambda: vs.Subspace(RESID, torch.ones(2, 8)), InputError, "linearly dependent"),
        (lambda: vs.Subspace(RESID, torch.ones(9, 8)), InputError, "rank <= width"),
        (lambda: vs.Subspace(RESID, torch.full((1, 8), float("inf"))), NotFiniteError, "holds NaN or infinity"),
    ],
)  # fmt: skip
def test_what_is_no_direction_is_refused(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()  # type: ignore[operator]


def test_parts_are_made_from_names_sites_and_parts() -> None:
    part = vs.head(1, 2)
    assert as_part("layers.1.z[2]") == as_part(vs.Site("z", 1, 2)) == part
    assert as_part(part) is part
    assert str(part) == "layers.1.z[2]"


def test_references_tell_directions_apart() -> None:
    one, other = vs.Direction(RESID, randn(8), "a"), vs.Direction(RESID, randn(8, seed=1), "a")
    assert one.ref["sha256"] != other.ref["sha256"]
    assert one.ref == vs.Direction(RESID, 2 * randn(8), "a").ref
    assert vs.Subspace(RESID, randn(2, 8)).ref["kind"] == "subspace"
