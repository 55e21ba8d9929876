"""Model.run leaves the model as it is, reads exactly what is there, and changes exactly what it was told to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding

import tiny
import vesalius as vs
from raw_hooks import capture_by_hand
from vesalius.adapters import Access, Adapter
from vesalius.errors import InputError, InterventionError, UnknownArchitectureError, UnknownNameError

FAMILIES = sorted(tiny.FAMILIES)
EDITABLE = {
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_in", "mlp_post", "q", "k", "v", "z", "scores",
    "pattern", "embed", "pos_embed", "final_norm", "logits",
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> vs.Model:
    return tiny.model(request.param)


@pytest.fixture(scope="module")
def tokens() -> vs.Tokens:
    """Six prompts of unequal lengths."""
    return tiny.pairs().tokens("clean")


@pytest.fixture(scope="module")
def others() -> vs.Tokens:
    return tiny.pairs().tokens("corrupted")


def close(a: Tensor, b: Tensor, logits: Tensor) -> bool:
    """Within 1e-5 of the range of the logits."""
    return float((a - b).abs().max()) <= 1e-5 * float(logits.max() - logits.min())


def hook_count(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


# ---------------------------------------------------------------------------------------------- the model is left alone


def test_a_run_without_interventions_is_bit_identical_to_the_wrapped_model(model: vs.Model, tokens: vs.Tokens) -> None:
    with torch.no_grad():
        plain = model.module(tokens.ids, attention_mask=tokens.real.long()).logits
    assert torch.equal(model.run(tokens).logits, plain)
    assert torch.equal(model.run(tokens, capture=["layers.*.z", "layers.*.resid_post"]).logits, plain)


def test_last_logits_are_the_last_of_all_logits(model: vs.Model, tokens: vs.Tokens) -> None:
    last = model.run(tokens, last_logits=True).logits
    assert last.shape == (len(tokens), 1, tiny.VOCAB)
    assert torch.allclose(last[:, 0], model.run(tokens).logits[:, -1], atol=1e-5)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_are_gone_and_attention_is_restored_after_an_interruption(
    model: vs.Model, tokens: vs.Tokens, error: type[BaseException]
) -> None:
    before = model.module.config._attn_implementation
    last = model.layer(2)
    handle = last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(error("stop")))
    hooks = hook_count(model.module)
    with pytest.raises(error, match="stop"):
        model.run(tokens, capture=["layers.*.pattern", "layers.*.z"], interventions=[vs.Ablate("layers.0.z[1]")])
    assert hook_count(model.module) == hooks
    handle.remove()
    assert model.module.config._attn_implementation == before != "vesalius"
    assert torch.equal(model.run(tokens).logits, tiny.model(model.adapter.family).run(tokens).logits)  # type: ignore[union-attr]


def test_hooks_are_gone_and_attention_is_restored_after_success(model: vs.Model, tokens: vs.Tokens) -> None:
    before, plain = model.module.config._attn_implementation, model.run(tokens).logits
    model.run(tokens, capture=["*"], interventions=[vs.Ablate("layers.1.pattern")])
    assert hook_count(model.module) == 0
    assert model.module.config._attn_implementation == before
    assert torch.equal(model.run(tokens).logits, plain)


def test_pattern_is_available_without_leaving_the_model_in_another_attention_mode(
    model: vs.Model, tokens: vs.Tokens
) -> None:
    assert model.module.config._attn_implementation == "sdpa"
    captured = model.run(tokens, capture=["layers.*.pattern"])
    eager = copy.deepcopy(model.module)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        out = eager(tokens.ids, attention_mask=tokens.real.long(), output_attentions=True)
    for layer, expected in enumerate(out.attentions):
        real = tokens.real[:, None, :, None]
        assert torch.allclose(captured[f"layers.{layer}.pattern"] * real, expected * real, atol=1e-6)
    assert close(captured.logits[tokens.real], out.logits[tokens.real], out.logits)


# ----------------------------------------------------------------------------------------------------------- identities


def test_a_no_op_patch_changes_nothing_at_any_editable_site(model: vs.Model, tokens: vs.Tokens) -> None:
    also = ["layers.0.pattern"]  # keeps every run on the same attention path
    base = model.run(tokens, capture=also).logits
    tried = [site for site in model.sites() if site.kind in EDITABLE]
    for site in tried:
        source = model.run(tokens, capture=[site, *also]).activations
        patched = model.run(tokens, capture=also, interventions=[vs.Patch(site, source=source)]).logits
        assert torch.equal(patched, base), site
    assert len(tried) == len(model.sites()) - 3  # all but the three layers' result


def test_a_real_patch_changes_something_at_every_editable_site(
    model: vs.Model, tokens: vs.Tokens, others: vs.Tokens
) -> None:
    base = model.run(tokens).logits
    sites = [site for site in model.sites() if site.kind in EDITABLE and site.kind != "pos_embed"]
    source = model.run(others, capture=sites).activations
    for site in sites:
        patched = model.run(tokens, interventions=[vs.Patch(site, source=source)]).logits
        assert float((patched - base)[tokens.real].abs().max()) > 1e-3, site


@pytest.mark.parametrize("layer", range(3))
def test_patching_everything_at_one_layer_gives_the_other_run(
    model: vs.Model, tokens: vs.Tokens, others: vs.Tokens, layer: int
) -> None:
    for kind in ("resid_pre", "resid_mid", "resid_post"):
        other = model.run(others, capture=[f"layers.{layer}.{kind}"])
        patch = vs.Patch(f"layers.{layer}.{kind}", source=other.activations)
        patched = model.run(tokens, interventions=[patch])
        assert close(patched.logits[tokens.real], other.logits[tokens.real], other.logits)


def test_what_goes_into_a_residual_stream_adds_up(model: vs.Model, tokens: vs.Tokens) -> None:
    run = model.run(tokens, capture=["*"])
    for layer in range(3):
        at = f"layers.{layer}."
        assert torch.allclose(run[at + "resid_pre"] + run[at + "attn_out"], run[at + "resid_mid"], atol=1e-5)
        assert torch.allclose(run[at + "resid_mid"] + run[at + "mlp_out"], run[at + "resid_post"], atol=1e-5)


def test_direct_contributions_with_the_frozen_final_norm_sum_to_the_logit_difference(model: vs.Model) -> None:
    pairs = tiny.pairs()
    run = model.run(pairs.tokens("clean"), capture=["*"])
    rows = torch.arange(len(pairs))
    parts = [run["layers.0.resid_pre"]] + [
        run[f"layers.{n}.{kind}"] for n in range(3) for kind in ("attn_out", "mlp_out")
    ]
    direction = model.W_U[pairs.answer] - model.W_U[pairs.distractor]
    last = run["layers.2.resid_post"][rows, pairs.at]
    norm = model.module.get_submodule(model.architecture[0].final_norm)
    centre, eps = (
        (last.mean(-1, keepdim=True), norm.eps)
        if model.architecture[0].norm == "layer"
        else (0.0, norm.variance_epsilon)
    )
    scale = norm.weight / ((last - centre).pow(2).mean(-1, keepdim=True) + eps).sqrt()
    bias = norm.bias if model.architecture[0].norm == "layer" else torch.zeros(48)
    total = (direction * bias).sum(-1)
    for part in parts:
        value = part[rows, pairs.at]
        value = value - value.mean(-1, keepdim=True) if model.architecture[0].norm == "layer" else value
        total = total + (value * scale * direction).sum(-1)
    assert torch.allclose(total, vs.logit_diff(run.logits, pairs), atol=1e-4)


# --------------------------------------------------------------------------------------------------------- what is read


def test_a_captured_tensor_is_what_a_raw_hook_sees(model: vs.Model, tokens: vs.Tokens) -> None:
    expected = capture_by_hand(model.module, tokens)
    run = model.run(tokens, capture=["*"])
    assert {str(site) for site in run.activations} == set(expected)
    for name, tensor in expected.items():
        seen = run[name]
        assert seen.shape == tensor.shape, name
        real = tokens.real if seen.shape[1] == tokens.ids.shape[1] else tokens.real[:, None].expand(seen.shape[:3])
        assert torch.allclose(seen[real], tensor[real], atol=2e-5), name


def test_axes_name_the_captured_tensor(model: vs.Model, tokens: vs.Tokens) -> None:
    layout = model.architecture[1]
    width = tokens.ids.shape[1]
    sizes = {"batch": 6, "pos": width, "query_pos": width, "key_pos": width, "head": layout.n_heads,
             "kv_head": layout.n_kv_heads, "d_head": layout.d_head, "d_model": 48, "vocab": tiny.VOCAB}  # fmt: skip
    run = model.run(tokens, capture=["*"])
    for site in run.activations:
        shape = run[site].shape
        assert len(site.axes) == len(shape)
        assert all(sizes.get(axis, size) == size for axis, size in zip(site.axes, shape, strict=True)), site


def test_heads_results_sum_to_attn_out_less_the_bias(model: vs.Model, tokens: vs.Tokens) -> None:
    run = model.run(tokens, capture=["layers.1.result", "layers.1.attn_out"])
    projection = model.layer(1).get_submodule(model.architecture[0].o_proj)
    bias = getattr(projection, "bias", None)
    total = run["layers.1.result"].sum(2) + (0 if bias is None else bias)
    assert torch.allclose(total, run["layers.1.attn_out"], atol=1e-5)


def test_z_is_pattern_times_value_with_key_value_heads_repeated(model: vs.Model, tokens: vs.Tokens) -> None:
    layout = model.architecture[1]
    run = model.run(tokens, capture=["layers.1.pattern", "layers.1.v", "layers.1.z"])
    for head in range(layout.n_heads):
        shared = head // (layout.n_heads // layout.n_kv_heads)
        by_hand = run[f"layers.1.pattern[{head}]"] @ run[f"layers.1.v[{shared}]"]
        assert torch.allclose(by_hand, run[f"layers.1.z[{head}]"], atol=1e-5)


def test_the_llama_under_test_really_groups_its_queries() -> None:
    layout = tiny.model("llama").architecture[1]
    assert (layout.n_heads, layout.n_kv_heads) == (6, 2)


def test_a_glob_with_an_index_captures_whole_tensors(model: vs.Model, tokens: vs.Tokens) -> None:
    run = model.run(tokens, capture=["layers.*.z[3]"])
    assert torch.equal(run["layers.1.z[3]"], run["layers.1.z"][:, :, 3])


def test_a_captured_site_holds_the_value_after_interventions(model: vs.Model, tokens: vs.Tokens) -> None:
    run = model.run(tokens, capture=["layers.1.z", "layers.1.resid_mid"], interventions=[vs.Ablate("layers.1.z[0]")])
    assert not run["layers.1.z[0]"].any()
    assert run["layers.1.z[1]"].any()
    run = model.run(tokens, capture=["layers.1.resid_mid"], interventions=[vs.Ablate("layers.1.resid_mid")])
    assert float(run["layers.1.resid_mid"].abs().max()) < 1e-5


# ------------------------------------------------------------------------------------- an example's numbers are its own


def test_batch_order_and_size_do_not_change_an_examples_numbers(model: vs.Model, tokens: vs.Tokens) -> None:
    names = ["layers.2.resid_post", "layers.1.z"]
    together = model.run(tokens, capture=names)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    shuffled = model.run(vs.Tokens(tokens.ids[order], tokens.real[order]), capture=names)
    for new, old in enumerate(order.tolist()):
        size = int(tokens.lengths[old])
        alone = model.run(tokens.ids[old : old + 1, :size], capture=names)
        for get in (lambda run: run.logits, *(lambda run, name=name: run[name] for name in names)):
            reference = get(together)[old, :size]
            assert close(get(shuffled)[new, :size], reference, together.logits)
            assert close(get(alone)[0], reference, together.logits)


def test_padding_side_does_not_change_an_examples_numbers(model: vs.Model, tokens: vs.Tokens) -> None:
    width = tokens.ids.shape[1]
    ids, mask = torch.zeros_like(tokens.ids), torch.zeros_like(tokens.real)
    for row, size in enumerate(tokens.lengths.tolist()):
        ids[row, width - size :], mask[row, width - size :] = tokens.ids[row, :size], True
    names = ["layers.2.resid_post", "layers.1.z", "layers.1.pattern"]
    right, left = model.run(tokens, capture=names), model.run(vs.Tokens(ids, mask), capture=names)
    for row, size in enumerate(tokens.lengths.tolist()):
        gap = width - size
        assert close(left.logits[row, gap:], right.logits[row, :size], right.logits)
        for name in names[:2]:
            assert close(left[name][row, gap:], right[name][row, :size], right.logits)
        assert close(left[names[2]][row, :, gap:, gap:], right[names[2]][row, :, :size, :size], right.logits)


# ------------------------------------------------------------------------------------------------------------ gradients


def plain_gradients(model: vs.Model, tokens: vs.Tokens, pairs: vs.Pairs) -> dict[str, Tensor]:
    """Autograd on the wrapped module with hooks that keep the tensors."""
    adapter = model.architecture[0]
    kept: dict[str, Tensor] = {}
    layer = model.layer(1)

    def keep(name: str) -> Any:
        return lambda _m, _i, out: kept.__setitem__(name, out if isinstance(out, Tensor) else out[0])

    def keep_input(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept["layers.1.z"] = args[0]

    handles = [
        layer.register_forward_hook(keep("layers.1.resid_post")),
        layer.get_submodule("mlp").register_forward_hook(keep("layers.1.mlp_out")),
        layer.get_submodule(adapter.o_proj).register_forward_pre_hook(keep_input),
    ]
    logits = model.module(tokens.ids, attention_mask=tokens.real.long()).logits
    for handle in handles:
        handle.remove()
    names = sorted(kept)
    grads = torch.autograd.grad(vs.logit_diff(logits, pairs).sum(), [kept[name] for name in names])
    return dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_through_captured_sites_equal_autograd_on_the_plain_model(
    family_model: vs.Model, frozen: bool
) -> None:
    pairs = tiny.pairs()
    tokens = pairs.tokens("clean")
    expected = plain_gradients(family_model, tokens, pairs)
    family_model.module.requires_grad_(not frozen)
    # A frozen model's graph begins at the first captured site: capture the embedding, so that it reaches the others.
    run = family_model.run(tokens, capture=["embed", *expected], grad=True)
    found = torch.autograd.grad(vs.logit_diff(run.logits, pairs).sum(), [run[name] for name in expected])
    family_model.module.requires_grad_(True)
    for (name, wanted), got in zip(expected.items(), found, strict=True):
        assert wanted.abs().max() > 0
        assert torch.allclose(got.reshape(wanted.shape), wanted, atol=1e-5, rtol=1e-4), name


@pytest.fixture(params=FAMILIES)
def family_model(request: pytest.FixtureRequest) -> vs.Model:
    return tiny.model(request.param)


def test_gradients_reach_queries_keys_values_and_the_pattern(family_model: vs.Model, tokens: vs.Tokens) -> None:
    """Against a central difference along a random direction; Llama's norm rounds to float32, so the step is large."""
    names = [f"layers.1.{kind}" for kind in ("q", "k", "v", "z", "pattern", "scores", "mlp_post", "resid_mid")]
    module = family_model.module.double()
    run = family_model.run(tokens, capture=[*names, "layers.0.pattern"], grad=True)
    grads = dict(zip(names, torch.autograd.grad(run.logits[:, 5, 7].sum(), [run[name] for name in names]), strict=True))
    for name in names:
        generator = torch.Generator().manual_seed(1)
        step = 1e-3 * torch.randn(run[name].shape, generator=generator, dtype=torch.float64)
        step = torch.where(torch.isfinite(run[name]) & (run[name] > -1e30), step, 0.0)
        ends = [
            family_model.run(
                tokens,
                capture=["layers.0.pattern"],
                interventions=[vs.Patch(name, source=run[name].detach() + sign * step)],
            ).logits[:, 5, 7].sum()
            for sign in (1, -1)
        ]  # fmt: skip
        assert float(ends[0] - ends[1]) == pytest.approx(float(2 * (grads[name] * step).sum()), rel=1e-2, abs=1e-6), (
            name
        )
    assert module.dtype == torch.float64


def test_without_grad_no_graph_is_kept(model: vs.Model, tokens: vs.Tokens) -> None:
    run = model.run(tokens, capture=["layers.1.z"])
    assert not run.logits.requires_grad
    assert not run["layers.1.z"].requires_grad


# ------------------------------------------------------------------------------------------- modules without an adapter


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.spare = nn.Linear(5, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embed(x))
        return self.out(hidden)


def test_modules_of_a_plain_network_are_read_and_edited_by_path() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    x = torch.randn(5, 4)
    wrapped = vs.Model(net)
    run = wrapped.run(x, capture=["module:0|out", "module:2|in"])
    assert torch.equal(run["module:0|out"], net[0](x))
    assert torch.equal(run["module:2|in"], net[1](net[0](x)))
    edited = wrapped.run(x, interventions=[vs.Ablate("module:1|out")])
    assert torch.allclose(edited.logits, net[2].bias.expand(5, 2))
    assert [str(site) for site in wrapped.sites()] == ["module:0|out", "module:1|out", "module:2|out"]
    assert len(wrapped.run(x, capture=["module:*|in"]).activations) == 4  # the root counts


def test_the_first_of_several_outputs_is_the_one_read_and_edited() -> None:
    torch.manual_seed(0)
    net, x = Tagger().eval(), torch.arange(8).view(2, 4)
    run = vs.Model(net).run(x, capture=["module:lstm|out"])
    assert torch.allclose(run["module:lstm|out"], net.lstm(net.embed(x))[0])
    half = vs.Patch("module:lstm|out", source=run["module:lstm|out"] * 0.5)
    assert torch.allclose(vs.Model(net).run(x, interventions=[half]).logits, net.out(run["module:lstm|out"] * 0.5))


def test_an_output_that_is_a_mapping_is_read_and_edited_by_its_first_tensor() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"note": "no tensor", "hidden": x + 1, "other": x + 2}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.named = Named()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            made = self.named(x)
            return {"logits": made["hidden"] * 2 + made["other"]}

    x = torch.arange(6.0).view(2, 3)
    run = vs.Model(Net()).run(x, capture=["module:named|out"], interventions=[vs.Ablate("module:named|out")])
    assert torch.equal(run.logits, x + 2)
    plain = vs.Model(Net()).run(x, capture=["module:named|out"])
    assert torch.equal(plain["module:named|out"], x + 1)
    assert torch.equal(plain.logits, (x + 1) * 2 + x + 2)


def test_a_transformers_models_own_output_is_one_too(model: vs.Model, tokens: vs.Tokens) -> None:
    path = "transformer" if model.architecture[0].family == "gpt2" else "model"
    run = model.run(tokens, capture=[f"module:{path}|out", "final_norm"])
    assert torch.equal(run[f"module:{path}|out"], run["final_norm"])
    cut = model.run(tokens, interventions=[vs.Ablate(f"module:{path}|out")])
    assert not cut.logits.any()


def test_a_tokenizers_output_is_run_as_it_is(model: vs.Model, tokens: vs.Tokens) -> None:
    encoded = BatchEncoding({"input_ids": tokens.ids, "attention_mask": tokens.real.long(),
                             "token_type_ids": torch.zeros_like(tokens.ids)})  # fmt: skip
    assert torch.equal(model.run(encoded).logits, model.run(tokens).logits)
    for bad in ({"attention_mask": tokens.real}, {**encoded, "labels": tokens.ids}, {"ids": [[1, 2]]}):
        with pytest.raises(InputError, match=r"must hold input_ids and may hold attention_mask, decoder"):
            model.run(bad)


def test_several_arguments_and_keywords_are_handed_on() -> None:
    layer = nn.Bilinear(3, 4, 2)
    x, y = torch.randn(5, 3), torch.randn(5, 4)
    assert torch.equal(vs.Model(layer).run((x, y)).logits, layer(x, y))
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    q, kv = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    run = vs.Model(attention).run({"query": q, "key": kv, "value": kv, "need_weights": False})
    assert torch.allclose(run.logits, attention(q, kv, kv)[0], atol=1e-6)  # the first of two outputs


def test_module_sites_of_a_model_with_an_adapter_are_its_tensors(model: vs.Model, tokens: vs.Tokens) -> None:
    path = f"{model.architecture[0].layers}.1.mlp"
    base = model.run(tokens, capture=[f"module:{path}|out", f"module:{path}|in", "layers.1.mlp_out", "layers.1.mlp_in"])
    assert torch.equal(base[f"module:{path}|out"], base["layers.1.mlp_out"])
    assert torch.equal(base[f"module:{path}|in"], base["layers.1.mlp_in"])
    for positions in (None, [2], "last", torch.tensor([0, 1, 2, 3, 4, 5]), tokens.real):
        for by_path, by_name in ((f"module:{path}|out", "layers.1.mlp_out"), (f"module:{path}|in", "layers.1.mlp_in")):
            noise = [vs.Noise(site, scale=1.0, positions=positions) for site in (by_path, by_name)]
            assert torch.equal(*(model.run(tokens, interventions=[edit]).logits for edit in noise))
    vector = torch.randn(48, generator=torch.Generator().manual_seed(0))
    steer = [vs.Steer(site, scale=2.0, vector=vector, positions=[1, 9])
             for site in (f"module:{path}|out", "layers.1.mlp_out")]  # fmt: skip
    made = [model.generate(tokens, 4, [edit]) for edit in steer]
    assert made[0].new == made[1].new
    assert torch.allclose(made[0].logits, made[1].logits, atol=1e-5)


def test_an_intervention_whose_site_never_fires_is_an_error() -> None:
    wrapped = vs.Model(Tagger().eval())
    with pytest.raises(InterventionError, match=r"module:spare\|out never fired"):
        wrapped.run(torch.zeros(1, 3, dtype=torch.long), interventions=[vs.Ablate("module:spare|out")])
    with pytest.raises(InterventionError, match=r"module:spare\|out never fired"):
        wrapped.run(torch.zeros(1, 3, dtype=torch.long), capture=["module:spare|out"])


def test_a_module_that_is_not_there_names_its_siblings() -> None:
    with pytest.raises(InputError, match=r"no module 'lstm2' in Tagger .* embed, lstm, spare, out"):
        vs.Model(Tagger()).run(torch.zeros(1, 3, dtype=torch.long), capture=["module:lstm2|out"])
    with pytest.raises(UnknownNameError, match=r"known: .*module:lstm\|out"):
        vs.Model(Tagger()).sites("module:lstm2|out")


def test_layer_sites_need_an_adapter() -> None:
    with pytest.raises(InputError, match="has no adapter"):
        vs.Model(Tagger()).run(torch.zeros(1, 3, dtype=torch.long), capture=["layers.0.z"])


def test_your_own_transformer_works_with_your_own_adapter(tokens: vs.Tokens) -> None:
    """The same network under another class name, described from outside."""
    family = tiny.model("llama")
    mine = type("MyNet", (type(family.module),), {})
    net = copy.deepcopy(family.module)
    net.__class__ = mine
    ways = (
        r"no adapter for MyNet; known: .*GPT2LMHeadModel, .*LlamaForCausalLM.*T5ForConditionalGeneration.*\. Ways out: "
        r"write one, most often a known one with a few fields changed \(dataclasses.replace\), "
        r"vs.Model\(net, adapter=vs.Adapter\(...\)\), and try it with vs.check_adapter\(model\); or go without, "
        r"vs.Model\(net, adapter=None\), and use module:<path>\|out sites."
    )
    with pytest.raises(UnknownArchitectureError, match=ways):
        vs.Model(net)
    without = vs.Model(net, adapter=None)
    by_path = without.run(tokens, capture=["module:model.layers.1|out", "module:model|out"])
    assert torch.equal(by_path.logits, family.run(tokens).logits)  # the padding mask is handed on
    assert torch.equal(by_path["module:model.layers.1|out"], family.run(tokens, capture=["layers.1.resid_post"])[
        "layers.1.resid_post"])  # fmt: skip
    adapter = Adapter(
        family="mine", classes=("MyNet",), layers="model.layers",
        sites={"resid_post": Access(""), "z": Access("self_attn.o_proj", "in", heads="head")}, outside={},
        o_proj="self_attn.o_proj", final_norm="model.norm", unembed="lm_head", norm="rms",
        config={"n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "d_model": "hidden_size",
                "vocab": "vocab_size"},
    )  # fmt: skip
    own = vs.Model(net, adapter=adapter)
    assert {site.kind for site in own.sites()} == {"resid_post", "z", "result"}
    assert torch.equal(
        own.run(tokens, capture=["layers.1.z"])["layers.1.z"], family.run(tokens, capture=["layers.1.z"])["layers.1.z"]
    )


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layers.7.z", "has 3 layers, numbered from 0"),
        ("layers.0.z[9]", r"has \d heads per layer, numbered from 0"),
        ("layers.0.pattern[9]", r"has \d heads per layer"),
        ("layers.0.k[6]", r"has \d key-value heads per layer"),
        ("layers.0.resid_post[48]", "has 48 dimensions"),
        ("layers.0.zz", r"unknown site inside a layer 'zz'; known: attn_out, .*resid_post"),
        ("layers.0", "is not a site name. Examples: layers.5.resid_post"),
        ("module:nope|out", "no module 'nope'"),
    ],
)
def test_a_site_this_model_does_not_have_is_refused(
    model: vs.Model, tokens: vs.Tokens, name: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        model.run(tokens, capture=[name])
    with pytest.raises(InputError, match=message):
        model.run(tokens, interventions=[vs.Ablate(name)])


def test_a_neuron_past_the_end_is_refused(model: vs.Model, tokens: vs.Tokens) -> None:
    with pytest.raises(InputError, match=r"layers.0.mlp_post\[999\]: the tensor there has \d+ of these"):
        model.run(tokens, interventions=[vs.Ablate("layers.0.mlp_post[999]")])


def test_a_site_that_was_not_captured_lists_those_that_were(model: vs.Model, tokens: vs.Tokens) -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown captured site 'layers.1.z'; known: layers.0.z. Add it to capture="
    ):
        model.run(tokens, capture=["layers.0.z"])["layers.1.z"]


def test_a_token_outside_the_vocabulary_is_refused(model: vs.Model) -> None:
    with pytest.raises(InputError, match=r"token id 61 is outside .* vocabulary of 61"):
        model.run(torch.tensor([[5, 61]]))


@pytest.mark.parametrize("bad", [3.5, None, [[1, 2]]])
def test_inputs_that_are_no_inputs_are_refused(model: vs.Model, bad: Any) -> None:
    with pytest.raises(InputError, match="inputs must be Tokens"):
        model.run(bad)


def test_text_needs_a_tokenizer(model: vs.Model) -> None:
    with pytest.raises(InputError, match="has no tokenizer"):
        model.run("hello")


def test_a_head_contribution_cannot_be_edited(model: vs.Model, tokens: vs.Tokens) -> None:
    with pytest.raises(InterventionError, match=r"edit layers.1.z instead"):
        model.run(tokens, interventions=[vs.Ablate("layers.1.result")])


def test_a_model_in_training_mode_is_refused_where_dropout_would_make_runs_random() -> None:
    model = tiny.model("gpt2")
    model.module.train()
    with pytest.raises(InterventionError, match=r"dropout is not supported; call model.module.eval\(\)"):
        model.run(torch.tensor([[5, 6]]), capture=["layers.0.pattern"])


def test_the_content_hash_sees_every_weight() -> None:
    one, same, other = tiny.model("llama"), tiny.model("llama"), tiny.model("llama")
    with torch.no_grad():
        other.module.model.norm.weight[0] += 1
    assert one.content_hash == same.content_hash != other.content_hash
