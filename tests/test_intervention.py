"""Interventions do what they say, where they say, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
import vesalius as vs
from vesalius.errors import InputError, InterventionError, UnknownNameError
from vesalius.intervention import derangement, mask_of, off_distribution

SITE = vs.Site.parse("layers.1.resid_post")


@pytest.fixture(scope="module", params=sorted(tiny.FAMILIES))
def model(request: pytest.FixtureRequest) -> vs.Model:
    return tiny.model(request.param)


@pytest.fixture(scope="module")
def tokens() -> vs.Tokens:
    return tiny.pairs().tokens("clean")


@pytest.fixture(scope="module")
def reference() -> vs.Tokens:
    return tiny.pairs(seed=5).tokens("corrupted")


def value(model: vs.Model, tokens: vs.Tokens, edit: Any, name: str) -> Tensor:
    return model.run(tokens, capture=[name], interventions=[edit])[name]


def with_plain_hook(model: vs.Model, tokens: vs.Tokens, path: str, side: str, edit: Any) -> Tensor:
    """Logits when `edit(tensor)` is put in place of a module's input or output, by a raw hook."""
    module = model.layer(1).get_submodule(path)
    if side == "in":
        handle = module.register_forward_pre_hook(lambda _m, args: (edit(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(lambda _m, _i, out: edit(out))
    with torch.no_grad():
        logits = model.module(tokens.ids, attention_mask=tokens.real.long()).logits
    handle.remove()
    return logits


# ------------------------------------------------------------------------------------------------------------- ablation


def test_ablating_a_head_equals_zeroing_its_rows_by_hand(model: vs.Model, tokens: vs.Tokens) -> None:
    width = model.architecture[1].d_head

    def zero(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[..., 2 * width : 3 * width] = 0
        return tensor

    by_hand = with_plain_hook(model, tokens, model.architecture[0].o_proj, "in", zero)
    assert torch.equal(model.run(tokens, interventions=[vs.Ablate("layers.1.z[2]")]).logits, by_hand)
    assert not torch.equal(model.run(tokens).logits, by_hand)


def test_ablating_a_head_removes_exactly_its_result_from_the_residual_stream(
    model: vs.Model, tokens: vs.Tokens
) -> None:
    base = model.run(tokens, capture=["layers.1.result", "layers.1.attn_out"])
    ablated = value(model, tokens, vs.Ablate(vs.head(1, 2)), "layers.1.attn_out")
    assert torch.allclose(base["layers.1.attn_out"] - base["layers.1.result[2]"], ablated, atol=1e-5)


def test_ablating_an_mlp_equals_a_hook_that_returns_zeros(model: vs.Model, tokens: vs.Tokens) -> None:
    by_hand = with_plain_hook(model, tokens, "mlp", "out", torch.zeros_like)
    assert torch.equal(model.run(tokens, interventions=[vs.Ablate("layers.1.mlp_out", mode="zero")]).logits, by_hand)


def test_mean_ablation_puts_the_mean_over_the_references_real_positions(
    model: vs.Model, tokens: vs.Tokens, reference: vs.Tokens
) -> None:
    other = model.run(reference, capture=["layers.1.z"])
    edited = value(model, tokens, vs.Ablate("layers.1.z[1]", mode="mean", reference=other.activations), "layers.1.z")
    rows = [other["layers.1.z"][i, p, 1] for i in range(6) for p in range(int(reference.lengths[i]))]
    assert torch.allclose(edited[:, :, 1], torch.stack(rows).mean(0).expand_as(edited[:, :, 1]), atol=1e-6)
    untouched = model.run(tokens, capture=["layers.1.z"])["layers.1.z"]
    assert torch.equal(edited[:, :, 2], untouched[:, :, 2])


def test_resample_ablation_gives_every_example_another_ones_value(
    model: vs.Model, tokens: vs.Tokens, reference: vs.Tokens
) -> None:
    other = model.run(reference, capture=["layers.1.mlp_out"])
    given = other["layers.1.mlp_out"]
    resample = vs.Ablate("layers.1.mlp_out", mode="resample", reference=other.activations, seed=3)
    edited = value(model, tokens, resample, "layers.1.mlp_out")
    donors = [[j for j in range(6) if torch.equal(edited[i], given[j])] for i in range(6)]
    assert all(len(found) == 1 and found[0] != i for i, found in enumerate(donors))
    assert sorted(found[0] for found in donors) == list(range(6))


def test_resampling_is_the_seeds_doing() -> None:
    assert torch.equal(derangement(20, 1), derangement(20, 1))
    assert not torch.equal(derangement(20, 1), derangement(20, 2))


@pytest.mark.parametrize("n", [2, 3, 17])
def test_a_derangement_has_no_fixed_points(n: int) -> None:
    for seed in range(20):
        order = derangement(n, seed)
        assert sorted(order.tolist()) == list(range(n))
        assert not bool((order == torch.arange(n)).any())


def test_a_derangement_by_length_pairs_neighbours_in_length() -> None:
    lengths = torch.tensor([5, 9, 5, 9, 5, 9, 5, 9])
    order = derangement(8, 0, lengths)
    assert sorted(order.tolist()) == list(range(8))
    assert not bool((order == torch.arange(8)).any())
    assert int((lengths[order] != lengths).sum()) == 2  # one at each seam of the cycle


def test_one_example_cannot_be_resampled() -> None:
    with pytest.raises(InputError, match="at least 2 reference examples"):
        derangement(1, 0)


@pytest.mark.parametrize("mode", ["mean", "resample"])
def test_mean_and_resample_need_a_reference(mode: Any) -> None:
    with pytest.raises(InputError, match=rf"{mode} ablation of layers.1.z needs reference="):
        vs.Ablate("layers.1.z", mode=mode)


def test_an_unknown_mode_lists_the_known() -> None:
    with pytest.raises(UnknownNameError, match="unknown ablation mode 'median'; known: mean, resample, zero"):
        vs.Ablate("layers.1.z", mode="median")  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------- steering, directions, subspaces


def test_steering_adds_scale_times_the_vector(model: vs.Model, tokens: vs.Tokens) -> None:
    vector = torch.randn(48, generator=torch.Generator().manual_seed(0))
    base = model.run(tokens, capture=[SITE])[SITE]
    edited = value(model, tokens, vs.Steer(SITE, scale=-2.5, vector=vector), str(SITE))
    assert torch.allclose(edited - base, (-2.5 * vector).expand_as(base), atol=1e-5)
    by_direction = value(model, tokens, vs.Steer(vs.Direction(SITE, vector), scale=3.0), str(SITE))
    assert torch.allclose(by_direction - base, (3 * vector / vector.norm()).expand_as(base), atol=1e-5)


def test_steering_needs_a_vector() -> None:
    with pytest.raises(InputError, match="needs vector=, or a part with one number per position, such as a Direction"):
        vs.Steer(SITE, scale=1.0)


def test_ablating_a_direction_removes_that_coordinate_only(model: vs.Model, tokens: vs.Tokens) -> None:
    direction = vs.Direction(SITE, torch.randn(48, generator=torch.Generator().manual_seed(1)))
    base = model.run(tokens, capture=[SITE])[SITE]
    edited = value(model, tokens, vs.Ablate(direction), str(SITE))
    assert float((edited @ direction.vector).abs().max()) < 1e-5 < float((base @ direction.vector).abs().max())
    along = (base - edited) @ direction.vector
    assert torch.allclose(base - edited, along[..., None] * direction.vector, atol=1e-5)


def test_patching_a_subspace_takes_its_coordinates_from_the_source_and_the_rest_from_the_run(
    model: vs.Model, tokens: vs.Tokens
) -> None:
    other = model.run(tiny.pairs().tokens("corrupted"), capture=[SITE])
    base = model.run(tokens, capture=[SITE])[SITE]
    space = vs.Subspace(SITE, torch.randn(5, 48, generator=torch.Generator().manual_seed(2)))
    edited = value(model, tokens, vs.Patch(space, source=other.activations), str(SITE))
    projection = space.basis.T @ space.basis
    expected = other[SITE] @ projection + base @ (torch.eye(48) - projection)
    assert torch.allclose(edited, expected, atol=1e-4)


def test_a_neuron_is_patched_alone(model: vs.Model, tokens: vs.Tokens) -> None:
    base = model.run(tokens, capture=["layers.1.mlp_post"])["layers.1.mlp_post"]
    edited = value(model, tokens, vs.Patch(vs.neuron(1, 7), source=torch.full((6, 9), 4.0)), "layers.1.mlp_post")
    assert bool((edited[..., 7] == 4).all())
    others = [i for i in range(base.shape[-1]) if i != 7]
    assert torch.equal(edited[..., others], base[..., others])


def test_cutting_attention_in_the_scores_is_felt_in_the_pattern(model: vs.Model, tokens: vs.Tokens) -> None:
    scores = model.run(tokens, capture=["layers.1.scores"])["layers.1.scores"].clone()
    scores[:, :, 5, 2] = float("-inf")
    run = model.run(tokens, capture=["layers.1.pattern"], interventions=[vs.Patch("layers.1.scores", source=scores)])
    assert not run["layers.1.pattern"][:, :, 5, 2].any()
    assert torch.allclose(run["layers.1.pattern"].sum(-1), torch.ones(()), atol=1e-5)


def test_interventions_are_applied_in_the_order_given(model: vs.Model, tokens: vs.Tokens) -> None:
    one = torch.ones(48)
    steer, ablate = vs.Steer(SITE, scale=1.0, vector=one), vs.Ablate(SITE)
    assert bool((model.run(tokens, capture=[SITE], interventions=[ablate, steer])[SITE] == 1).all())
    assert not bool(model.run(tokens, capture=[SITE], interventions=[steer, ablate])[SITE].any())


# ------------------------------------------------------------------------------------------------------------ positions


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (4, {(row, 4) for row in range(6)}),
        (-7, {(row, 2) for row in range(6)}),
        ([1, 3], {(row, p) for row in range(6) for p in (1, 3)}),
        (torch.tensor([0, 1, 2, 3, 4, 5]), {(row, row) for row in range(6)}),
        (torch.eye(6, 9).bool(), {(row, row) for row in range(6)}),
    ],
)
def test_positions_choose_what_is_edited(
    model: vs.Model, tokens: vs.Tokens, positions: Any, expected: set[Any]
) -> None:
    base = model.run(tokens, capture=[SITE])[SITE]
    edited = value(model, tokens, vs.Ablate(SITE, positions=positions), str(SITE))
    changed = (edited != base).any(-1)
    assert {tuple(cell) for cell in changed.nonzero().tolist()} == expected
    assert torch.equal(edited[~changed], base[~changed])


def test_positions_of_a_pattern_are_query_positions(model: vs.Model, tokens: vs.Tokens) -> None:
    base = model.run(tokens, capture=["layers.1.pattern"])["layers.1.pattern"]
    edited = value(model, tokens, vs.Ablate("layers.1.pattern", positions=3), "layers.1.pattern")
    assert not edited[:, :, 3].any()
    assert torch.equal(edited[:, :, :3], base[:, :, :3])
    assert torch.equal(edited[:, :, 4:], base[:, :, 4:])


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (9, "position 9 is outside the prompts' 9 tokens"),
        ([0, -10], "position -10 is outside"),
        (torch.tensor([1, 2]), r"per-example positions must be \[6\]; got \(2,\)"),
        (torch.tensor([0, 0, 0, 0, 0, 9]), r"position 9 is outside the prompts' 9 tokens"),
        (torch.ones(6, 3).bool(), r"a position mask must be \(6, 9\); got \(6, 3\)"),
    ],
)
def test_positions_that_do_not_exist_are_refused(positions: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        mask_of(positions, torch.ones(6, 9, dtype=torch.bool))


def test_a_negative_position_that_is_padding_somewhere_is_refused(tokens: vs.Tokens) -> None:
    with pytest.raises(InputError, match=r"position -1 counts from the padded end.*tokens.lengths - 1"):
        mask_of(-1, tokens.real)
    assert mask_of(-1, torch.ones(2, 3, dtype=torch.bool)).tolist() == [[False, False, True]] * 2  # type: ignore[union-attr]


def test_a_value_of_the_wrong_shape_is_refused(model: vs.Model, tokens: vs.Tokens) -> None:
    with pytest.raises(
        InterventionError, match=r"Patch at layers.1.z\[0\]: the new value has shape \(7,\), the present one"
    ):
        model.run(tokens, interventions=[vs.Patch("layers.1.z[0]", source=torch.zeros(7))])


# ---------------------------------------------------------------------------------------------------------- diagnostics


def test_natural_values_are_not_off_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.ones(40, 50, dtype=torch.bool)
    natural, also = torch.randn(2, 40, 50, 16, generator=generator)
    found = off_distribution(natural, also, real, SITE)
    assert found["norm_ratio"] == pytest.approx(1, abs=0.05)
    assert found["z_rms"] == pytest.approx(1, abs=0.05)
    far = off_distribution(natural, 10 * also, real, SITE)
    assert far["norm_ratio"] == pytest.approx(10, abs=0.5)
    assert far["z_rms"] == pytest.approx(10, abs=0.5)
    assert off_distribution(natural, natural, real, SITE) == {"norm_ratio": 1.0, "z_rms": 1.0}


def test_every_intervention_of_a_run_carries_its_diagnostic(model: vs.Model, tokens: vs.Tokens) -> None:
    edits = [vs.Ablate("layers.0.mlp_out"), vs.Steer(SITE, scale=100.0, vector=torch.ones(48))]
    found = model.run(tokens, interventions=edits).diagnostics
    assert [entry["intervention"]["edit"] for entry in found] == ["ablate", "steer"]
    assert found[0]["norm_ratio"] == 0.0
    assert found[1]["norm_ratio"] > 10


def test_the_diagnostic_of_attention_is_of_the_querys_row_of_keys(model: vs.Model, tokens: vs.Tokens) -> None:
    for kind in ("pattern", "scores"):
        name = f"layers.1.{kind}"
        for part in (name, f"{name}[1]"):
            same = vs.Replace(part, part, torch.clone, "same")
            half = vs.Replace(part, part, lambda x: x / 2, "half", positions=[3])
            wild = vs.Noise(part, scale=100.0, positions=[3])
            found = [model.run(tokens, interventions=[edit]).diagnostics[0] for edit in (same, half, wild)]
            assert (found[0]["norm_ratio"], found[0]["z_rms"]) == (1.0, 1.0)
            assert 0.2 < found[1]["norm_ratio"] < 0.8
            assert found[2]["z_rms"] > 20
            assert all(torch.isfinite(torch.tensor([entry["norm_ratio"], entry["z_rms"]])).all() for entry in found)


@pytest.mark.parametrize("shape", [(6, 4), (6, 5, 4), (6, 4, 7, 7), (1, 4)])
def test_tensors_without_tokens_have_a_diagnostic_with_one_vector_per_example(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    wrapped = vs.Model(torch.nn.Sequential(torch.nn.Tanh(), torch.nn.ReLU()))
    x = torch.randn(shape, generator=generator)
    far = vs.Replace("module:0|out", "module:0|out", lambda y: 30 * y, "far")
    near = vs.Replace("module:0|out", "module:0|out", lambda y: y.flip(0), "near")
    found = [wrapped.run(x, interventions=[edit]).diagnostics[0] for edit in (far, near)]
    assert found[0]["norm_ratio"] == pytest.approx(30)
    assert found[0]["z_rms"] > 5
    assert found[1]["norm_ratio"] == pytest.approx(1)
    assert found[1]["z_rms"] < 1.2


def test_interventions_describe_themselves_in_plain_data(model: vs.Model, tokens: vs.Tokens) -> None:
    source = model.run(tokens, capture=["layers.1.z"]).activations
    patch = vs.Patch("layers.1.z[2]", source=source, positions=3).to_json()
    assert patch["part"] == {"kind": "unit", "site": "layers.1.z[2]"}
    assert patch["source"]["tokens"] == tokens.content_hash
    assert vs.Ablate("layers.1.z").to_json()["mode"] == "zero"
