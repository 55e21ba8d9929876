"""Sweeps of Parts, neurons and latents, with edits in common, patterns held, products rounded; against plain runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
import vesalius as vs
from vesalius.dictionaries import Dictionary
from vesalius.errors import InputError
from vesalius.jobs import Event, silent
from vesalius.model import products

FAMILIES = sorted(tiny.FAMILIES)
LAYER = "layers.1.resid_post"


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> vs.Model:
    return tiny.model(request.param)


@pytest.fixture(scope="module")
def pairs() -> vs.Pairs:
    return tiny.pairs(4)


def quick(model: vs.Model, pairs: vs.Pairs, **options: Any) -> vs.Scores:
    return vs.sweep(model, pairs, sink=silent, **options)


def plainly(model: vs.Model, pairs: vs.Pairs, *edits: Any, which: str = "corrupted") -> Tensor:
    return vs.logit_diff(model.run(pairs.tokens(which), interventions=list(edits)).logits, pairs)


def source(model: vs.Model, pairs: vs.Pairs, *sites: str, which: str = "clean") -> vs.Activations:
    return model.run(pairs.tokens(which), capture=list(sites)).activations


def vectors(count: int) -> Tensor:
    return torch.randn(count, 48, generator=torch.Generator().manual_seed(3))


def parts() -> list[Any]:
    first, second, third = vectors(3)
    return [vs.Direction(vs.Site.parse(LAYER), first, "one"), vs.Direction(vs.Site("mlp_out", 0), second),
            vs.Subspace(vs.Site.parse(LAYER), torch.stack([second, third]), "plane")]  # fmt: skip


def close(found: Tensor, expected: Tensor, scores: vs.Scores) -> bool:
    spread = max(float(scores.values.max() - scores.values.min()), float(expected.max() - expected.min()))
    return float((found - expected).abs().max()) <= 1e-4 * spread


# ---------------------------------------------------------------------------------------------------------------- Parts


def test_patching_a_direction_or_subspace_equals_a_hooked_run(model: vs.Model, pairs: vs.Pairs) -> None:
    scores = quick(model, pairs, sites=parts())
    assert scores.sites[0] == f"{LAYER} direction one"
    assert scores.sites[2] == f"{LAYER} subspace plane"
    clean = source(model, pairs, LAYER, "layers.0.mlp_out")
    for row, part in enumerate(parts()):
        assert close(scores.values[row], plainly(model, pairs, vs.Patch(part, source=clean)), scores)
    assert float(scores.effects.abs().max()) > 1e-2


def test_zero_of_a_direction_is_projecting_it_out(model: vs.Model, pairs: vs.Pairs) -> None:
    scores = quick(model, pairs, sites=parts(), edit="zero")
    for row, part in enumerate(parts()):
        assert close(scores.values[row], plainly(model, pairs, vs.Project(part)), scores)


def test_steering_a_direction_adds_its_vector(model: vs.Model, pairs: vs.Pairs) -> None:
    scores = quick(model, pairs, sites=parts()[:2], edit="steer", scale=2.5)
    for row, part in enumerate(parts()[:2]):
        assert close(scores.values[row], plainly(model, pairs, vs.Steer(part, scale=2.5)), scores)
    assert scores.cost.skipped == 0


def test_a_part_can_be_edited_position_by_position(model: vs.Model, pairs: vs.Pairs) -> None:
    part = parts()[0]
    scores = quick(model, pairs, sites=part, each="position")
    clean = source(model, pairs, LAYER)
    for position in range(scores.values.shape[1]):
        mask = pairs.real & (torch.arange(pairs.clean.shape[1]) == position)
        expected = plainly(model, pairs, vs.Patch(part, source=clean, positions=mask))
        assert close(scores.values[0, position], expected, scores), position


@pytest.mark.parametrize("edit", ["mean", "resample"])
def test_other_donors_give_a_part_its_own_values(model: vs.Model, pairs: vs.Pairs, edit: str) -> None:
    # The self-check compares with plain runs, and raises.
    scores = quick(model, pairs, sites=parts(), edit=edit)
    assert scores.error is not None
    assert float(scores.effects.abs().max()) > 1e-3


# -------------------------------------------------------------------------------------------------- neurons and latents


def test_every_neuron_equals_a_hooked_run(model: vs.Model, pairs: vs.Pairs) -> None:
    scores = quick(model, pairs, sites="layers.1.mlp_post", each="neuron")
    clean = source(model, pairs, "layers.1.mlp_post")
    count = clean["layers.1.mlp_post"].shape[-1]
    assert scores.values.shape == (1, count, 4)
    for neuron in range(0, count, 7):
        edit = vs.Patch(f"layers.1.mlp_post[{neuron}]", source=clean)
        assert close(scores.values[0, neuron], plainly(model, pairs, edit), scores)


def test_groups_of_neurons_are_edited_together(model: vs.Model, pairs: vs.Pairs) -> None:
    scores = quick(model, pairs, sites="layers.1.mlp_post", each="neuron", group=32, edit="zero")
    count = source(model, pairs, "layers.1.mlp_post")["layers.1.mlp_post"].shape[-1]
    assert scores.values.shape == (1, -(-count // 32), 4)
    last = [vs.Ablate(f"layers.1.mlp_post[{neuron}]") for neuron in range((count - 1) // 32 * 32, count)]
    assert close(scores.values[0, -1], plainly(model, pairs, *last), scores)


def test_steering_a_neuron_adds_to_it(model: vs.Model, pairs: vs.Pairs) -> None:
    scores = quick(model, pairs, sites="layers.1.mlp_post", each="neuron", edit="steer", scale=-3.0)
    edit = vs.Steer("layers.1.mlp_post[5]", scale=-3.0, vector=torch.ones(()))
    assert close(scores.values[0, 5], plainly(model, pairs, edit), scores)


def dictionary(threshold: float = 0.0) -> Dictionary:
    weights = vectors(12)
    site = vs.Site.parse(LAYER)
    return Dictionary(
        "relu", (site,), (site,), encoders=(weights.T.contiguous(),),
        decoders=(weights / weights.norm(dim=1, keepdim=True),), b_enc=torch.full((12,), -threshold),
        b_dec=(torch.zeros(48),),
    )  # fmt: skip


def test_latents_of_a_dictionary_are_swept_and_silent_ones_skipped(model: vs.Model, pairs: vs.Pairs) -> None:
    coder = dictionary(4.0)
    scores = quick(model, pairs, sites=coder, each="latent")
    assert (scores.sites, scores.values.shape) == ((LAYER,), (1, 12, 4))
    clean = source(model, pairs, LAYER)
    encoded = [coder.encode(source(model, pairs, LAYER, which=which)[LAYER]) for which in ("clean", "corrupted")]
    same = ((encoded[0] == encoded[1]) | ~pairs.real[..., None]).all(1)
    assert 0 < int(same.sum()) < same.numel()
    assert scores.cost.skipped >= int(same.sum())
    for index in range(12):
        edit = vs.Patch(coder.latent(index), source=clean)
        assert close(scores.values[0, index], plainly(model, pairs, edit), scores)
        assert torch.equal(scores.values[0, index][same[:, index]], scores.base[same[:, index]])


def test_a_folder_of_another_dictionary_is_refused(model: vs.Model, pairs: vs.Pairs, tmp_path: Path) -> None:
    """Latents of both have the same site and numbers."""
    quick(model, pairs, sites=dictionary(4.0), each="latent", edit="zero", out=tmp_path)
    quick(model, pairs, sites=dictionary(4.0), each="latent", edit="zero", out=tmp_path)
    with pytest.raises(InputError, match="holds blocks of plan"):
        quick(model, pairs, sites=dictionary(0.0), each="latent", edit="zero", out=tmp_path)


def test_zero_of_a_latent_is_its_activation_and_not_its_input(model: vs.Model, pairs: vs.Pairs) -> None:
    coder = dictionary(-2.0)  # active on a zero vector
    scores = quick(model, pairs, sites=coder, each="latent", group=1, edit="zero")
    expected = plainly(model, pairs, vs.Ablate(coder.latent(3)))
    assert close(scores.values[0, 3], expected, scores)


# ------------------------------------------------------------------------------------------------------ edits in common

GIVEN = [
    vs.Ablate("layers.0.z[1]"),
    vs.Ablate("layers.1.mlp_out", positions=[1, 3]),
    vs.Ablate("embed", positions=2),
    vs.Ablate(vs.Direction(vs.Site("resid_pre", 1), vectors(1)[0])),
]


@pytest.mark.parametrize("given", GIVEN, ids=lambda edit: str(edit.part.site))
@pytest.mark.parametrize("edit", ["patch", "zero"])
def test_with_a_ablated_b_is_patched(model: vs.Model, pairs: vs.Pairs, given: Any, edit: str) -> None:
    scores = quick(model, pairs, sites="layers.*.z", each="head", edit=edit, given=[given])
    sites = [f"layers.{layer}.z" for layer in range(3)]
    clean = source(model, pairs, *sites)
    for layer, site in enumerate(sites):
        for head in range(2):
            part = f"{site}[{head}]"
            second = vs.Patch(part, source=clean) if edit == "patch" else vs.Ablate(part)
            assert close(scores.values[layer, head], plainly(model, pairs, given, second), scores), part
    assert close(scores.base, plainly(model, pairs, given), scores)
    assert close(scores.source, plainly(model, pairs, which="clean"), scores)
    without = quick(model, pairs, sites="layers.*.z", each="head", edit=edit)
    assert not torch.allclose(without.values, scores.values, atol=1e-3)


def test_edits_in_common_may_name_their_positions(model: vs.Model, pairs: vs.Pairs) -> None:
    at = torch.full((len(pairs),), 3)
    named = replace(pairs, named_positions={"here": at})
    found, expected = (
        vs.sweep(model, p, sites="layers.2.mlp_out", given=[vs.Ablate("layers.0.mlp_out", positions=where)])
        for p, where in ((named, "here"), (pairs, at))
    )
    assert torch.equal(found.values, expected.values)
    assert not torch.allclose(found.values, vs.sweep(model, pairs, sites="layers.2.mlp_out").values, atol=1e-4)


def test_edits_in_common_work_by_whole_runs_too(pairs: vs.Pairs) -> None:
    from dataclasses import replace

    model = tiny.model("llama")
    whole = vs.Model(model.module, adapter=replace(model.adapter, replay={}))  # type: ignore[type-var, arg-type]
    options = {"sites": "layers.*.z", "each": "head", "given": [GIVEN[0]]}
    assert torch.allclose(
        quick(whole, pairs, **options).values, quick(model, pairs, **options).values, atol=1e-4
    )  # fmt: skip


def test_an_edit_that_depends_on_the_run_cannot_be_in_common(model: vs.Model, pairs: vs.Pairs) -> None:
    with pytest.raises(InputError, match=r"Steer of layers.1.resid_post does. Use Model.run"):
        quick(model, pairs, sites="layers.*.z", given=[vs.Steer(parts()[0], scale=1.0)])


# -------------------------------------------------------------------------------------------------------- held patterns


def test_with_patterns_held_edits_act_through_values_alone(model: vs.Model, pairs: vs.Pairs) -> None:
    held = quick(model, pairs, sites=["layers.0.q", "layers.0.resid_post"], hold_patterns=True)
    assert torch.allclose(held.values[0], held.base.expand_as(held.values[0]), atol=1e-4)
    free = quick(model, pairs, sites=["layers.0.q", "layers.0.resid_post"])
    assert float((free.effects[0]).abs().max()) > 1e-3
    patterns = source(model, pairs, "layers.*.pattern", which="corrupted")
    clean = source(model, pairs, "layers.0.resid_post")
    still = [vs.Freeze(f"layers.{layer}.pattern", source=patterns) for layer in range(3)]
    expected = plainly(model, pairs, *still, vs.Patch("layers.0.resid_post", source=clean))
    assert close(held.values[1], expected, held)
    assert not torch.allclose(held.values[1], free.values[1], atol=1e-3)


# ------------------------------------------------------------------------------------------- precision, memory, display


def test_rounded_products_tell_their_error(model: vs.Model, pairs: vs.Pairs) -> None:
    options: dict[str, Any] = {"sites": "layers.*.z", "each": "head"}
    exact, rounded = quick(model, pairs, **options), quick(model, pairs, compute="bfloat16", **options)
    worst = float((exact.values - rounded.values).abs().max())
    spread = float(exact.values.max() - exact.values.min())
    assert 0 < worst < 0.1 * spread
    assert rounded.error is not None
    assert 0 < rounded.error <= worst * 1.01
    assert f"bfloat16, error {rounded.error:.2g} logits" in repr(rounded)
    assert "error" not in repr(exact)
    assert exact.error is not None
    assert exact.error < 1e-4 * spread


def test_memory_decides_how_much_runs_together_and_nothing_else(
    model: vs.Model, pairs: vs.Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    little = quick(model, pairs, sites="layers.*.z", each="head", memory=200_000)
    much = quick(model, pairs, sites="layers.*.z", each="head", memory=2_000_000_000)
    assert torch.allclose(little.values, much.values, atol=1e-4)


def test_a_sweep_shows_its_cost_unless_it_is_told_not_to(
    model: vs.Model, pairs: vs.Pairs, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = vs.sweep(model, pairs, sites="layers.*.z")
    shown = capsys.readouterr()
    assert scores.cost.describe() in shown.err
    assert "of memory" in shown.err
    assert shown.out == ""
    events: list[Event] = []
    vs.sweep(model, pairs, sites="layers.*.z", sink=events.append)
    assert capsys.readouterr().err == ""
    assert events[0].message.startswith("sweep: ")


def test_either_library_gives_the_same_numbers(
    model: vs.Model, pairs: vs.Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name in ("mkl", "onednn"):
        monkeypatch.setenv(products.VARIABLE, name)
        products.library.cache_clear()
        found.append(quick(model, pairs, sites="layers.*.z", each="head").values)
    products.library.cache_clear()
    assert torch.allclose(found[0], found[1], atol=1e-4)
