"""`vs.sweep` is a double loop of hooked forwards, only faster: shapes, both directions, masks, cost, resuming."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
import vesalius as vs
from vesalius.errors import InputError, NotFiniteError, UnknownNameError
from vesalius.intervention import derangement, long_enough
from vesalius.jobs import Event
from vesalius.patching import sweep as sweep_module


@pytest.fixture(scope="module", params=sorted(tiny.FAMILIES))
def model(request: pytest.FixtureRequest) -> vs.Model:
    return tiny.model(request.param)


@pytest.fixture(scope="module")
def pairs() -> vs.Pairs:
    return tiny.pairs(n=4)


def module_of(model: vs.Model, site: vs.Site) -> tuple[nn.Module, str]:
    """Where a raw hook finds a site; written here again, on purpose."""
    assert site.layer is not None
    layer = model.layer(site.layer)
    if site.kind == "z":
        return layer.get_submodule("attn.c_proj" if hasattr(layer, "attn") else "self_attn.o_proj"), "in"
    if site.kind == "mlp_out":
        return layer.get_submodule("mlp"), "out"
    return layer, "out"


def hooked(module: nn.Module, side: str, fn: Callable[[Tensor], Tensor]) -> Any:
    if side == "in":
        return module.register_forward_pre_hook(lambda _m, args: (fn(args[0]), *args[1:]))
    return module.register_forward_hook(
        lambda _m, _i, out: fn(out) if isinstance(out, Tensor) else (fn(out[0]), *out[1:])
    )


def logit_diff_by_hand(model: vs.Model, pairs: vs.Pairs, ids: Tensor, row: int) -> float:
    """One example alone, without padding."""
    size = int(pairs.size[row])
    with torch.no_grad():
        logits = model.module(ids[row : row + 1, :size]).logits[0, -1]
    return float(logits[pairs.answer[row]] - logits[pairs.distractor[row]])


def double_loop(model: vs.Model, pairs: vs.Pairs, site: vs.Site, each: str, base: str) -> Tensor:
    """Activation patching as everyone writes it first: [position|head, example]."""
    from_, into = (pairs.clean, pairs.corrupted) if base == "corrupted" else (pairs.corrupted, pairs.clean)
    module, side = module_of(model, site)
    width = model.architecture[1].d_head
    rows = []
    for number in range(pairs.clean.shape[1] if each == "position" else model.architecture[1].n_heads):
        row = []
        for example in range(len(pairs)):
            kept: list[Tensor] = []
            handle = hooked(module, side, lambda tensor, kept=kept: kept.append(tensor.clone()) or tensor)
            logit_diff_by_hand(model, pairs, from_, example)
            handle.remove()

            def put(tensor: Tensor, value: Tensor = kept[0], number: int = number) -> Tensor:
                tensor = tensor.clone()
                if each == "head":
                    tensor[..., number * width : (number + 1) * width] = value[
                        ..., number * width : (number + 1) * width
                    ]
                elif number < tensor.shape[1]:
                    tensor[:, number] = value[:, number]
                return tensor

            handle = hooked(module, side, put)
            row.append(logit_diff_by_hand(model, pairs, into, example))
            handle.remove()
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("base", ["corrupted", "clean"])
@pytest.mark.parametrize(("pattern", "each"), [("layers.*.resid_post", "position"), ("layers.*.z", "head")])
def test_a_sweep_equals_a_double_loop_of_hooked_forwards(
    model: vs.Model, pairs: vs.Pairs, pattern: str, each: str, base: str
) -> None:
    scores = vs.sweep(model, pairs, sites=pattern, each=each, edit="patch", metric=vs.logit_diff, base=base)
    expected = torch.stack([double_loop(model, pairs, site, each, base) for site in model.sites(pattern)])
    assert scores.values.shape == expected.shape
    assert float((scores.values - expected).abs().max()) < 1e-5 * float(expected.max() - expected.min())
    assert scores.sites == tuple(str(site) for site in model.sites(pattern))
    into, from_ = (pairs.corrupted, pairs.clean) if base == "corrupted" else (pairs.clean, pairs.corrupted)
    for ids, found in ((into, scores.base), (from_, scores.source)):
        plain = torch.tensor([logit_diff_by_hand(model, pairs, ids, row) for row in range(4)])
        assert torch.allclose(found, plain, atol=1e-4)


def test_patching_the_last_residual_stream_where_the_metric_reads_gives_the_source(
    model: vs.Model, pairs: vs.Pairs
) -> None:
    scores = vs.sweep(model, pairs, sites="layers.2.resid_post", each="position")
    for row in range(4):
        assert float(scores.values[0, pairs.at[row], row]) == pytest.approx(float(scores.source[row]), abs=1e-4)


def test_cells_past_an_examples_end_are_masked_and_hold_the_base(model: vs.Model, pairs: vs.Pairs) -> None:
    scores = vs.sweep(model, pairs, sites="layers.*.mlp_out", each="position")
    past = torch.arange(9)[:, None] >= pairs.size
    assert bool(past.any())
    assert torch.equal(scores.mask, ~past.expand(3, -1, -1))
    assert torch.equal(scores.values[~scores.mask], scores.base.expand_as(scores.values)[~scores.mask])
    # These prompts have three lengths: a mean over all of them would mix what is not the same position.
    with pytest.raises(InputError, match=r"4 prompts have 3 shapes.*by_shape"):
        _ = scores.mean
    for shape in scores.by_shape():
        size = int(shape.mask[0, :, 0].sum())
        assert not bool(shape.mean[:, :size].isnan().any())
        assert bool(shape.mean[:, size:].isnan().all())


def test_whole_sites_are_swept_without_each(model: vs.Model, pairs: vs.Pairs) -> None:
    scores = vs.sweep(model, pairs, sites=["embed", "layers.1.mlp_out", vs.Site("z", 1, 2)], edit="patch")
    assert scores.values.shape == scores.mask.shape == (3, 4)
    assert torch.allclose(scores.values[0], scores.source, atol=1e-4)
    by_head = vs.sweep(model, pairs, sites="layers.1.z", each="head")
    assert torch.allclose(scores.values[2], by_head.values[0, 2], atol=1e-5)


def test_key_value_heads_are_counted_as_the_model_has_them(model: vs.Model, pairs: vs.Pairs) -> None:
    layout = model.architecture[1]
    assert vs.sweep(model, pairs, sites="layers.*.v", each="head").values.shape == (3, layout.n_kv_heads, 4)
    if layout.n_heads != layout.n_kv_heads:
        with pytest.raises(InputError, match="sweep z and q apart from k and v"):
            vs.sweep(model, pairs, sites=["layers.0.v", "layers.0.z"], each="head")


@pytest.mark.parametrize("edit", ["zero", "mean", "resample"])
def test_ablating_equals_a_run_with_an_intervention(model: vs.Model, pairs: vs.Pairs, edit: str) -> None:
    scores = vs.sweep(model, pairs, sites="layers.*.mlp_out", edit=edit, base="clean", seed=3)
    tokens = pairs.tokens("clean")
    other = model.run(pairs.tokens("corrupted"), capture=["layers.*.mlp_out"])
    for number in range(3):
        name = f"layers.{number}.mlp_out"
        values = other[name]
        if edit == "zero":
            given = torch.zeros_like(values)
        elif edit == "mean":
            later = torch.cat([values[row, 1 : pairs.size[row]] for row in range(4)]).mean(0)
            given = torch.cat([values[:, :1].mean(0, keepdim=True), later.expand(1, 8, -1)], 1).expand_as(values)
        else:
            donors = long_enough(derangement(4, 3), pairs.size, pairs.size, 3)
            assert bool((pairs.size[donors] >= pairs.size).all())
            given = values[donors]
        plain = vs.logit_diff(model.run(tokens, interventions=[vs.Patch(name, source=given)]).logits, pairs)
        assert torch.allclose(scores.values[number], plain, atol=1e-4)
    assert float(scores.effects.abs().min(1).values.max()) > 1e-3
    again = vs.sweep(model, pairs, sites="layers.*.mlp_out", edit=edit, base="clean", seed=3)
    assert torch.equal(scores.values, again.values)


def test_the_seed_draws_the_donors_of_resampling(model: vs.Model, pairs: vs.Pairs) -> None:
    found = [vs.sweep(model, pairs, sites="layers.0.mlp_out", edit="resample", seed=seed).values for seed in range(4)]
    assert any(not torch.equal(found[0], other) for other in found[1:])


def test_kl_divergence_is_measured_against_the_edited_prompts_own_run(model: vs.Model, pairs: vs.Pairs) -> None:
    scores = vs.sweep(model, pairs, sites="layers.2.resid_post", metric=vs.kl_divergence)
    base, source = (model.run(pairs.tokens(which)).logits for which in ("corrupted", "clean"))
    assert torch.allclose(scores.base, torch.zeros(4), atol=1e-6)
    assert torch.allclose(scores.values[0], vs.kl_divergence(source, pairs, base), atol=1e-4)
    assert torch.allclose(scores.source, scores.values[0], atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------- cost


def test_the_cost_is_announced_before_the_first_edited_run_and_is_the_bill(model: vs.Model, pairs: vs.Pairs) -> None:
    events: list[Event] = []
    scores = vs.sweep(model, pairs, sites="layers.*.resid_post", each="position", sink=events.append)
    assert [event.kind for event in events[:2]] == ["note", "start"]
    assert events[0].message.startswith(f"sweep: {scores.cost.describe()}; about ")
    assert events[0].message.endswith("of memory")
    assert scores.cost.naive == int(scores.mask.sum()) + 2 * 4
    assert scores.cost.spent < scores.cost.naive / 2
    assert (events[-1].kind, events[-1].done, events[-1].total) == ("end", 3, 3)


# ------------------------------------------------------------------------------------------------------------- resuming


def test_a_killed_sweep_goes_on_where_it_was_and_gives_the_same_values(
    model: vs.Model, pairs: vs.Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask: dict[str, Any] = {"sites": "layers.*.z", "each": "head", "check": False}
    together = vs.sweep(model, pairs, **ask)
    monkeypatch.setattr(sweep_module, "BLOCK", 0.0)  # every site a block of its own
    whole = vs.sweep(model, pairs, **ask)
    assert torch.allclose(together.values, whole.values, atol=1e-4)
    assert together.cost.spent == pytest.approx(whole.cost.spent)
    evaluate, done = sweep_module.evaluate, []

    def dies_at_the_third(*args: Any, **options: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return evaluate(*args, **options)

    monkeypatch.setattr(sweep_module, "evaluate", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        vs.sweep(model, pairs, out=tmp_path / "sweep", **ask)
    assert len(list((tmp_path / "sweep").glob("*.npz"))) == 2
    done[:] = [1]  # one site is left: one more is allowed
    resumed = vs.sweep(model, pairs, out=tmp_path / "sweep", **ask)
    assert torch.equal(resumed.values, whole.values)
    assert (resumed.cost, resumed.sites) == (whole.cost, whole.sites)
    monkeypatch.setattr(sweep_module, "evaluate", None)
    assert torch.equal(vs.sweep(model, pairs, out=tmp_path / "sweep", **ask).values, whole.values)


@pytest.mark.parametrize(
    "change",
    [{"edit": "zero"}, {"base": "clean"}, {"seed": 1}, {"metric": vs.answer_logprob},
     {"sites": ["layers.0.z", "layers.2.z"]}],
)  # fmt: skip
def test_a_folder_of_another_sweep_is_refused(
    model: vs.Model, pairs: vs.Pairs, tmp_path: Path, change: dict[str, Any]
) -> None:
    first: dict[str, Any] = {"sites": ["layers.0.z", "layers.1.z"], "out": tmp_path}
    vs.sweep(model, pairs, **first)
    with pytest.raises(InputError, match="holds blocks of plan"):
        vs.sweep(model, pairs, **{**first, **change})


def test_labels_outside_the_vocabulary_are_refused(model: vs.Model, pairs: vs.Pairs) -> None:
    strange = replace(pairs, distractor=pairs.answer * 0 + 99)
    with pytest.raises(InputError, match=r"distractor 99 is outside the 61 logits of .*, numbered from 0"):
        vs.sweep(model, strange, sites="layers.0.z")


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"each": "word"}, "unknown each 'word'; known: head, latent, neuron, position. None edits whole sites."),
        ({"each": "neuron"}, 'layers.0.z has no neurons; each="neuron" takes whole mlp_post sites'),
        ({"each": "latent"}, 'each="latent" goes through a dictionary'),
        ({"each": "head", "group": 2}, "neighbours are edited together"),
        ({"edit": "steer", "scale": 1.0}, 'edit="steer" adds a number to a coordinate; layers.0.z is a whole site'),
        ({"memory": 10}, "hold no token of this model"),
        ({"compute": "int8"}, "compute must be one of float32, bfloat16; got 'int8'"),
        ({"edit": "median"}, "unknown edit 'median'; known: mean, patch, resample, steer, zero"),
        ({"base": "broken"}, "unknown base 'broken'; known: clean, corrupted"),
        ({"sites": "layers.*.zz"}, r"unknown site 'layers.\*.zz'; known: .*layers.\*.z"),
        ({"sites": ["layers.1.zz"]}, "unknown site inside a layer 'zz'; known: attn_out"),
        ({"sites": "layers.9.z"}, "has 3 layers, numbered from 0"),
        ({"sites": "layers.1.z[9]"}, r"has \d heads per layer"),
        ({"sites": []}, "no sites to sweep; give sites="),
        ({"sites": "layers.*.pattern"}, "cannot be swept; sweep embed"),
        ({"each": "head", "sites": "layers.*.mlp_out"}, 'has no heads to go through; each="head" takes whole z'),
        ({"each": "head", "sites": "layers.1.z[2]"}, "is one part already"),
        ({"metric": vs.next_token_loss}, "next_token_loss reads every position"),
    ],
)
def test_what_is_unknown_or_impossible_is_refused(
    model: vs.Model, pairs: vs.Pairs, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        vs.sweep(model, pairs, **{"sites": "layers.*.z", **change})


def test_the_unknown_is_an_unknown_name_error(model: vs.Model, pairs: vs.Pairs) -> None:
    with pytest.raises(UnknownNameError):
        vs.sweep(model, pairs, sites="layers.*.z", edit="median")


def test_a_model_that_gives_no_numbers_is_refused(pairs: vs.Pairs) -> None:
    broken = tiny.model("llama")
    with torch.no_grad():
        broken.layer(1).get_parameter("self_attn.o_proj.weight").fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="not finite for example 0 with nothing edited"):
        vs.sweep(broken, pairs, sites="layers.0.z")


# -------------------------------------------------------------------------------------------------------------- display


def test_scores_show_themselves_as_a_table(model: vs.Model, pairs: vs.Pairs) -> None:
    scores = vs.sweep(model, pairs, sites="layers.*.z", each="head", edit="zero")
    page = scores._repr_html_()
    heads = model.architecture[1].n_heads
    assert page.count("<tr>") == 4
    assert page.count("<td ") == 3 * heads
    assert f"{float(scores.mean[1, 2]):.2f}</td>" in page
    assert "Mean change of logit_diff (logits): zero on corrupted prompts, each head" in page
    assert "nan" not in vs.sweep(model, pairs, sites="layers.*.z", each="position")._repr_html_()
    assert repr(scores).startswith(f"Scores(zero on corrupted prompts, logit_diff: site 3, head {heads}, example 4; ")
