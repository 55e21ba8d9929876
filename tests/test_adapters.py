"""Every family: captures are what raw hooks see, edits act, sums add up, and strange configs are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

import families
import tiny
import vesalius as vs
from families import FAMILIES, Family
from vesalius.adapters import KNOWN, Access, adapter_for
from vesalius.adapters.understood import check_config
from vesalius.errors import InputError, SelfCheckError, UnknownArchitectureError
from vesalius.model.attention import Plain
from vesalius.model.direct import direct_effects

MIXTURES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "gpt_oss")
POST_NORM = ("gemma2", "gemma3", "gemma3 (images)", "olmo2", "olmo3")
DIRECT = sorted(name for name, family in FAMILIES.items() if family.direct)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def model(family: Family) -> vs.Model:
    return vs.Model(family.build())


@pytest.fixture(scope="module")
def tokens() -> vs.Tokens:
    """Prompts of unequal lengths."""
    return tiny.pairs(n=4).tokens("clean")


@pytest.fixture(scope="module")
def others() -> vs.Tokens:
    return tiny.pairs(n=4).tokens("corrupted")


def plain_logits(net: nn.Module, tokens: vs.Tokens) -> Tensor:
    with torch.no_grad():
        return net(tokens.ids, attention_mask=tokens.real.long()).logits


def layers(model: vs.Model) -> range:
    return range(model.architecture[1].n_layers)


# -------------------------------------------------------------------------------------------------- what is read


def test_a_run_without_edits_is_bit_identical(model: vs.Model, tokens: vs.Tokens) -> None:
    plain = plain_logits(model.module, tokens)
    assert torch.equal(model.run(tokens).logits, plain)
    names = [str(site) for site in model.sites() if site.kind not in ("scores", "pattern")]
    assert torch.equal(model.run(tokens, capture=names).logits, plain)


def test_every_layer_site_is_what_a_raw_hook_sees(family: Family, model: vs.Model, tokens: vs.Tokens) -> None:
    expected = families.raw_layers(family, model.module, tokens)
    run = model.run(tokens, capture=[site for site in model.sites() if site.kind not in ("scores", "pattern")])
    for name, raw in expected.items():
        # Early releases of transformers 5 return a router's probabilities, of which only the logits' order is left.
        probabilities = name.endswith("router") and bool((raw >= 0).all())
        if not name.endswith("pattern") and not probabilities:
            assert torch.equal(run[name].reshape(raw.shape), raw), name
    computed = {"result", "pattern", "scores", "expert_out"}
    kinds = {site.kind for site in model.sites() if site.layer is not None}
    assert {name.split(".")[-1] for name in expected} - computed == kinds - computed


def test_every_site_outside_the_layers_is_what_a_raw_hook_sees(
    family: Family, model: vs.Model, tokens: vs.Tokens
) -> None:
    expected = families.raw_outside(family, model.module, tokens)
    assert {str(site) for site in model.sites() if site.layer is None} == set(expected)
    run = model.run(tokens, capture=sorted(expected))
    for name, raw in expected.items():
        assert torch.equal(run[name], raw), name


def test_the_pattern_is_the_softmax_of_the_scores(family: Family, model: vs.Model, tokens: vs.Tokens) -> None:
    run = model.run(tokens, capture=["layers.*.pattern"])
    for site in model.sites():
        if site.kind == "scores":
            scores = model.run(tokens, capture=[site])[site]
            if family.sinks:
                sinks = model.layer(site.layer).self_attn.sinks.detach()[:, None, None]
                scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1)
            assert torch.allclose(
                scores.softmax(-1)[..., : tokens.ids.shape[1]], run[f"layers.{site.layer}.pattern"], atol=1e-6
            )


def test_head_counts_are_the_configs(family: Family, model: vs.Model, tokens: vs.Tokens) -> None:
    layout = model.architecture[1]
    assert (layout.n_heads, layout.n_kv_heads) == family.heads
    run = model.run(tokens, capture=["layers.1.*"])
    for kind, count in (("q", layout.n_heads), ("z", layout.n_heads), ("k", layout.n_kv_heads)):
        if latent(family):  # queries are wider than values, and no module returns keys
            assert run[f"layers.1.{kind}"].shape[2:] == (count, 10 if kind == "q" else 8) if kind != "k" else True
        else:
            assert run[f"layers.1.{kind}"].shape[2:] == (count, layout.d_head)


def latent(family: Family) -> bool:
    """Latent attention: no module returns keys and values."""
    return "kv_lora_rank" in family.sizes


def test_the_pattern_is_the_eager_models(model: vs.Model, tokens: vs.Tokens) -> None:
    eager = eager_twin(model)
    with torch.no_grad():
        out = eager(tokens.ids, attention_mask=tokens.real.long(), output_attentions=True)
    run = model.run(tokens, capture=["layers.*.pattern"])
    real = tokens.real[:, None, :, None]
    for layer, expected in enumerate(out.attentions):
        assert torch.allclose(run[f"layers.{layer}.pattern"] * real, expected * real, atol=1e-5)


def eager_twin(model: vs.Model) -> nn.Module:
    twin = type(model.module)(model.module.config).eval()
    twin.load_state_dict(model.module.state_dict())
    if model.architecture[0].attention:
        twin.set_attn_implementation("eager")
    return twin


def test_z_is_pattern_times_value(family: Family, model: vs.Model, tokens: vs.Tokens) -> None:
    if latent(family):
        return
    layout = model.architecture[1]
    run = model.run(tokens, capture=["layers.1.pattern", "layers.1.v", "layers.1.z"])
    for head in range(layout.n_heads):
        shared = head // (layout.n_heads // layout.n_kv_heads)
        by_hand = run[f"layers.1.pattern[{head}]"] @ run[f"layers.1.v[{shared}]"]
        assert torch.allclose(by_hand[tokens.real], run[f"layers.1.z[{head}]"][tokens.real], atol=1e-4)


def test_what_is_written_to_the_residual_stream_adds_up(family: Family, model: vs.Model, tokens: vs.Tokens) -> None:
    run = model.run(tokens, capture=["*"])
    for layer in layers(model):
        at = f"layers.{layer}."
        middle = run[at + "resid_pre"] + run[at + "attn_out"]
        if family.additive:
            assert torch.allclose(middle + run[at + "mlp_out"], run[at + "resid_post"], atol=1e-4)
            if family.raw.get("resid_mid"):
                assert torch.allclose(middle, run[at + "resid_mid"], atol=1e-4)
        else:
            assert normed(middle, run[at + "resid_mid"], model, layer)
            assert normed(run[at + "resid_mid"] + run[at + "mlp_out"], run[at + "resid_post"], model, layer)


def normed(before: Tensor, after: Tensor, model: vs.Model, layer: int) -> bool:
    """One of the layer's LayerNorms takes `before` to `after`."""
    norms = [module for module in model.layer(layer).modules() if isinstance(module, nn.LayerNorm)]
    with torch.no_grad():
        return any(torch.allclose(norm(before), after, atol=1e-4) for norm in norms)


def test_heads_results_sum_to_attn_out_less_the_bias(model: vs.Model, tokens: vs.Tokens) -> None:
    adapter = model.architecture[0]
    for layer in layers(model):
        run = model.run(tokens, capture=[f"layers.{layer}.{kind}" for kind in ("result", "attn_out", "z")])
        projection = model.layer(layer).get_submodule(adapter.o_proj)
        bias = getattr(projection, "bias", None)
        total = run[f"layers.{layer}.result"].sum(2)
        if bias is not None and adapter.attn_norm:
            with torch.no_grad():
                before = projection(run[f"layers.{layer}.z"].flatten(2))
                # The frozen norm multiplies the bias by the same numbers as everything else.
                bias = bias * run[f"layers.{layer}.attn_out"] / before
        expected = run[f"layers.{layer}.attn_out"] - (0 if bias is None else bias)
        assert torch.allclose(total, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", POST_NORM)
def test_a_norm_after_attention_is_frozen_in_each_heads_result(name: str, tokens: vs.Tokens) -> None:
    model = families.model(name)
    run = model.run(tokens, capture=["layers.0.result", "layers.0.z", "layers.0.attn_out"])
    bare = torch.einsum("bphd,hdm->bphm", run["layers.0.z"], model.W_O(0))
    factor = (run["layers.0.result"] / bare)[tokens.real]
    assert torch.allclose(factor, factor[:, :1], rtol=1e-2)  # one factor for all heads
    assert not torch.allclose(factor, torch.ones(()), atol=0.1)


# ------------------------------------------------------------------------------------------------------------ edits


def editable(model: vs.Model, layer: int) -> list[vs.Site]:
    """Every site of one layer, and those outside layers."""
    return [site for site in model.sites() if site.kind != "result" and site.layer in (None, layer)]


def test_a_no_op_patch_changes_nothing_at_any_site(model: vs.Model, tokens: vs.Tokens) -> None:
    through = ["layers.0.pattern"]  # keeps every run on the same attention path
    run = model.run(tokens, capture=[*through, *editable(model, 0)])
    for site in editable(model, 0):
        patched = model.run(tokens, capture=through, interventions=[vs.Patch(site, source=run.activations)])
        assert torch.equal(patched.logits, run.logits), site


def test_a_real_patch_changes_something_at_every_site(model: vs.Model, tokens: vs.Tokens, others: vs.Tokens) -> None:
    base, source = model.run(tokens), model.run(others, capture=editable(model, 1)).activations
    for site in editable(model, 1):
        if site.kind != "pos_embed":
            patched = model.run(tokens, interventions=[vs.Patch(site, source=source)])
            assert float((patched.logits - base.logits)[tokens.real].abs().max()) > 1e-4, site


def test_patching_a_whole_residual_stream_gives_the_other_run(
    family: Family, model: vs.Model, tokens: vs.Tokens, others: vs.Tokens
) -> None:
    kinds = ["resid_pre", "resid_post", *(["resid_mid"] if family.raw.get("resid_mid") else [])]
    for layer in layers(model):
        for kind in kinds:
            other = model.run(others, capture=[f"layers.{layer}.{kind}"])
            patched = model.run(tokens, interventions=[vs.Patch(f"layers.{layer}.{kind}", source=other.activations)])
            assert torch.allclose(patched.logits[tokens.real], other.logits[tokens.real], atol=1e-4)


def test_an_edited_head_is_edited_alone(family: Family, model: vs.Model, tokens: vs.Tokens) -> None:
    for kind in ("q", "z") if latent(family) else ("q", "k", "v", "z"):
        base = model.run(tokens, capture=[f"layers.0.{kind}"])[f"layers.0.{kind}"]
        cut = model.run(tokens, capture=[f"layers.0.{kind}"], interventions=[vs.Ablate(f"layers.0.{kind}[1]")])
        found = cut[f"layers.0.{kind}"]
        assert not found[:, :, 1].any()
        keep = [head for head in range(base.shape[2]) if head != 1]
        assert torch.equal(found[:, :, keep], base[:, :, keep])


# ---------------------------------------------------------------------------------------------------- direct effects


@pytest.mark.parametrize("name", DIRECT)
def test_direct_contributions_sum_to_the_logit_difference(name: str) -> None:
    """Before the cap, where the family has one: the site logits is read there. Scales of the logits count."""
    model, pairs = families.model(name), tiny.pairs(n=4)
    direct = direct_effects(model, pairs, pairs.tokens("clean"))
    run = model.run(pairs.tokens("clean"), capture=["logits"])
    logits = run["logits"] if name == "gemma2" else run.logits
    assert torch.allclose(direct.total(), vs.logit_diff(logits, pairs), atol=2e-4)


@pytest.mark.parametrize(
    ("name", "forgotten"),
    [("granite", "residual_multiplier"), ("granite", "logits_scaling"), ("cohere", "logit_scale")],
)
def test_a_scale_that_an_adapter_forgets_is_caught_by_the_runs_own_logits(name: str, forgotten: str) -> None:
    net, pairs = FAMILIES[name].build(), tiny.pairs(n=4)
    known = families.model(name).architecture[0]
    sites = {kind: replace(access, scaled=False) for kind, access in known.sites.items()}
    adapter = {
        "residual_multiplier": replace(known, sites=sites, config={**known.config, "residual_scale": "not_there"}),
        "logits_scaling": replace(known, logits_over=""),
        "logit_scale": replace(known, config={k: v for k, v in known.config.items() if k != "logit_scale"}),
    }[forgotten]
    if forgotten == "residual_multiplier":
        adapter = replace(adapter, config={k: v for k, v in known.config.items() if k != "residual_scale"})
    model = vs.Model(net, adapter=adapter)
    with pytest.raises(SelfCheckError, match=f"lacks a scale .*{forgotten}="):
        direct_effects(model, pairs, pairs.tokens("clean"))


def test_gemma_2s_cap_is_on_a_runs_logits_and_not_on_the_site(tokens: vs.Tokens) -> None:
    run = families.model("gemma2").run(tokens, capture=["logits"])
    assert torch.allclose(torch.tanh(run["logits"] / 3.0) * 3.0, run.logits, atol=1e-6)
    assert float(run["logits"].abs().max()) > 3.0 >= float(run.logits.abs().max())


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(DIRECT)))
def test_direct_effects_are_refused_where_the_logits_are_no_sum(name: str) -> None:
    pairs = tiny.pairs(n=4)
    with pytest.raises(InputError, match="has no direct effects"):
        direct_effects(families.model(name), pairs, pairs.tokens("clean"))


# ------------------------------------------------------------------------------------------------------ mixtures


@pytest.fixture(params=MIXTURES)
def mixture(request: pytest.FixtureRequest) -> vs.Model:
    return families.model(request.param)


def test_expert_outputs_sum_to_mlp_out_less_the_shared_expert(mixture: vs.Model, tokens: vs.Tokens) -> None:
    run = mixture.run(tokens, capture=["layers.1.expert_out", "layers.1.mlp_out", "layers.1.mlp_in"])
    block, hidden = mixture.layer(1).mlp, run["layers.1.mlp_in"]
    shared = torch.zeros_like(hidden)
    if hasattr(block, "shared_expert"):
        with torch.no_grad():
            shared = torch.sigmoid(block.shared_expert_gate(hidden)) * block.shared_expert(hidden)
    assert torch.allclose(run["layers.1.expert_out"].sum(2) + shared, run["layers.1.mlp_out"], atol=1e-4)


def test_an_experts_output_is_its_weighted_gated_mlp(mixture: vs.Model, tokens: vs.Tokens) -> None:
    run = mixture.run(tokens, capture=["layers.0.expert_out", "layers.0.mlp_in", "layers.0.router"])
    experts, hidden = mixture.layer(0).mlp.experts, run["layers.0.mlp_in"]
    chances = run["layers.0.router"].softmax(-1)
    best = chances.topk(2, -1)
    family = mixture.architecture[0].family
    norm = family in ("mixtral", "gpt_oss") or mixture.module.config.norm_topk_prob
    with torch.no_grad():
        for expert in range(5):
            if family == "gpt_oss":
                both = hidden @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
                gate, up = both[..., ::2].clamp(max=7), both[..., 1::2].clamp(-7, 7)
                out = (up + 1) * gate * torch.sigmoid(gate * 1.702)
                out = out @ experts.down_proj[expert] + experts.down_proj_bias[expert]
            else:
                gate, up = (hidden @ experts.gate_up_proj[expert].T).chunk(2, -1)
                out = (nn.functional.silu(gate) * up) @ experts.down_proj[expert].T
            weight = (best.values * (best.indices == expert)).sum(-1) / (best.values.sum(-1) if norm else 1)
            assert torch.allclose(run[f"layers.0.expert_out[{expert}]"], out * weight[..., None], atol=1e-4)


def test_an_ablated_router_logit_sends_tokens_elsewhere(mixture: vs.Model, tokens: vs.Tokens) -> None:
    base = mixture.run(tokens, capture=["layers.0.router", "layers.0.expert_out"])
    busy = int(base["layers.0.expert_out"][tokens.real].norm(dim=-1).sum(0).argmax())
    never = torch.full_like(base["layers.0.router"][..., busy], -1e9)
    shut = vs.Patch(f"layers.0.router[{busy}]", source=never)
    run = mixture.run(tokens, capture=["layers.0.expert_out"], interventions=[shut])
    assert not run[f"layers.0.expert_out[{busy}]"].any()
    used = (run["layers.0.expert_out"].norm(dim=-1) > 0).sum(-1)
    assert bool((used == 2).all())  # two other experts, not one


def test_an_ablated_expert_takes_its_contribution_away(mixture: vs.Model, tokens: vs.Tokens) -> None:
    names = ["layers.1.mlp_out", "layers.1.expert_out"]
    base = mixture.run(tokens, capture=names)
    cut = mixture.run(tokens, capture=names, interventions=[vs.Ablate("layers.1.expert_out[3]")])
    expected = base["layers.1.mlp_out"] - base["layers.1.expert_out[3]"]
    assert torch.allclose(cut["layers.1.mlp_out"], expected, atol=1e-5)
    assert base["layers.1.expert_out[3]"].any()


def test_gradients_reach_the_router_and_the_experts(mixture: vs.Model, tokens: vs.Tokens) -> None:
    names = ["layers.0.router", "layers.0.expert_out"]
    mixture.module.config._experts_implementation = "eager"  # the fast one knows no float64
    mixture.module.double()
    run = mixture.run(tokens, capture=names, grad=True)
    plain = mixture.run(tokens).logits
    assert torch.allclose(run.logits, plain, atol=1e-4)
    for name, grad in zip(names, torch.autograd.grad(run.logits[:, 3, 5].sum(), [run[n] for n in names]), strict=True):
        generator = torch.Generator().manual_seed(0)
        # So small that no token is sent to another expert.
        step = 1e-4 * torch.randn(grad.shape, generator=generator, dtype=torch.float64)
        step = step if name.endswith("router") else step * (run[name] != 0)
        ends = [
            mixture.run(tokens, interventions=[vs.Patch(name, source=run[name].detach() + sign * step)]).logits
            for sign in (1, -1)
        ]
        measured = float((ends[0] - ends[1])[:, 3, 5].sum())
        assert measured == pytest.approx(float(2 * (grad * step).sum()), rel=0.02, abs=1e-6), name


def test_an_expert_past_the_end_is_refused(mixture: vs.Model, tokens: vs.Tokens) -> None:
    with pytest.raises(InputError, match="has 5 experts per layer, numbered from 0"):
        mixture.run(tokens, capture=["layers.0.router[5]"])


# ---------------------------------------------------------------------------------------------- shared layers, images


def test_an_edit_of_one_shared_layer_leaves_the_others_alone(tokens: vs.Tokens) -> None:
    model = families.model("albert")
    base = model.run(tokens, capture=["layers.*.z"])
    cut = model.run(tokens, capture=["layers.*.z"], interventions=[vs.Ablate("layers.1.z")])
    assert torch.equal(cut["layers.0.z"], base["layers.0.z"])
    assert not cut["layers.1.z"].any()
    assert cut["layers.2.z"].any()
    assert not torch.equal(cut["layers.2.z"], base["layers.2.z"])


def test_the_edited_call_of_a_shared_layer_is_the_one_asked_for(tokens: vs.Tokens) -> None:
    model, calls = families.model("albert"), []

    def second_call(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        calls.append(1)
        return (torch.zeros_like(args[0]),) if len(calls) == 2 else None

    handle = model.layer(0).get_submodule("attention.dense").register_forward_pre_hook(second_call)
    expected = plain_logits(model.module, tokens)
    handle.remove()
    assert torch.equal(model.run(tokens, interventions=[vs.Ablate("layers.1.z")]).logits, expected)


def vit() -> vs.Model:
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=40, image_size=8,
                       patch_size=4, initializer_range=0.2, num_labels=7)  # fmt: skip
    return vs.Model(ViTForImageClassification(config).eval())


def test_an_image_model_is_read_and_edited_like_the_others() -> None:
    model, images = vit(), torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model.module(images).logits
    run = model.run(images, capture=["*"])
    assert torch.equal(model.run(images, capture=["layers.*.z", "layers.*.resid_mid"]).logits, plain)
    assert torch.allclose(run.logits, plain, atol=1e-5)
    assert run["layers.1.z"].shape == (3, 5, 6, 8)
    for layer in range(2):
        at = f"layers.{layer}."
        middle = run[at + "resid_pre"] + run[at + "attn_out"]
        assert torch.allclose(middle, run[at + "resid_mid"], atol=1e-5)
        assert torch.allclose(middle + run[at + "mlp_out"], run[at + "resid_post"], atol=1e-5)
        by_head = torch.einsum("bhqk,bkhd->bqhd", run[at + "pattern"], run[at + "v"])
        assert torch.allclose(by_head, run[at + "z"], atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(model.module.classifier(run["final_norm"][:, 0]), plain, atol=1e-5)
    cut = model.run(images, interventions=[vs.Ablate("layers.1.resid_post")])
    assert torch.allclose(cut.logits, cut.logits[:1].expand(3, -1))
    assert not torch.allclose(cut.logits, plain)


def test_an_image_model_refuses_tokens() -> None:
    with pytest.raises(InputError, match=r"takes images \[batch, channel, height, width\]"):
        vit().run(torch.zeros(1, 4, dtype=torch.long))


SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 40,
         "initializer_range": 0.2}  # fmt: skip


TOWERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "clip (vision)": (lambda t: t.CLIPVisionModel(t.CLIPVisionConfig(**SMALL, image_size=8, patch_size=4)), (3, 8, 8)),
    "whisper (encoder)": (
        lambda t: t.WhisperModel(
            t.WhisperConfig(
                d_model=48, encoder_layers=2, encoder_attention_heads=6, encoder_ffn_dim=40, decoder_layers=1,
                decoder_attention_heads=2, decoder_ffn_dim=16, num_mel_bins=4, max_source_positions=10, vocab_size=30,
                init_std=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            )
        ).get_encoder(),
        (4, 20),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TOWERS))
def test_a_tower_of_a_larger_model_is_read_and_edited_alone(name: str) -> None:
    build, shape = TOWERS[name]
    torch.manual_seed(0)
    net = build(transformers).eval()
    model, inputs = vs.Model(net), torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    assert model.architecture[0].family == name
    with torch.no_grad():
        plain = net(inputs).last_hidden_state
    assert torch.equal(model.run(inputs).logits, plain)
    run = model.run(inputs, capture=["*"])
    for layer in range(2):
        at = f"layers.{layer}."
        middle = run[at + "resid_pre"] + run[at + "attn_out"]
        assert torch.allclose(middle, run[at + "resid_mid"], atol=1e-5)
        assert torch.allclose(middle + run[at + "mlp_out"], run[at + "resid_post"], atol=1e-5)
        by_head = torch.einsum("bhqk,bkhd->bqhd", run[at + "pattern"], run[at + "v"])
        assert torch.allclose(by_head, run[at + "z"], atol=1e-5)
        zeroed = [0.0 * model.run(inputs, capture=[at + "z"])[at + "z"]]
        handle = model.layer(layer).self_attn.out_proj.register_forward_pre_hook(
            lambda _module, args, value=zeroed[0]: (value.flatten(2),)
        )
        with torch.no_grad():
            expected = net(inputs).last_hidden_state
        handle.remove()
        assert torch.equal(model.run(inputs, interventions=[vs.Ablate(at + "z")]).logits, expected)


def test_the_text_tower_of_clip_is_causal_and_takes_tokens(tokens: vs.Tokens) -> None:
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(**SMALL, vocab_size=tiny.VOCAB, eos_token_id=2, bos_token_id=1)
    net = transformers.CLIPTextModel(config).eval()
    model = vs.Model(net)
    with torch.no_grad():
        plain = net(tokens.ids, attention_mask=tokens.real.long()).last_hidden_state
    run = model.run(tokens, capture=["layers.*.z", "layers.1.pattern", "layers.1.v"])
    assert torch.allclose(run.logits, plain, atol=1e-5)
    assert not run["layers.1.pattern"].triu(1).any()
    by_head = torch.einsum("bhqk,bkhd->bqhd", run["layers.1.pattern"], run["layers.1.v"])
    assert torch.allclose(by_head[tokens.real], run["layers.1.z"][tokens.real], atol=1e-5)


def test_a_state_space_model_is_read_edited_and_swept_by_module_sites() -> None:
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=tiny.VOCAB, hidden_size=24, num_hidden_layers=2, state_size=4)
    net = transformers.MambaForCausalLM(config).eval()
    with pytest.raises(UnknownArchitectureError, match=r"no adapter for MambaForCausalLM.*adapter=None"):
        vs.Model(net)
    model, pairs = vs.Model(net, adapter=None), tiny.pairs(n=4)
    site = "module:backbone.layers.0.mixer|out"
    ids = pairs.tokens("clean").ids[:1, :6]
    seen: list[Tensor] = []
    handle = net.backbone.layers[0].mixer.register_forward_hook(lambda _m, _a, out: seen.append(out.clone()))
    with torch.no_grad():
        net(ids)
    handle.remove()
    assert torch.equal(model.run(vs.Tokens(ids), capture=[site])[site], seen[0])
    scores = vs.sweep(model, pairs, sites=[site], each="position", sink=lambda _event: None)
    source = model.run(vs.Tokens(ids), capture=[site]).activations
    row = vs.Tokens(pairs.tokens("corrupted").ids[:1, : int(pairs.size[0])])
    clean = vs.Tokens(pairs.tokens("clean").ids[:1, : int(pairs.size[0])])
    source = model.run(clean, capture=[site]).activations
    where = torch.zeros(1, row.ids.shape[1], dtype=torch.bool)
    where[:, 2] = True
    run = model.run(row, interventions=[vs.Patch(site, source=source, positions=where)])
    expected = vs.logit_diff(run.logits, pairs.subset([0]))
    assert torch.allclose(scores.values[0, 2, :1], expected, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- any module


class Squeeze(nn.Module):
    """Squeeze and excitation: channels weighted by what the whole image holds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class Inverted(nn.Module):
    """Inverted bottleneck with a depthwise convolution, as in EfficientNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(width, 3 * width, 1), nn.BatchNorm2d(3 * width), nn.SiLU(),
            nn.Conv2d(3 * width, 3 * width, 3, padding=1, groups=3 * width), nn.SiLU(), Squeeze(3 * width),
            nn.Conv2d(3 * width, width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def test_a_convolutional_network_is_read_and_edited_by_module() -> None:
    torch.manual_seed(0)
    stem, body, head = nn.Conv2d(3, 4, 3, stride=2), nn.Sequential(Inverted(4), Inverted(4)), nn.Linear(4, 5)
    net = nn.Sequential(stem, body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()
    model, images = vs.Model(net), torch.randn(2, 3, 9, 9)
    run = model.run(images, capture=["module:1.0|out", "module:1.1.block.5|in", "module:4|in"])
    with torch.no_grad():
        assert torch.equal(run["module:1.0|out"], body[0](stem(images)))
        cut = model.run(images, interventions=[vs.Ablate("module:1.1.block|out")])
        assert torch.allclose(cut.logits, head(run["module:1.0|out"].mean((2, 3))), atol=1e-6)
        assert torch.equal(model.run(images).logits, net(images))


# ---------------------------------------------------------------------------------------------------------- refusals


def test_every_known_class_is_found_by_its_own_adapter(family: Family, model: vs.Model) -> None:
    assert model.architecture[0].family == family.name.replace("llama with biases", "llama")
    assert family.model in model.architecture[0].classes


def test_a_field_nobody_knows_is_refused_by_name_and_value(family: Family) -> None:
    net = family.build()
    net.config.mystery_scale = 3.5
    with pytest.raises(UnknownArchitectureError, match=r"config.mystery_scale=3.5, a field that the .* does not"):
        adapter_for(net)
    net.config.mystery_scale = False  # a switch that is off
    assert adapter_for(net) is not None


def test_a_declared_field_that_is_not_understood_is_refused_unless_at_its_default() -> None:
    adapter = next(adapter for adapter in KNOWN if adapter.family == "llama")
    unaware = replace(adapter, understood=adapter.understood - {"mlp_bias"})
    check_config(unaware, FAMILIES["llama"].build())
    with pytest.raises(UnknownArchitectureError, match=r"LlamaForCausalLM has config.mlp_bias=True"):
        check_config(unaware, FAMILIES["llama"].build(mlp_bias=True))


def test_fields_of_files_and_training_are_let_through() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**families.GROUPED, is_llama_config=True, rope_interleaved=False, attention_dropout=0.3,
                         torch_dtype="float32", use_cache=False, **{"transformers.js_config": {"a": 1}})  # fmt: skip
    config.base_model_tp_plan = {"layers.*.mlp.up_proj": "colwise"}
    assert adapter_for(LlamaForCausalLM(config)) is not None


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("bloom", {"offset_alibi": 100, "attention_softmax_in_fp32": True, "seq_length": 64, "pretraining_tp": 4}),
        ("opt", {"activation_dropout": 0.1, "prefix": "</s>", "layerdrop": 0.1}),
        ("albert", {"net_structure_type": 0, "down_scale_factor": 1, "position_embedding_type": "absolute"}),
        ("bert", {"gradient_checkpointing": True, "position_embedding_type": "absolute"}),
        ("gemma3", {"cache_implementation": "hybrid", "rope_local_base_freq": 1e4}),
        ("gpt_neox", {"rotary_pct": 0.25, "rotary_emb_base": 1e4}),
    ],
)
def test_what_published_configs_bring_along_is_let_through(name: str, more: dict[str, Any]) -> None:
    assert vs.Model(FAMILIES[name].build(**more)).adapter is not None


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"pretraining_tp": 2}, "config.pretraining_tp=2"),
        ("gemma2", {"use_bidirectional_attention": True}, "config.use_bidirectional_attention=True"),
        ("gemma3", {"attn_logit_softcapping": 5.0}, r"config.attn_logit_softcapping=5.0; .* understands \(None,\)"),
        ("opt", {"do_layer_norm_before": False}, "config.do_layer_norm_before=False"),
        ("opt", {"word_embed_proj_dim": 16}, "only the value of config.hidden_size, 48"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm=True"),
        ("olmoe", {"clip_qkv": 2.0}, "config.clip_qkv=2.0"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, r"config.mlp_only_layers=\[0\]"),
        ("qwen2_moe", {"decoder_sparse_step": 2}, "config.decoder_sparse_step=2"),
        ("bert", {"is_decoder": True}, "config.is_decoder=True"),
        ("albert", {"inner_group_num": 2}, "config.inner_group_num=2"),
    ],
)
def test_a_config_that_changes_what_sites_mean_is_refused(name: str, change: dict[str, Any], message: str) -> None:
    net = FAMILIES[name].build(**change)
    with pytest.raises(UnknownArchitectureError, match=message):
        vs.Model(net)


def test_parallel_and_serial_neox_are_told_apart() -> None:
    assert "resid_mid" not in families.model("gpt_neox").architecture[0].sites
    assert "resid_mid" in families.model("gpt_neox (serial)").architecture[0].sites


# -------------------------------------------------------------------------------------------------- the probe at load


def test_attention_that_a_release_calls_otherwise_is_an_error_that_names_the_release(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = FAMILIES["llama"].build()
    half = Plain.__call__

    def other(self: Plain, module: nn.Module, q: Tensor, *rest: Any) -> Tensor:
        return half(self, module, q / 2, *rest)

    monkeypatch.setattr(Plain, "__call__", other)
    told = rf"with every site captured differ by .* transformers {transformers.__version__} calls LlamaForCausalLM"
    with pytest.raises(SelfCheckError, match=told):
        vs.Model(net)
    assert vs.Model(net, probe=False).adapter is not None
    found = vs.check_adapter(net)
    assert [promise.name for promise in found.promises if promise.holds is False] == ["parity"]


def test_a_module_that_a_release_no_longer_has_is_named_with_the_release() -> None:
    net = FAMILIES["llama"].build()
    net.head = net.lm_head
    del net.lm_head
    told = (
        rf"transformers {transformers.__version__} is built otherwise than the llama adapter says: no module 'lm_head'"
    )
    with pytest.raises(UnknownArchitectureError, match=told):
        vs.Model(net)


def test_a_bound_on_scores_that_sdpa_leaves_out_takes_the_model_to_eager_attention(tokens: vs.Tokens) -> None:
    """transformers before 5.18 gives Gemma 2 SDPA by default."""
    net, eager = FAMILIES["gemma2"].build(), FAMILIES["gemma2"].build()
    eager.set_attn_implementation("eager")
    net.config._attn_implementation_internal = "sdpa"
    model = vs.Model(net)
    assert model.note == "attention set to eager: SDPA leaves out attn_logit_softcapping=2.0"
    assert torch.equal(model.run(tokens).logits, plain_logits(eager, tokens))
    assert torch.equal(plain_logits(net, tokens), plain_logits(eager, tokens))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_refused_with_the_way_out() -> None:
    net = FAMILIES["llama"].build()
    with pytest.raises(InputError, match=r"compiled by torch.compile.*vs.Model\(net._orig_mod\), a LlamaForCausalLM"):
        vs.Model(torch.compile(net))
    net.model.layers[0].compile()
    with pytest.raises(InputError, match=r"model.layers.0 \(LlamaDecoderLayer\) was compiled in place"):
        vs.Model(net)


def test_a_model_in_training_mode_is_opened_without_a_probe() -> None:
    model = vs.Model(FAMILIES["llama"].build().train())
    with pytest.raises(InputError, match="is in training mode"):
        vs.check_adapter(model)


# -------------------------------------------------------------------------------------------------------- check_adapter


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "gptj", "bert", "deepseek_v3"])
def test_every_promise_of_a_known_adapter_holds_or_does_not_apply(name: str) -> None:
    found = vs.check_adapter(families.model(name))
    assert found.holds, found
    applies = {promise.name for promise in found.promises if promise.holds}
    assert {"run", "parity", "sites", "edits", "sweeps", "logits"} <= applies
    assert ("direct effects" in applies) == FAMILIES[name].direct


@pytest.mark.parametrize(
    ("wrong", "failing", "told"),
    [
        ({"sites": {"attn_out": Access("mlp")}}, {"stream", "heads", "direct effects"}, "off by"),
        ({"sites": {"mlp_post": Access("mlp.nowhere")}}, {"sites", "parity", "edits"}, "no module 'nowhere' in mlp"),
        ({"config": {"n_kv_heads": "num_attention_heads"}}, {"attention"}, ""),
        ({"norm": "layer"}, {"direct effects"}, "the sum of all contributions differs"),
    ],
)
def test_what_is_wrong_with_an_adapter_is_told_by_the_promise_that_fails(
    wrong: dict[str, Any], failing: set[str], told: str
) -> None:
    known = families.model("llama").architecture[0]
    adapter = replace(
        known,
        **{key: {**getattr(known, key), **value} if isinstance(value, dict) else value for key, value in wrong.items()},
    )
    found = vs.check_adapter(vs.Model(FAMILIES["llama"].build(), adapter=adapter, probe=False))
    failed = {promise.name: promise.detail for promise in found.promises if promise.holds is False}
    assert failing <= set(failed), found
    assert any(told in detail for detail in failed.values()), found
    assert not found.holds
    assert f"NO   {min(failing)}" in repr(found)
    assert f"<td>NO</td><th>{min(failing)}</th>" in found._repr_html_()


def test_an_image_models_adapter_is_checked_on_images() -> None:
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = vs.check_adapter(vit(), images)
    assert found.holds, found
    assert found["sweeps"].holds is None
    with pytest.raises(InputError, match="takes no tokens: give some of what it takes"):
        vs.check_adapter(vit())
