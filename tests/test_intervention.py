"""Interventions do what they say, where they say, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
import vesalius as vs
from vesalius.errors import InputError, InterventionError, UnknownNameError
from vesalius.intervention import derangement, long_enough, mask_of, off_distribution

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
    lengths = tokens.lengths.tolist()
    donors = [[j for j in range(6) if torch.equal(edited[i, :n], given[j, :n])] for i, n in enumerate(lengths)]
    assert all(len(found) == 1 and found[0] != i for i, found in enumerate(donors))
    # Another example's tokens, never the padding after them.
    assert all(int(reference.lengths[found[0]]) >= n for found, n in zip(donors, lengths, strict=True))


def test_resampling_is_the_seeds_doing() -> None:
    assert torch.equal(derangement(20, 1), derangement(20, 1))
    assert not torch.equal(derangement(20, 1), derangement(20, 2))


@pytest.mark.parametrize("n", [2, 3, 17])
def test_a_derangement_has_no_fixed_points(n: int) -> None:
    for seed in range(20):
        order = derangement(n, seed)
        assert sorted(order.tolist()) == list(range(n))
        assert not bool((order == torch.arange(n)).any())


def test_donors_are_long_enough_and_serve_once_where_that_can_be() -> None:
    lengths = torch.tensor([5, 9, 5, 9, 5, 9, 5, 9])
    for seed in range(5):
        order = long_enough(derangement(8, seed), lengths, lengths, seed)
        assert not bool((order == torch.arange(8)).any())
        assert bool((lengths[order] >= lengths).all())
        assert len(set(order[[1, 3, 5, 7]].tolist())) >= 3
    assert torch.equal(long_enough(derangement(8, 1), lengths, torch.ones(8, dtype=torch.long), 1), derangement(8, 1))
    with pytest.raises(InputError, match="no other prompt of the reference has the 7 tokens resampled in prompt 2"):
        long_enough(derangement(3, 0), torch.tensor([4, 5, 7]), torch.tensor([4, 5, 7]), 0)


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


# --------------------------------------------------------- values of other prompts: shorter, longer, padded otherwise

SHORT = [5, 7, 4, 6, 7, 3]
LONG = [7, 7, 6, 6, 9, 5]


def rows(lengths: list[int], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, tiny.VOCAB, (n,), generator=generator).tolist() for n in lengths]


def left(batch: vs.Tokens, extra: int = 0) -> vs.Tokens:
    """The same prompts with their padding on the left."""
    width = batch.ids.shape[1] + extra
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    for number, n in enumerate(batch.lengths.tolist()):
        ids[number, width - n :] = batch.ids[number, :n]
    return vs.Tokens(ids, torch.arange(width) >= width - batch.lengths[:, None])


def alone(model: vs.Model, batch: vs.Tokens, number: int, edit: Any = None) -> Tensor:
    """Logits [pos, vocab] of one prompt, unpadded, by the plain module; edit(tensor) in place of layer 1's output."""
    ids = batch.ids[number][batch.real[number]][None]

    def hook(_m: Any, _i: Any, out: Any) -> Any:
        first = out if isinstance(out, Tensor) else out[0]
        changed = edit(first)
        return changed if isinstance(out, Tensor) else (changed, *out[1:])

    handle = model.layer(1).register_forward_hook(hook) if edit is not None else None
    with torch.no_grad():
        logits = model.module(ids).logits[0]
    if handle is not None:
        handle.remove()
    return logits


def stream(model: vs.Model, batch: vs.Tokens, number: int) -> Tensor:
    """Layer 1's output [pos, d_model] of one prompt, unpadded, by a plain hook."""
    seen: list[Tensor] = []
    alone(model, batch, number, lambda out: (seen.append(out[0]), out)[1])
    return seen[0]


def put(position: int, vector: Tensor) -> Any:
    def edit(out: Tensor) -> Tensor:
        out = out.clone()
        out[:, position] = vector
        return out

    return edit


PADDINGS = {"right": lambda batch: batch, "left": left, "left, wider": lambda batch: left(batch, 2)}


@pytest.mark.parametrize("source_padding", list(PADDINGS))
@pytest.mark.parametrize("padding", list(PADDINGS))
def test_values_go_from_token_to_token_whatever_the_padding(model: vs.Model, padding: str, source_padding: str) -> None:
    base, donors = vs.Tokens.from_rows(rows(LONG, 1)), vs.Tokens.from_rows(rows(SHORT, 2))
    other = model.run(PADDINGS[source_padding](donors), capture=[SITE]).activations
    order = torch.tensor([3, 0, 4, 5, 1, 2])
    own = torch.arange(6)
    for edit, row in (
        (vs.Patch(SITE, source=other, positions=2), own),
        (vs.Interchange(SITE, source=other, examples=order, positions=2), order),
    ):
        run = model.run(PADDINGS[padding](base), interventions=[edit])
        for number, n in enumerate(LONG):
            expected = alone(model, base, number, put(2, stream(model, donors, int(row[number]))[2]))
            real = PADDINGS[padding](base).real[number]
            torch.testing.assert_close(run.logits[number][real], expected, atol=1e-4, rtol=1e-4)
            assert n == len(expected)


@pytest.mark.parametrize("padding", list(PADDINGS))
def test_last_is_each_prompts_own_last(model: vs.Model, padding: str) -> None:
    base, donors = vs.Tokens.from_rows(rows(LONG, 1)), vs.Tokens.from_rows(rows(SHORT, 2))
    other = model.run(donors, capture=[SITE]).activations
    order = torch.tensor([3, 0, 4, 5, 1, 2])
    drawn = derangement(6, 4)
    own = torch.arange(6)
    for edit, row in (
        (vs.Patch(SITE, source=other, positions="last"), own),
        (vs.Interchange(SITE, source=other, examples=order, positions=["last"]), order),
        (vs.Ablate(SITE, "resample", reference=other, seed=4, positions="last"), drawn),
    ):
        run = model.run(PADDINGS[padding](base), interventions=[edit])
        made = model.generate(PADDINGS[padding](base), 1, interventions=[edit])
        for number in range(6):
            last = stream(model, donors, int(row[number]))[-1]
            expected = alone(model, base, number, put(LONG[number] - 1, last))[-1]
            real = PADDINGS[padding](base).real[number]
            torch.testing.assert_close(run.logits[number][real][-1], expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(made.logits[number, 0], expected, atol=1e-4, rtol=1e-4)


def test_a_position_without_a_token_in_its_source_is_refused(model: vs.Model) -> None:
    base, donors = vs.Tokens.from_rows(rows(LONG, 1)), vs.Tokens.from_rows(rows(SHORT, 2))
    other = model.run(donors, capture=[SITE, "layers.1.pattern"]).activations
    order = torch.tensor([3, 0, 4, 5, 1, 2])
    for edit, message in (
        (vs.Patch(SITE, source=other), r"token 5 of prompt 0 .* its source, prompt 0 there, has 5 tokens"),
        (vs.Patch("layers.1.pattern", source=other), r"token 5 of prompt 0 .* prompt 0 there, has 5 tokens"),
        (vs.Patch(SITE, source=other, positions=[1, 3]), r"token 3 of prompt 5 .* prompt 5 there, has 3 tokens"),
        (vs.Interchange(SITE, source=other, examples=order), r"token 6 of prompt 0 .* prompt 3 there, has 6 tokens"),
        (vs.Freeze(SITE, source=other), r"Freeze at layers\.1\.resid_post: recorded \(6, 7, 48\), this run has \(6, 9"),
    ):
        with pytest.raises(InterventionError, match=message):
            model.run(base, interventions=[edit])
    with pytest.raises(InputError, match="source position 5 in source example 0, which has 5 tokens"):
        model.run(base, interventions=[vs.Interchange(SITE, source=other, source_positions=5, positions=0)])
    with pytest.raises(InputError, match="no other prompt of the reference has the 9 tokens resampled in prompt 4"):
        model.run(base, interventions=[vs.Ablate(SITE, "resample", reference=other)])
    # A prompt of one token is a shorter prompt like others, and is not stretched.
    one = model.run(vs.Tokens(torch.ones(6, 1, dtype=torch.long)), capture=[SITE]).activations
    with pytest.raises(InterventionError, match=r"token 1 of prompt 0 .* has 1 tokens"):
        model.run(base, interventions=[vs.Patch(SITE, source=one)])


def test_resampled_values_are_those_of_real_tokens(model: vs.Model) -> None:
    base, donors = vs.Tokens.from_rows(rows(SHORT, 1)), vs.Tokens.from_rows(rows(LONG, 2))
    other = model.run(donors, capture=[SITE]).activations
    known = [stream(model, donors, number) for number in range(6)]
    for seed in range(4):
        given = value(model, base, vs.Ablate(SITE, "resample", reference=other, seed=seed), str(SITE))
        for number, n in enumerate(SHORT):
            same = [j for j in range(6) if LONG[j] >= n and torch.allclose(given[number, :n], known[j][:n], atol=1e-5)]
            assert len(same) == 1
            assert same[0] != number


def test_a_patch_from_a_longer_prompt_takes_the_tokens_there_are(model: vs.Model) -> None:
    base, donors = vs.Tokens.from_rows(rows(SHORT, 1)), vs.Tokens.from_rows(rows(LONG, 2))
    other = model.run(donors, capture=[SITE, "layers.1.pattern"])
    run = model.run(base, interventions=[vs.Patch(SITE, source=other.activations)])
    edited = model.run(
        base, capture="layers.1.pattern", interventions=[vs.Patch("layers.1.pattern", source=other.activations)]
    )
    for number, n in enumerate(SHORT):
        vectors = stream(model, donors, number)[:n]
        expected = alone(model, base, number, lambda out, vectors=vectors: vectors[None].to(out))
        torch.testing.assert_close(run.logits[number, :n], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            edited["layers.1.pattern"][number, :, :n, :n], other["layers.1.pattern"][number, :, :n, :n]
        )


# ------------------------------------------------------------------------------------------------------- left padding


@pytest.mark.parametrize("positions", [1, [0, 2], "first", "last", torch.tensor([0, 1, 2, 3, 2, 1]), None])
def test_a_position_is_the_prompts_token_whatever_the_padding(model: vs.Model, positions: Any) -> None:
    """In a run as in a generation; noise too depends on the token's number and not on the column."""
    batch = vs.Tokens.from_rows(rows(LONG, 1))
    vector = torch.linspace(-3, 3, 48)
    for edit in (
        vs.Steer(SITE, scale=1.0, vector=vector, positions=positions),
        vs.Noise(SITE, scale=2.0, positions=positions),
    ):
        right = model.run(batch, interventions=[edit])
        made = [model.generate(one, 1, interventions=[edit]).logits[:, 0] for one in (batch, left(batch, 2))]
        torch.testing.assert_close(made[0], made[1], atol=1e-4, rtol=1e-4)
        ends = torch.arange(batch.ids.shape[1]) == (batch.lengths - 1)[:, None]
        torch.testing.assert_close(made[0], right.logits[ends], atol=1e-4, rtol=1e-4)
        for extra in (0, 2):
            moved = left(batch, extra)
            run = model.run(moved, interventions=[edit])
            torch.testing.assert_close(run.logits[moved.real], right.logits[batch.real], atol=1e-4, rtol=1e-4)


def test_an_edit_of_a_token_that_a_prompt_does_not_have_is_refused(model: vs.Model) -> None:
    batch = vs.Tokens.from_rows(rows(LONG, 1))
    for one in (batch, left(batch)):
        for positions in (6, [1, 8], torch.tensor([0, 0, 6, 0, 0, 0])):
            with pytest.raises(InputError, match=r"position \d is padding in some prompts \(prompt \d has \d tokens\)"):
                model.run(one, interventions=[vs.Ablate(SITE, positions=positions)])
    # A mask over the whole batch means its real tokens.
    everywhere = torch.ones_like(batch.real)
    run = model.run(left(batch), capture=SITE, interventions=[vs.Ablate(SITE, positions=everywhere)])
    assert torch.equal(run[SITE].abs().sum(-1) > 0, ~left(batch).real)


def test_freeze_aligns_by_token(model: vs.Model) -> None:
    batch = vs.Tokens.from_rows(rows(LONG, 1))
    recorded = model.run(batch, capture=["layers.1.pattern", SITE]).activations
    steer = vs.Steer("layers.0.resid_post", scale=1.0, vector=torch.linspace(-3, 3, 48))
    for site in ("layers.1.pattern", SITE):
        freeze = vs.Freeze(site, source=recorded)
        right = model.run(batch, interventions=[steer, freeze])
        moved = left(batch, 3)
        run = model.run(moved, interventions=[steer, freeze])
        torch.testing.assert_close(run.logits[moved.real], right.logits[batch.real], atol=1e-4, rtol=1e-4)
    free = model.run(batch, interventions=[steer])
    assert (free.logits - right.logits)[batch.real].abs().max() > 0.01
