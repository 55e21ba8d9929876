"""T5: captures are what raw hooks see on both stacks, edits act, sums add up, sweeps equal plain edited runs."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

import tiny
import vesalius as vs
from vesalius.errors import InputError, InterventionError, NotFiniteError, UnknownArchitectureError, UnknownNameError
from vesalius.jobs import Event

SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCAB, "d_model": 48, "d_kv": 10, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3,
    "num_heads": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 6,
    "decoder_start_token_id": 0,
}  # fmt: skip
STACKS = {"encoder": 2, "decoder": 3}
DECODER = torch.tensor([[0, 7, 9, 4]]).expand(4, -1)


def t5(**changes: Any) -> vs.Model:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    net = T5ForConditionalGeneration(T5Config(**{**SIZES, **changes})).eval()
    for name, parameter in net.named_parameters():
        # Norms of one and biases of zero would hide what they do; T5's own start is too small for its attention.
        parameter.data += (0.2 if "norm" in name else 0.1) * torch.randn_like(parameter)
    return vs.Model(net)


@pytest.fixture(scope="module", params=["relu", "gated-gelu"])
def model(request: pytest.FixtureRequest) -> vs.Model:
    return t5(feed_forward_proj=request.param)


@pytest.fixture(scope="module")
def pairs() -> vs.Pairs:
    return replace(tiny.pairs(n=4), decoder=DECODER)


@pytest.fixture(scope="module")
def tokens(pairs: vs.Pairs) -> vs.Tokens:
    return pairs.tokens("clean")


def plain(model: vs.Model, tokens: vs.Tokens) -> Tensor:
    with torch.no_grad():
        return model.module(input_ids=tokens.ids, attention_mask=tokens.real.long(), decoder_input_ids=DECODER).logits


def raw(model: vs.Model, tokens: vs.Tokens) -> dict[str, Tensor]:
    """Every tensor of a module by site name, from hooks registered here."""
    seen: dict[str, Tensor] = {}
    net: Any = model.module
    where: list[tuple[Any, str, str]] = [(net.lm_head, "out", "logits")]
    for stack, blocks in (("encoder", net.encoder.block), ("decoder", net.decoder.block)):
        where += [(getattr(net, stack).final_layer_norm, "out", f"{stack}.final_norm"),
                  (blocks[0], "in", f"{stack}.embed")]  # fmt: skip
        for number, block in enumerate(blocks):
            at, attention, mlp = f"{stack}.layers.{number}.", block.layer[0].SelfAttention, block.layer[-1]
            where += [(block, "in", at + "resid_pre"), (block, "out", at + "resid_post"),
                      (block.layer[0], "out", at + "resid_mid"), (mlp.DenseReluDense, "in", at + "mlp_in"),
                      (mlp.DenseReluDense, "out", at + "mlp_out"), (mlp.DenseReluDense.wo, "in", at + "mlp_post"),
                      (attention, "out", at + "attn_out")]  # fmt: skip
            attentions = [("", attention)]
            if stack == "decoder":
                cross = block.layer[1].EncDecAttention
                attentions.append(("cross_", cross))
                where += [(block.layer[1], "out", at + "resid_mid_cross"), (cross, "out", at + "cross_attn_out")]
            for word, module in attentions:
                where += [(getattr(module, kind), "out", at + word + kind) for kind in "qkv"]
                where.append((module.o, "in", at + word + "z"))
    handles = [_hook(module, side, name, seen) for module, side, name in where]
    plain(model, tokens)
    for handle in handles:
        handle.remove()
    return seen


def _hook(module: Any, side: str, name: str, seen: dict[str, Tensor]) -> Any:
    def on_output(_module: Any, _args: Any, out: Any) -> None:
        seen[name] = (out if isinstance(out, Tensor) else out[0]).clone()

    def on_input(_module: Any, args: Any) -> None:
        seen[name] = args[0].clone()

    return module.register_forward_hook(on_output) if side == "out" else module.register_forward_pre_hook(on_input)


# -------------------------------------------------------------------------------------------------- what is read


def test_a_run_without_edits_is_bit_identical(model: vs.Model, tokens: vs.Tokens) -> None:
    names = [str(site) for site in model.sites() if site.kind[-6:] not in ("scores", "attern")]
    assert torch.equal(model.run(tokens).logits, plain(model, tokens))
    assert torch.equal(model.run(tokens, capture=names).logits, plain(model, tokens))
    assert model.run(tokens).logits.shape == (4, 4, tiny.VOCAB)


def test_every_site_of_both_stacks_is_what_a_raw_hook_sees(model: vs.Model, tokens: vs.Tokens) -> None:
    expected = raw(model, tokens)
    computed = ("scores", "pattern", "result")
    named = {str(site) for site in model.sites() if not site.kind.endswith(computed)}
    assert named == set(expected)
    run = model.run(tokens, capture=sorted(named))
    for name, tensor in expected.items():
        assert torch.equal(run[name].reshape(tensor.shape), tensor), name
    assert run["decoder.layers.2.cross_k"].shape == (4, 9, 4, 10)  # the encoder's tokens
    assert run["decoder.layers.2.cross_z"].shape == (4, 4, 4, 10)


def test_axes_name_the_captured_tensor(model: vs.Model, tokens: vs.Tokens) -> None:
    run = model.run(tokens, capture=["*"])
    assert set(run.activations) == set(model.sites())
    sizes = {"batch": 4, "head": 4, "kv_head": 4, "d_head": 10, "d_model": 48, "d_mlp": 40, "vocab": 61,
             "source_pos": 9}  # fmt: skip
    for site in run.activations:
        own = 9 if site.of_encoder else 4
        named = {**sizes, "pos": own, "query_pos": own, "key_pos": own}
        assert run[site].shape == tuple(named[axis] for axis in site.axes), site


def test_sites_come_in_forward_order(model: vs.Model) -> None:
    names = [str(site) for site in model.sites()]
    steps = ["encoder.embed", "encoder.layers.0.resid_pre", "encoder.layers.1.resid_post", "encoder.final_norm",
             "decoder.embed", "decoder.layers.0.resid_mid", "decoder.layers.0.cross_q",
             "decoder.layers.0.cross_attn_out", "decoder.layers.0.resid_mid_cross", "decoder.layers.0.mlp_in",
             "decoder.layers.2.resid_post", "decoder.final_norm", "logits"]  # fmt: skip
    assert [names.index(step) for step in steps] == sorted(names.index(step) for step in steps)
    assert not any("cross" in name for name in names if name.startswith("encoder"))


def test_patterns_are_the_eager_models(model: vs.Model, tokens: vs.Tokens) -> None:
    eager = T5ForConditionalGeneration(model.module.config).eval()
    eager.load_state_dict(model.module.state_dict())
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        out = eager(input_ids=tokens.ids, attention_mask=tokens.real.long(), decoder_input_ids=DECODER,
                    output_attentions=True)  # fmt: skip
    run = model.run(tokens, capture=["*pattern"])
    for name, found in (("encoder.layers.{}.pattern", out.encoder_attentions),
                        ("decoder.layers.{}.pattern", out.decoder_attentions),
                        ("decoder.layers.{}.cross_pattern", out.cross_attentions)):  # fmt: skip
        assert len(found) == STACKS[name.split(".")[0]]
        real = tokens.real[:, None, :, None] if "encoder" in name[:7] else torch.ones(1)
        for layer, expected in enumerate(found):
            assert torch.allclose(run[name.format(layer)] * real, expected * real, atol=1e-5), (name, layer)


def test_scores_are_queries_times_keys_plus_the_bias_of_the_distance(model: vs.Model, tokens: vs.Tokens) -> None:
    at = "encoder.layers.1."
    run = model.run(tokens, capture=[at + kind for kind in ("q", "k", "scores")])
    products = torch.einsum("bqhd,bkhd->bhqk", run[at + "q"], run[at + "k"])
    size = int(tokens.lengths[0])
    bias = (run[at + "scores"] - products)[0, :, :size, :size]
    for distance in range(1 - size, size):
        diagonal = bias.diagonal(distance, 1, 2)
        assert torch.allclose(diagonal, diagonal[:, :1].expand_as(diagonal), atol=1e-4)
    assert float((bias[:, 0, 1] - bias[:, 0, 5]).abs().max()) > 0.05
    cross = model.run(tokens, capture=["decoder.layers.0.cross_q", "decoder.layers.0.cross_k",
                                       "decoder.layers.0.cross_scores"])  # fmt: skip
    products = torch.einsum("bqhd,bkhd->bhqk", cross["decoder.layers.0.cross_q"], cross["decoder.layers.0.cross_k"])
    found = cross["decoder.layers.0.cross_scores"]
    assert torch.allclose(found[0, :, :, :size], products[0, :, :, :size], atol=1e-4)


def test_z_is_pattern_times_value_and_results_sum_to_attn_out(model: vs.Model, tokens: vs.Tokens) -> None:
    run = model.run(tokens, capture=["*"])
    for stack, layers in STACKS.items():
        for word in ("", "cross_") if stack == "decoder" else ("",):
            for layer in range(layers):
                at = f"{stack}.layers.{layer}.{word}"
                z = torch.einsum("bhqk,bkhd->bqhd", run[at + "pattern"], run[at + "v"])
                assert torch.allclose(z, run[at + "z"], atol=1e-4)
                assert torch.allclose(run[at + "result"].sum(2), run[at + "attn_out"], atol=1e-4)


def test_what_is_written_to_the_residual_streams_adds_up(model: vs.Model, tokens: vs.Tokens) -> None:
    run = model.run(tokens, capture=["*"])
    for stack, layers in STACKS.items():
        for layer in range(layers):
            at = f"{stack}.layers.{layer}."
            stream = run[at + "resid_pre"] + run[at + "attn_out"]
            assert torch.allclose(stream, run[at + "resid_mid"], atol=1e-4)
            if stack == "decoder":
                stream = stream + run[at + "cross_attn_out"]
                assert torch.allclose(stream, run[at + "resid_mid_cross"], atol=1e-4)
            assert torch.allclose(stream + run[at + "mlp_out"], run[at + "resid_post"], atol=1e-4)


def test_batch_and_padding_do_not_change_an_examples_numbers(model: vs.Model, tokens: vs.Tokens) -> None:
    names = ["encoder.layers.1.resid_post", "decoder.layers.2.cross_z"]
    together = model.run(tokens, capture=names)
    span = float(together.logits.max() - together.logits.min())
    for row in range(4):
        size = int(tokens.lengths[row])
        alone = model.run(vs.Tokens(tokens.ids[row : row + 1, :size], decoder=DECODER[:1]), capture=names)
        assert float((alone.logits[0] - together.logits[row]).abs().max()) < 1e-5 * span
        assert torch.allclose(alone[names[0]][0], together[names[0]][row, :size], atol=1e-4)
        assert torch.allclose(alone[names[1]][0], together[names[1]][row], atol=1e-4)


def test_without_decoder_tokens_the_start_token_is_given(model: vs.Model, tokens: vs.Tokens) -> None:
    alone = model.run(replace(tokens, decoder=None), capture=["decoder.layers.0.resid_pre"])
    assert alone.logits.shape == (4, 1, tiny.VOCAB)
    assert torch.allclose(alone.logits[:, 0], model.run(tokens).logits[:, 0], atol=1e-5)
    assert alone.activations.tokens is not None
    assert torch.equal(alone.activations.tokens.decoder, torch.zeros(4, 1, dtype=torch.long))


def test_what_the_module_takes_is_taken_too(model: vs.Model, tokens: vs.Tokens) -> None:
    given = {"input_ids": tokens.ids, "attention_mask": tokens.real.long(), "decoder_input_ids": DECODER}
    assert torch.equal(model.run(given).logits, model.run(tokens).logits)


# ------------------------------------------------------------------------------------------------------------ edits


def editable(model: vs.Model) -> list[vs.Site]:
    return [site for site in model.sites() if not site.kind.endswith("result") and site.layer in (None, 1)]


def test_writing_a_sites_own_value_back_changes_nothing(model: vs.Model, tokens: vs.Tokens) -> None:
    run = model.run(tokens, capture=["decoder.layers.0.pattern", *editable(model)])
    for site in editable(model):
        patched = model.run(tokens, capture=["decoder.layers.0.pattern"],
                            interventions=[vs.Patch(site, source=run.activations)])  # fmt: skip
        assert torch.equal(patched.logits, run.logits), site


def test_another_runs_value_changes_something_at_every_site(
    model: vs.Model, tokens: vs.Tokens, pairs: vs.Pairs
) -> None:
    other = replace(pairs.tokens("corrupted"), decoder=(DECODER + 3) % tiny.VOCAB)
    base, source = model.run(tokens).logits, model.run(other, capture=editable(model)).activations
    for site in editable(model):
        patched = model.run(tokens, interventions=[vs.Patch(site, source=source)]).logits
        assert float((patched - base).abs().max()) > 1e-5, site


def test_patching_the_encoders_last_layer_gives_the_other_prompts_run(
    model: vs.Model, tokens: vs.Tokens, pairs: vs.Pairs
) -> None:
    """All that the decoder knows of the prompt is there."""
    other = model.run(pairs.tokens("corrupted"), capture=["encoder.layers.1.resid_post"])
    swap = vs.Patch("encoder.layers.1.resid_post", source=other.activations)
    patched = model.run(tokens, interventions=[swap]).logits
    assert torch.allclose(patched, other.logits, atol=1e-4)
    assert not torch.allclose(model.run(tokens).logits, other.logits, atol=1e-3)


def test_without_cross_attention_the_prompt_is_not_felt(model: vs.Model, pairs: vs.Pairs) -> None:
    deaf = [vs.Ablate(f"decoder.layers.{layer}.cross_z") for layer in range(3)]
    runs = [model.run(pairs.tokens(which), interventions=deaf).logits for which in ("clean", "corrupted")]
    assert torch.equal(*runs)


def test_an_ablated_head_equals_zeroed_weights_of_its_own_attention_only(model: vs.Model, tokens: vs.Tokens) -> None:
    for name, path in (("encoder.layers.1.z[2]", "encoder.block.1.layer.0.SelfAttention.o"),
                       ("decoder.layers.1.z[2]", "decoder.block.1.layer.0.SelfAttention.o"),
                       ("decoder.layers.1.cross_z[2]", "decoder.block.1.layer.1.EncDecAttention.o")):  # fmt: skip
        weight = model.module.get_submodule(path).weight
        kept = weight.data.clone()
        weight.data[:, 20:30] = 0
        expected = plain(model, tokens)
        weight.data.copy_(kept)
        assert torch.allclose(model.run(tokens, interventions=[vs.Ablate(name)]).logits, expected, atol=1e-5), name


@pytest.mark.parametrize("kind", ["pattern", "scores"])
def test_an_edited_pattern_is_the_one_asked_for(model: vs.Model, tokens: vs.Tokens, kind: str) -> None:
    names = ["encoder.layers.0.pattern", "decoder.layers.0.pattern", "decoder.layers.0.cross_pattern",
             "decoder.layers.1.cross_pattern"]  # fmt: skip
    base = model.run(tokens, capture=names)
    cut = vs.Patch(f"decoder.layers.0.cross_{kind}[1]", source=torch.tensor([1.0, *[-1e9 * (kind == "scores")] * 8]),
                   positions=[2])  # fmt: skip
    run = model.run(tokens, capture=names, interventions=[cut])
    for name in names[:2]:
        assert torch.equal(run[name], base[name])
    only_first = torch.eye(9)[0].expand(4, 9)
    assert torch.allclose(run[names[2]][:, 1, 2], only_first)
    assert torch.equal(run[names[2]][:, [0, 2, 3]], base[names[2]][:, [0, 2, 3]])
    assert torch.equal(run[names[2]][:, 1, [0, 1, 3]], base[names[2]][:, 1, [0, 1, 3]])
    assert not torch.equal(run[names[3]], base[names[3]])


def test_positions_are_those_of_the_stack_the_site_is_in(model: vs.Model, tokens: vs.Tokens) -> None:
    for name, width in (("encoder.layers.0.z", 9), ("decoder.layers.0.z", 4), ("decoder.layers.1.cross_v", 9)):
        whole = replace(tokens, mask=None)
        base = model.run(whole, capture=[name])[name]
        run = model.run(whole, capture=[name], interventions=[vs.Ablate(name, positions=[width - 1])])
        assert torch.equal(run[name][:, :-1], base[:, :-1])
        assert not run[name][:, -1].any()
        with pytest.raises(InputError, match=f"position {width} is outside the prompts' {width} tokens"):
            model.run(tokens, interventions=[vs.Ablate(name, positions=[width])])
    by_name = model.run(replace(tokens, named_positions={"here": torch.tensor([1, 2, -1, 0])}),
                        interventions=[vs.Ablate("encoder.layers.0.z", positions="here")])  # fmt: skip
    mask = torch.zeros(4, 9, dtype=torch.bool)
    mask[0, 1] = mask[1, 2] = mask[3, 0] = True
    by_mask = model.run(tokens, interventions=[vs.Ablate("encoder.layers.0.z", positions=mask)])
    assert torch.equal(by_name.logits, by_mask.logits)
    with pytest.raises(UnknownNameError, match=r"unknown position 'here'; known: first, last"):
        model.run(replace(tokens, named_positions={"here": torch.zeros(4, dtype=torch.long)}),
                  interventions=[vs.Ablate("decoder.layers.0.z", positions="here")])  # fmt: skip


def test_means_are_over_the_stacks_own_real_tokens(model: vs.Model, tokens: vs.Tokens) -> None:
    for name in ("encoder.layers.0.mlp_out", "decoder.layers.0.mlp_out", "decoder.layers.0.cross_v"):
        source = model.run(tokens, capture=[name])
        real = torch.ones(4, 4).bool() if "0.mlp" in name and "decoder" in name else tokens.real
        run = model.run(tokens, capture=[name],
                        interventions=[vs.Ablate(name, mode="mean", reference=source.activations)])  # fmt: skip
        assert torch.allclose(run[name][0, 0], source[name][real].mean(0), atol=1e-5), name


def test_a_replacement_reads_the_encoder_from_the_decoder(model: vs.Model, tokens: vs.Tokens) -> None:
    swap = vs.Replace("encoder.final_norm", "decoder.layers.1.cross_attn_out", lambda x: x[:, :4], "copy")
    run = model.run(tokens, capture=["encoder.final_norm", "decoder.layers.1.cross_attn_out"], interventions=[swap])
    assert torch.equal(run["decoder.layers.1.cross_attn_out"], run["encoder.final_norm"][:, :4])
    with pytest.raises(InterventionError, match=r"which this pass makes only after encoder.layers.0.z"):
        model.run(tokens, interventions=[vs.Replace("decoder.embed", "encoder.layers.0.z", torch.clone, "copy")])


def test_gradients_reach_both_stacks(model: vs.Model, tokens: vs.Tokens) -> None:
    names = ["encoder.layers.0.z", "encoder.layers.1.pattern", "decoder.layers.1.cross_pattern", "decoder.layers.0.v"]
    net = T5ForConditionalGeneration(model.module.config).eval().double()
    net.load_state_dict(model.module.state_dict())
    double = vs.Model(net.double())
    run = double.run(tokens, capture=names, grad=True)
    for name, grad in zip(names, torch.autograd.grad(run.logits[:, 3, 5].sum(), [run[n] for n in names]), strict=True):
        step = 1e-4 * torch.randn(grad.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        ends = [
            double.run(tokens, interventions=[vs.Patch(name, source=run[name].detach() + sign * step)]).logits
            for sign in (1, -1)
        ]
        measured = float((ends[0] - ends[1])[:, 3, 5].sum())
        assert measured == pytest.approx(float(2 * (grad * step).sum()), rel=0.02, abs=1e-6), name


def test_nan_is_reported_with_its_stack(model: vs.Model, tokens: vs.Tokens) -> None:
    broken = vs.Replace("decoder.layers.1.cross_z", "decoder.layers.1.cross_z", lambda x: x * float("nan"), "nan",
                        positions=[2])  # fmt: skip
    with pytest.raises(NotFiniteError, match=r"decoder.layers.1.cross_z is the first site with NaN: example 0, posit"):
        model.run(tokens, interventions=[broken], check_finite=True)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules()) == 0
    assert (
        model.module.encoder.config._attn_implementation == model.module.decoder.config._attn_implementation == "sdpa"
    )


# ------------------------------------------------------------------------------------------------------------- writing


def test_writing_equals_transformers_own_greedy_search(model: vs.Model, tokens: vs.Tokens) -> None:
    made = model.generate(replace(tokens, decoder=None), 4, capture="decoder.layers.1.cross_pattern")
    with torch.no_grad():
        own = model.module.generate(
            input_ids=tokens.ids, attention_mask=tokens.real.long(), max_new_tokens=4, do_sample=False,
            eos_token_id=None, pad_token_id=0, use_cache=False,
        )  # fmt: skip
    assert torch.tensor(made.new).tolist() == own[:, 1:].tolist()
    assert made.logits.shape == (4, 4, tiny.VOCAB)
    assert made.tokens.decoder is not None
    assert made.tokens.decoder.shape == (4, 5)
    assert made["decoder.layers.1.cross_pattern"].shape == (4, 4, 4, tokens.ids.shape[1])


def test_writing_with_edits_equals_running_every_longer_prompt_anew(model: vs.Model, tokens: vs.Tokens) -> None:
    """Positions are each stack's own, and values given for whole sequences are cut to what is written."""
    source = model.run(
        replace(tokens.take(torch.tensor([1, 0, 3, 2])), decoder=torch.arange(8).expand(4, -1)), capture=["*"]
    ).activations

    def edits(width: int) -> list[Any]:
        values = {name: source[name] for name in ("decoder.layers.0.z", "decoder.layers.1.pattern")}
        written = [n for n in (5, 6) if n < width]
        return [
            vs.Ablate("encoder.layers.1.z[2]", positions=[1]),
            vs.Steer("encoder.layers.0.resid_post", scale=1.0, vector=torch.ones(48), positions="last"),
            vs.Patch("decoder.layers.0.z[1]", source=values["decoder.layers.0.z"][:, :width, 1], positions=[2]),
            vs.Patch("decoder.layers.1.pattern[0]", source=values["decoder.layers.1.pattern"][:, 0, :width, :width],
                     positions=[3]),
            *([vs.Ablate("decoder.layers.1.cross_z", positions=written)] if written else []),
            vs.Noise("decoder.layers.2.resid_post", scale=0.5),
        ]  # fmt: skip

    made = model.generate(tokens, 4, edits(7), capture=["decoder.layers.1.z"])
    decoder = DECODER
    for number in range(4):
        run = model.run(replace(tokens, decoder=decoder), ["decoder.layers.1.z"], edits(decoder.shape[1]))
        assert torch.allclose(run.logits[:, -1], made.logits[:, number], atol=1e-5)
        decoder = torch.cat([decoder, run.logits[:, -1].argmax(-1)[:, None]], 1)
    assert made.tokens.decoder is not None
    assert torch.equal(made.tokens.decoder, decoder)
    assert torch.allclose(made["decoder.layers.1.z"], run["decoder.layers.1.z"], atol=1e-5)
    assert made.new != model.generate(tokens, 4).new
    assert {entry["pass"] for entry in made.diagnostics} == {0, 1, 2, 3}


def test_a_stop_token_ends_writing(model: vs.Model, tokens: vs.Tokens) -> None:
    full = model.generate(tokens, 5)
    stopped = model.generate(tokens, 5, stop=full.new[0][1])
    assert stopped.new[0] == full.new[0][: full.new[0].index(full.new[0][1]) + 1]
    drawn = [model.generate(tokens, 5, temperature=1.0, seed=seed).new for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(InputError, match="position 9 is never run"):
        model.generate(tokens, 3, [vs.Ablate("decoder.layers.0.z", positions=[9])])
    with pytest.raises(InputError, match="position 12 is outside the prompts' 9 tokens"):
        model.generate(tokens, 3, [vs.Ablate("encoder.layers.0.z", positions=[12])])
    with pytest.raises(InputError, match="max_new_tokens must be at least 1; got 0"):
        model.generate(tokens, 0)


# --------------------------------------------------------------------------------------------------------------- sweeps


@pytest.mark.parametrize("edit", ["patch", "zero", "mean", "resample"])
@pytest.mark.parametrize(
    ("sites", "each"),
    [("encoder.layers.*.resid_post", "position"), ("decoder.layers.*.cross_attn_out", "position"),
     ("decoder.layers.*.cross_z", "head"), ("encoder.layers.*.z", "head"), ("encoder.embed", None),
     ("decoder.layers.1.cross_v", "position")],
)  # fmt: skip
def test_sweeps_of_both_stacks_are_announced_and_pass_their_check(
    model: vs.Model, pairs: vs.Pairs, sites: str, each: str | None, edit: str
) -> None:
    heard: list[Event] = []
    scores = vs.sweep(model, pairs, sites=sites, each=each, edit=edit, sink=heard.append)
    assert heard[0].message.startswith("no replay: attention of the t5 family reads later positions too")
    assert bool(((scores.values != scores.base) & scores.mask).any())
    logits = model.run(pairs.tokens("corrupted")).logits[:, -1]
    by_hand = logits.gather(1, pairs.answer[:, None]) - logits.gather(1, pairs.distractor[:, None])
    assert torch.allclose(scores.base, by_hand[:, 0], atol=1e-5)
    if each == "position":
        assert scores.values.shape[1] == (4 if sites.startswith("decoder") and "cross_v" not in sites else 9)


def test_a_swept_cell_equals_a_hook_by_hand(model: vs.Model, pairs: vs.Pairs) -> None:
    scores = vs.sweep(model, pairs, sites="decoder.layers.*.cross_z", each="head")
    seen: list[Tensor] = []
    module = model.module.decoder.block[1].layer[1].EncDecAttention.o
    handle = module.register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    plain(model, pairs.tokens("clean"))
    handle.remove()

    def write(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        changed = args[0].clone()
        changed[..., 30:40] = seen[0][..., 30:40]
        return (changed,)

    handle = module.register_forward_pre_hook(write)
    logits = plain(model, pairs.tokens("corrupted"))
    handle.remove()
    assert torch.allclose(scores.values[1, 3], vs.logit_diff(logits, pairs), atol=1e-5)


def test_a_sweep_without_decoder_tokens_gives_the_start_token(model: vs.Model, pairs: vs.Pairs) -> None:
    scores = vs.sweep(model, replace(pairs, decoder=None), sites="encoder.layers.1.resid_post", each="position")
    first = model.run(replace(pairs.tokens("corrupted"), decoder=None)).logits[:, 0]
    expected = first.gather(1, pairs.answer[:, None]) - first.gather(1, pairs.distractor[:, None])
    assert torch.allclose(scores.base, expected[:, 0], atol=1e-5)


def test_positions_of_two_stacks_are_not_mixed(model: vs.Model, pairs: vs.Pairs) -> None:
    with pytest.raises(InputError, match="positions of an encoder and of a decoder are not the same"):
        vs.sweep(model, pairs, sites=["encoder.layers.0.z", "decoder.layers.0.z"], each="position")
    both = vs.sweep(model, pairs, sites=["encoder.layers.0.z", "decoder.layers.0.z"])
    assert both.values.shape == (2, 4)


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layers.0.z", r"unknown site 'layers.0.z'; known: decoder.embed, .*encoder.layers.\*.z, logits"),
        ("encoder.layers.2.z", "has 2 layers, numbered from 0"),
        ("decoder.layers.3.z", "has 3 layers, numbered from 0"),
        ("encoder.layers.0.cross_z", r"unknown site 'encoder.layers.0.cross_z'"),
        ("decoder.layers.0.cross_z[4]", "has 4 heads per layer"),
    ],
)
def test_sites_that_are_not_there_are_refused(model: vs.Model, tokens: vs.Tokens, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.run(tokens, capture=[name])


def test_what_an_encoder_decoder_cannot_do_is_refused(model: vs.Model, tokens: vs.Tokens) -> None:
    with pytest.raises(InputError, match=r"LlamaForCausalLM is no encoder-decoder, so Tokens\(decoder=...\)"):
        tiny.model("llama").run(tokens)
    with pytest.raises(InputError, match="decoder has 2 rows for 4 prompts"):
        replace(tokens, decoder=DECODER[:2])
    with pytest.raises(InputError, match=r"token id 99 is outside .* vocabulary of 61"):
        model.run(replace(tokens, decoder=DECODER * 0 + 99))
    with pytest.raises(UnknownArchitectureError, match=r"config.is_decoder=True"):
        vs.Model(T5ForConditionalGeneration(T5Config(**{**SIZES, "is_decoder": True})))
    strange = t5()
    strange.module.config.mystery = 2
    with pytest.raises(UnknownArchitectureError, match=r"config.mystery=2, a field that the t5 adapter"):
        vs.Model(strange.module)
