"""Rows of a group are those of every context run alone, and nothing is run past the last site."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import families
import tiny
import vesalius as vs
from test_encoder_decoder import t5
from vesalius.data.forward import Forward, captured, forward_for
from vesalius.data.packing import Bos, Group, Packing, groups
from vesalius.errors import InputError, NotFiniteError, TokenizerError, UnknownNameError

LENGTHS = (5, 1, 12, 3, 30, 7)


def group(lengths: Sequence[int] = LENGTHS, context: int = 13, seed: int = 0, kept: bool = False) -> Group:
    draw = np.random.default_rng(seed)
    documents = [draw.integers(2, tiny.VOCAB, length) for length in lengths]
    (found,) = groups(documents, Packing(context, Bos("<bos>", 0, kept), (), 10_000))
    return found


def rows(model: Any, sites: Sequence[str], chosen: Group, **options: Any) -> tuple[Tensor, ...]:
    forward = forward_for(model, sites, options.pop("compute", None), options.pop("batch_tokens", 40))
    return forward.rows(chosen, options.pop("dtype", torch.float32))


def alone(model: vs.Model, site: str, chosen: Group) -> Tensor:
    """Rows from every context run on its own by the plain `Model.run`."""
    found = []
    for context in chosen.contexts:
        run = model.run(vs.Tokens(torch.from_numpy(context.ids)[None]), capture=[site])
        found.append(run[site][0][torch.from_numpy(context.kept)].flatten(1))
    return torch.cat(found)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_rows_of_many_documents_are_those_of_each_run_alone(name: str) -> None:
    model = families.model(name)
    sites = [str(site) for site in model.sites("layers.*.resid_post") + model.sites("layers.1.mlp_out")]
    sites += [str(site) for kind in ("z", "mlp_post") for site in model._all_sites if site.kind == kind][:1]
    chosen = group()
    for site, found in zip(sites, rows(model, sites, chosen), strict=True):
        assert found.shape[0] == sum(LENGTHS)
        torch.testing.assert_close(found, alone(model, site, chosen), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family_runs_with_bfloat16_weights(name: str) -> None:
    model = families.model(name)
    last = [str(model.sites("layers.*.resid_post")[-1])]
    exact, fast = (rows(model, last, group(), compute=compute)[0] for compute in (None, torch.bfloat16))
    assert 1e-4 < float((fast - exact).norm() / exact.norm()) < 0.1


def test_an_encoder_is_read_without_its_decoder() -> None:
    model, chosen = t5(), group()
    called = []
    model.module.decoder.register_forward_pre_hook(lambda *_: called.append(1))
    (found,) = rows(model, ["encoder.layers.1.resid_post"], chosen)
    assert called == []
    torch.testing.assert_close(found, alone(model, "encoder.layers.1.resid_post", chosen), rtol=1e-4, atol=1e-5)
    assert "only the encoder's sites have its tokens" in forward_error(model, ["decoder.layers.0.resid_post"])


def test_another_document_beside_it_changes_nothing() -> None:
    """Positive control: within a document, an earlier token does change the rows after it."""
    model, site = tiny.model("llama"), ["layers.2.resid_post"]
    (before,) = rows(model, site, group(seed=0))
    draw = np.random.default_rng(0)
    documents = [draw.integers(2, tiny.VOCAB, length) for length in LENGTHS]
    documents[2][4] = (documents[2][4] + 3) % 50 + 2
    (changed_group,) = groups(documents, Packing(13, Bos("<bos>", 0, False), (), 10_000))
    (after,) = rows(model, site, changed_group)
    moved = (before - after).abs().amax(1) > 1e-3
    assert moved.nonzero()[:, 0].tolist() == list(range(6 + 4, 6 + 12))


def test_batch_size_and_dtype_of_storage_do_not_decide_the_values() -> None:
    model, sites = tiny.model("gpt2"), ["layers.1.mlp_post", "embed"]
    base = rows(model, sites, group())
    for tokens in (1, 13, 10_000):
        for one, other in zip(base, rows(model, sites, group(), batch_tokens=tokens), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for one, other in zip(base, rows(model, sites, group(), dtype=torch.bfloat16), strict=True):
        assert torch.equal(one.bfloat16(), other)


@pytest.mark.parametrize(
    ("site", "runs", "rests"),
    [
        ("layers.1.resid_post", ["model.layers.1.mlp"], ["model.layers.2", "model.norm", "lm_head"]),
        ("layers.1.resid_pre", ["model.layers.0.mlp"], ["model.layers.1.self_attn", "model.layers.2", "lm_head"]),
        ("layers.1.attn_out", ["model.layers.1.self_attn"], ["model.layers.1.mlp", "model.layers.2", "lm_head"]),
        ("layers.1.z", ["model.layers.1.self_attn.q_proj"], ["model.layers.1.mlp", "model.layers.2", "lm_head"]),
        ("layers.0.mlp_post", ["model.layers.0.mlp.up_proj"], ["model.layers.1", "model.norm", "lm_head"]),
        ("module:model.layers.1.mlp|in", ["model.layers.1.self_attn"], ["model.layers.1.mlp.up_proj", "lm_head"]),
        ("final_norm", ["model.layers.2.mlp"], ["lm_head"]),
        ("logits", ["lm_head"], []),
    ],
)
def test_no_later_module_is_run(site: str, runs: list[str], rests: list[str]) -> None:
    model = tiny.model("llama")
    called = []
    for name, module in model.module.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    found = captured(model, vs.Tokens(torch.tensor([[3, 4, 5]])), [vs.Site.parse(site)])
    assert found[site].shape[:2] == (1, 3)
    assert set(runs) <= set(called)
    assert [name for name in called if any(f"{name}.".startswith(f"{rest}.") for rest in rests)] == []


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "albert", "gemma2"])
def test_a_pass_that_was_ended_leaves_the_model_as_it_was(name: str) -> None:
    model = families.model(name) if name in families.FAMILIES else tiny.model("llama")
    tokens = vs.Tokens(torch.tensor([[3, 4, 5, 6]]))
    before = model.run(tokens).logits
    for site in ("layers.0.resid_post", "layers.0.mlp_out"):
        captured(model, tokens, [vs.Site.parse(site)])
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules())
    assert hooks == 0
    assert torch.equal(model.run(tokens).logits, before)


def test_heads_and_neurons_by_index_globs_and_the_order_given() -> None:
    model, chosen = tiny.model("llama"), group()
    forward = forward_for(
        model, ["layers.1.z[3]", "layers.*.resid_mid", "layers.0.mlp_post[7]", "layers.1.z"], None, 99
    )
    assert [str(site) for site in forward.sites] == [
        "layers.1.z[3]", "layers.0.resid_mid", "layers.1.resid_mid", "layers.2.resid_mid", "layers.0.mlp_post[7]",
        "layers.1.z",
    ]  # fmt: skip
    assert forward.widths == (8, 48, 48, 48, 1, 48)
    head, _, _, _, neuron, z = forward.rows(chosen, torch.float32)
    assert torch.equal(head, z[:, 24:32])
    torch.testing.assert_close(neuron[:, 0], alone(model, "layers.0.mlp_post", chosen)[:, 7])


def test_two_models_on_the_same_tokens() -> None:
    one, two, chosen = tiny.model("llama", 0), tiny.model("llama", 1), group()
    forward = forward_for([one, two], ["layers.0.resid_post", "b/layers.2.mlp_out"], None, 40)
    assert [str(site) for site in forward.sites] == [
        "a/layers.0.resid_post",
        "b/layers.0.resid_post",
        "b/layers.2.mlp_out",
    ]
    found = forward.rows(chosen, torch.float32)
    for tensor, model, site in zip(
        found, (one, two, two), ("layers.0.resid_post", "layers.0.resid_post", "layers.2.mlp_out"), strict=True
    ):
        torch.testing.assert_close(tensor, alone(model, site, chosen), rtol=1e-4, atol=1e-5)
    named = forward_for({"base": one, "chat": two}, ["base/module:model.norm|in", "chat/embed"], None, 40)
    assert [str(site) for site in named.sites] == ["base/module:model.norm|in", "chat/embed"]
    assert named.to_json()["models"][1] == {"tag": "chat", "name": two.name, "sha256": two.content_hash}


def test_a_module_without_adapter() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(tiny.VOCAB, 6), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    model, chosen = vs.Model(net), group()
    (found,) = rows(model, ["module:1|out"], chosen)
    tokens = torch.cat([torch.from_numpy(context.ids[context.kept]) for context in chosen.contexts])
    torch.testing.assert_close(found, net[:2](tokens).detach())


def test_bfloat16_products_of_a_float32_model_and_their_error() -> None:
    model, site, chosen = tiny.model("llama"), ["layers.2.resid_post"], group()
    exact, fast = rows(model, site, chosen)[0], rows(model, site, chosen, compute=torch.bfloat16)[0]
    forward = forward_for(model, site, torch.bfloat16, 10_000)
    trial = forward.trial(chosen)
    error = float((fast - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.05
    assert trial.errors[site[0]] == pytest.approx(error, rel=0.05)
    assert trial.tokens_per_second > 0
    assert forward.to_json()["compute"] == "bfloat16 weights"
    for compute in (None, torch.float32):
        plain = forward_for(model, site, compute, 40)
        assert plain.trial(chosen).errors == {}
        assert plain.to_json()["compute"] == "as the model"
        assert torch.equal(plain.rows(chosen, torch.float32)[0], exact)
    low = vs.Model(tiny.llama().to(torch.bfloat16))
    assert forward_for(low, site, torch.bfloat16, 40).to_json()["compute"] == "as the model"


def test_weights_are_cast_once_and_the_model_keeps_its_own() -> None:
    model, chosen = tiny.model("llama"), group()
    before = {name: (weight.data_ptr(), weight.dtype) for name, weight in model.module.named_parameters()}
    logits = model.run(vs.Tokens(torch.tensor([[3, 4, 5]]))).logits
    forward = forward_for(model, ["layers.2.resid_post"], torch.bfloat16, 40)
    first = forward.rows(chosen, torch.float32)[0]
    with torch.profiler.profile(record_shapes=True) as profile:
        again = forward.rows(chosen, torch.float32)[0]
    casts = [event.input_shapes[0] for event in profile.events() if event.name == "aten::_to_copy"]
    assert casts
    assert [80, 48] not in casts
    assert torch.equal(first, again)
    assert {name: (weight.data_ptr(), weight.dtype) for name, weight in model.module.named_parameters()} == before
    assert torch.equal(model.run(vs.Tokens(torch.tensor([[3, 4, 5]]))).logits, logits)


def test_bfloat16_weights_are_as_if_the_model_were_loaded_so() -> None:
    low, site = vs.Model(tiny.llama().to(torch.bfloat16)), ["layers.2.resid_post"]
    # A module's `to` rounds the rotary frequencies as well, which loading does not.
    for one, other in zip(low.module.buffers(), tiny.llama().buffers(), strict=True):
        one.data = other.data
    torch.testing.assert_close(
        rows(low, site, group())[0], rows(tiny.model("llama"), site, group(), compute=torch.bfloat16)[0]
    )


def test_nan_and_overflow_are_found_and_named() -> None:
    model = tiny.model("llama")
    with torch.no_grad():
        model.module.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    rows(model, ["layers.0.resid_post"], group())
    with pytest.raises(NotFiniteError, match=r"layers\.1\.mlp_out holds NaN or infinity, first at position 1 of"):
        rows(model, ["layers.1.mlp_out"], group())
    large = tiny.model("llama")
    with torch.no_grad():
        large.module.model.embed_tokens.weight *= 1e6
    with pytest.raises(NotFiniteError, match=r"embed has values up to .*, too large for float16, .*; keep it as bf"):
        rows(large, ["embed"], group(), dtype=torch.float16)
    assert rows(large, ["embed"], group(), dtype=torch.bfloat16)[0].isfinite().all()


def test_the_first_bad_row_is_told_with_its_place_in_the_text() -> None:
    model, here = tiny.model("llama"), group()
    context = max(here.contexts, key=lambda one: one.rows)
    position = int(context.kept.nonzero()[0][2])
    with torch.no_grad():
        model.module.model.embed_tokens.weight[int(context.ids[position])] = float("inf")
    first, position = next(
        (one, int(at)) for one in here.contexts for at in one.kept.nonzero()[0] if one.ids[at] == context.ids[position]
    )
    with pytest.raises(NotFiniteError) as caught:
        rows(model, ["embed"], Group((first,)))
    place = f"position {position} of the context at token {first.offset} of document {first.document}"
    assert f"embed holds NaN or infinity, first at {place}" in str(caught.value)


def forward_error(models: Any, sites: Any, compute: Any = None, tokens: int = 40) -> str:
    with pytest.raises(InputError) as caught:
        forward_for(models, sites, compute, tokens)
    return str(caught.value)


def test_what_cannot_be_run_is_refused() -> None:
    model = tiny.model("llama")
    assert "no sites" in forward_error(model, [])
    assert "must be a list of sites, such as ['embed']" in forward_error(model, "embed")
    assert "layers.9.mlp_out: LlamaForCausalLM has 3 layers" in forward_error(model, ["layers.9.mlp_out"])
    assert "unknown site 'layers.*.nothing'" in forward_error(model, ["layers.*.nothing"])
    assert "has axes batch, head, query_pos, key_pos; rows are tokens" in forward_error(model, ["layers.0.pattern"])
    assert "no site names model b" in forward_error([model, model], ["a/embed"])
    assert "unknown tag of a model 'c'; known: a, b" in forward_error([model, model], ["c/embed"])
    assert "'x y' cannot be a tag" in forward_error({"x y": model}, ["embed"])
    assert "a list of models or a mapping" in forward_error("llama", ["embed"])
    assert "has float32 weights and cannot compute in float64" in forward_error(model, ["embed"], torch.float64)
    assert "batch_tokens must be at least 1" in forward_error(model, ["embed"], None, 0)
    training = tiny.model("llama")
    training.module.train()
    assert "is in training mode" in forward_error(training, ["embed"])
    vit = vs.Model(families.FAMILIES["vit"].build()) if "vit" in families.FAMILIES else None
    assert vit is None or "takes pixel_values, not tokens" in forward_error(vit, ["layers.0.resid_post"])
    with pytest.raises(UnknownNameError):
        forward_for(model, ["module:nowhere*|out"], None, 40)
    with pytest.raises(InputError, match=r"module:model\.rotary_emb\|out is \[1, .*rows are tokens"):
        _ = rows(model, ["module:model.rotary_emb|out"], group(lengths=(4, 9)))


def test_models_with_different_tokenizers_are_refused(demo: vs.Model) -> None:
    with pytest.raises(TokenizerError, match="a, b have different tokenizers"):
        forward_for([demo, tiny.model("llama")], ["embed"], None, 40)


def test_a_forward_says_what_it_depends_on() -> None:
    told = forward_for(tiny.model("llama"), ["embed"], None, 40).to_json()
    assert told["sites"] == [{"site": "embed", "width": 48}]
    assert isinstance(forward_for(tiny.model("llama"), ["embed"], None, 40), Forward)


PASSES: dict[str, Callable[[vs.Model], object]] = {
    "run": lambda model: model.run(vs.Tokens(IDS), capture=["layers.1.resid_post", "layers.0.pattern"]),
    "edit": lambda model: model.run(vs.Tokens(IDS), interventions=[vs.Ablate("layers.1.mlp_out")], check_finite=True),
    "generate": lambda model: model.generate(vs.Tokens(IDS), 2, capture=["layers.1.resid_post"]),
    "rows": lambda model: rows(model, ["layers.1.resid_post"], group()),
}
IDS = torch.arange(12).view(2, 6) + 3


@pytest.mark.parametrize("name", PASSES)
def test_nothing_of_a_pass_waits_for_the_garbage_collector(name: str) -> None:
    """What waits are activations, and their memory. Control: a list that holds itself does wait."""
    model = tiny.model("llama")
    PASSES[name](model)
    gc.collect()
    gc.disable()
    try:
        PASSES[name](model)
        assert gc.collect() == 0
        loop: list[object] = []
        loop.append(loop)
        del loop
        assert gc.collect() == 1
    finally:
        gc.enable()
