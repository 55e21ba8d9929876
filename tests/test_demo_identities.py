"""The identities of `test_model` on a real model: SmolLM2, with prompts of unequal lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vesalius as vs
from vesalius.errors import InterventionError
from vesalius.model.direct import direct_effects

TEXTS = [
    "When Mary and John went to the store, John gave a drink to",
    "The capital of France is",
    "Two plus two",
    "After the rain had stopped, the children ran out into the garden and began to",
]
OTHERS = [
    "When Mary and John went to the store, Mary gave a drink to",
    "The capital of Spain is",
    "Six plus two",
    "After the snow had stopped, the children ran out into the garden and began to",
]
STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_in", "mlp_post", "mlp_out")
KINDS = (*STREAM, "q", "k", "v", "z", "scores", "pattern")
LAYER = 17


@pytest.fixture(scope="module")
def tokens(demo: vs.Model) -> vs.Tokens:
    return demo.tokens(TEXTS)


@pytest.fixture(scope="module")
def pairs(demo: vs.Model, tokens: vs.Tokens) -> vs.Pairs:
    other = demo.tokens(OTHERS)
    assert other.lengths.tolist() == tokens.lengths.tolist()
    answer = torch.tensor([demo.tokenizer.encode(word)[0] for word in (" Mary", " Paris", " equals", " play")])
    wrong = torch.tensor([demo.tokenizer.encode(word)[0] for word in (" John", " Madrid", " is", " sing")])
    return vs.Pairs(
        clean=tokens.ids, corrupted=other.ids, answer=answer, distractor=wrong, lengths=tokens.lengths
    )  # fmt: skip


def tolerance(logits: Tensor) -> float:
    return 1e-5 * float(logits.max() - logits.min())


def hooks_of(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_a_run_is_bit_identical_to_the_wrapped_model(demo: vs.Model, tokens: vs.Tokens) -> None:
    with torch.no_grad():
        plain = demo.module(tokens.ids, attention_mask=tokens.real.long()).logits
    assert torch.equal(demo.run(tokens).logits, plain)
    assert torch.equal(demo.run(tokens, capture=["layers.*.z", "layers.*.mlp_post"]).logits, plain)


def test_a_no_op_patch_changes_nothing(demo: vs.Model, tokens: vs.Tokens) -> None:
    also = ["layers.0.pattern"]  # keeps every run on the same attention path
    sites = [f"layers.{LAYER}.{kind}" for kind in KINDS] + ["embed", "final_norm", "logits"]
    base = demo.run(tokens, capture=[*also, *sites])
    for site in sites:
        edit = vs.Patch(site, source=base.activations)
        assert torch.equal(demo.run(tokens, capture=also, interventions=[edit]).logits, base.logits), site


@pytest.mark.parametrize("layer", [0, LAYER, 29])
def test_patching_everything_at_one_layer_gives_the_other_run(demo: vs.Model, pairs: vs.Pairs, layer: int) -> None:
    site = f"layers.{layer}.resid_post"
    other = demo.run(pairs.tokens("corrupted"), capture=[site])
    patched = demo.run(pairs.tokens("clean"), interventions=[vs.Patch(site, source=other.activations)]).logits
    real = pairs.real
    assert float((patched - other.logits)[real].abs().max()) <= tolerance(other.logits)
    assert float((demo.run(pairs.tokens("clean")).logits - other.logits)[real].abs().max()) > 1.0


def test_direct_contributions_sum_to_the_logit_difference(demo: vs.Model, pairs: vs.Pairs) -> None:
    for which in ("clean", "corrupted"):
        tokens = pairs.tokens(which)
        found = vs.logit_diff(demo.run(tokens).logits, pairs)
        assert torch.allclose(direct_effects(demo, pairs, tokens).total(), found, atol=1e-4)


def test_heads_contributions_sum_to_what_attention_adds(demo: vs.Model, tokens: vs.Tokens) -> None:
    run = demo.run(tokens, capture=[f"layers.{LAYER}.result", f"layers.{LAYER}.attn_out"])
    result, whole = run[f"layers.{LAYER}.result"], run[f"layers.{LAYER}.attn_out"]
    assert result.shape[2] == 9
    assert torch.allclose(result.sum(2), whole, atol=1e-5 * float(whole.abs().max()))


def test_z_is_pattern_times_value_of_the_right_key_value_head(demo: vs.Model, tokens: vs.Tokens) -> None:
    run = demo.run(tokens, capture=[f"layers.{LAYER}.{kind}" for kind in ("pattern", "v", "z")])
    pattern, value, z = (run[f"layers.{LAYER}.{kind}"] for kind in ("pattern", "v", "z"))
    assert value.shape[2] == 3
    for head in range(9):
        made = pattern[:, head] @ value[:, :, head // 3]
        assert torch.allclose(made[tokens.real], z[:, :, head][tokens.real], atol=1e-5)


def test_batch_order_and_size_do_not_change_an_examples_numbers(demo: vs.Model, tokens: vs.Tokens) -> None:
    together = demo.run(tokens).logits
    order = torch.tensor([2, 0, 3, 1])
    shuffled = demo.run(vs.Tokens(tokens.ids[order], tokens.real[order])).logits
    for new, old in enumerate(order.tolist()):
        length = int(tokens.lengths[old])
        alone = demo.run(vs.Tokens(tokens.ids[old : old + 1, :length])).logits[0]
        for other in (shuffled[new, :length], alone):
            assert float((together[old, :length] - other).abs().max()) <= tolerance(together)


def test_padding_side_does_not_change_an_examples_numbers(demo: vs.Model, tokens: vs.Tokens) -> None:
    right = demo.run(tokens).logits
    width = tokens.ids.shape[1]
    shift = (width - tokens.lengths)[:, None]
    column = (torch.arange(width)[None] - shift) % width
    left = demo.run(vs.Tokens(tokens.ids.gather(1, column), tokens.real.gather(1, column))).logits
    for row, length in enumerate(tokens.lengths.tolist()):
        worst = float((right[row, :length] - left[row, width - length :]).abs().max())
        assert worst <= tolerance(right)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_hooks_are_gone_whatever_happens(demo: vs.Model, tokens: vs.Tokens, error: Any) -> None:
    before, mode = demo.run(tokens).logits, demo.module.config._attn_implementation

    def stop(_: nn.Module, __: Any) -> None:
        if error is not None:
            raise error("stop")

    handle = demo.layer(20).register_forward_pre_hook(stop)
    try:
        demo.run(tokens, capture=["layers.*.pattern"], interventions=[vs.Ablate(f"layers.{LAYER}.z[1]")])
    except (RuntimeError, KeyboardInterrupt) as raised:
        assert type(raised) is error
    handle.remove()
    assert hooks_of(demo.module) == 0
    assert demo.module.config._attn_implementation == mode
    assert torch.equal(demo.run(tokens).logits, before)


def test_an_intervention_whose_site_never_fired_is_an_error(demo: vs.Model, tokens: vs.Tokens) -> None:
    with pytest.raises(InterventionError, match="never fired"):
        demo.run(tokens, interventions=[vs.Ablate("module:model.layers|out")])


def test_gradients_through_captured_sites_equal_autograd_on_the_plain_model(demo: vs.Model, pairs: vs.Pairs) -> None:
    tokens, held = pairs.tokens("clean"), {}

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        held["mlp"] = output
        output.retain_grad()

    handle = demo.layer(LAYER).mlp.register_forward_hook(keep)
    logits = demo.module(tokens.ids, attention_mask=tokens.real.long()).logits
    (plain,) = torch.autograd.grad(vs.logit_diff(logits, pairs).sum(), [held["mlp"]])
    handle.remove()
    run = demo.run(tokens, capture=[f"layers.{LAYER}.mlp_out"], grad=True)
    (found,) = torch.autograd.grad(vs.logit_diff(run.logits, pairs).sum(), [run[f"layers.{LAYER}.mlp_out"]])
    assert float(plain.abs().max()) > 1e-3
    assert torch.allclose(found, plain, rtol=1e-4, atol=1e-6 * float(plain.abs().max()))
