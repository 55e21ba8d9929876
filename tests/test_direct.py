"""Direct contributions are an exact account of the logit difference, and runs measure what plain ones show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patching
import tiny
import vesalius as vs
from vesalius.adapters import Access
from vesalius.adapters.llama import LLAMA
from vesalius.errors import InputError, UnknownArchitectureError, UnknownNameError
from vesalius.model.direct import direct_effects
from vesalius.quantities import DIRECT_EFFECT, Runs, heads_and_mlps
from vesalius.quantities.contrast import EMBED

FAMILIES = sorted(tiny.FAMILIES)


@pytest.fixture(params=FAMILIES)
def runs(request: pytest.FixtureRequest) -> Runs:
    return Runs(tiny.model(request.param), {"corrupted": tiny.pairs()})


@pytest.mark.parametrize("which", ["clean", "corrupted"])
def test_contributions_sum_to_the_logit_difference(runs: Runs, which: str) -> None:
    tokens = runs.pairs.tokens(which)
    found = direct_effects(runs.model, runs.pairs, tokens)
    full = patching.difference(patching.forward(runs.model, tokens), runs.pairs)
    assert torch.allclose(found.total(), full, atol=1e-4)
    assert full.std() > 0.1


def test_a_bias_of_the_unembedding_is_counted() -> None:
    module = tiny.llama()
    module.lm_head.bias = torch.nn.Parameter(torch.randn(tiny.VOCAB, generator=torch.Generator().manual_seed(3)))
    pairs = tiny.pairs()
    found = direct_effects(vs.Model(module), pairs, pairs.tokens("clean"))
    full = patching.difference(module(pairs.clean, attention_mask=pairs.real.long()).logits.detach(), pairs)
    assert torch.allclose(found.total(), full, atol=1e-4)
    assert torch.allclose(Runs(vs.Model(module), {"corrupted": pairs}).metric("clean"), full, atol=1e-4)


def test_every_component_has_its_share_and_an_unknown_one_lists_them(runs: Runs) -> None:
    found = direct_effects(runs.model, runs.pairs, runs.pairs.tokens("clean"))
    assert {str(part) for part in heads_and_mlps(runs.model)} <= set(found.contributions)
    with pytest.raises(UnknownNameError, match=r"unknown component 'layers.9.mlp_out'; known: bias, embed, "):
        _ = found["layers.9.mlp_out"]


def test_the_quantity_gives_the_same_shares(runs: Runs) -> None:
    found = direct_effects(runs.model, runs.pairs, runs.pairs.tokens("clean"))
    for part in heads_and_mlps(runs.model)[1:]:
        assert torch.allclose(DIRECT_EFFECT.measure(runs, part, {}), found[str(part)], atol=1e-5), part


def test_the_embeddings_of_runs_hold_positions_too(runs: Runs) -> None:
    found = direct_effects(runs.model, runs.pairs, runs.pairs.tokens("clean"))
    names = [name for name in ("embed", "pos_embed") if name in found.contributions]
    assert torch.allclose(
        DIRECT_EFFECT.measure(runs, EMBED, {}), torch.stack([found[n] for n in names]).sum(0), atol=1e-5
    )


@pytest.mark.parametrize("which", ["clean", "corrupted"])
def test_the_metric_of_runs_is_that_of_full_logits(runs: Runs, which: str) -> None:
    logits = patching.forward(runs.model, runs.pairs.tokens(which))
    assert torch.allclose(runs.metric(which), patching.difference(logits, runs.pairs), atol=1e-4)
    shuffled = patching.difference(logits, runs.shuffled)
    assert torch.allclose(runs.metric(which, runs.shuffled), shuffled, atol=1e-4)


def test_the_pattern_of_runs_is_the_run_s_on_real_positions(runs: Runs) -> None:
    for which in ("clean", "corrupted"):
        run = runs.model.run(runs.pairs.tokens(which), capture=["layers.*.pattern"])
        real = runs.pairs.real
        for part in heads_and_mlps(runs.model):
            site = part.writes[0]
            if site.kind == "z":
                expected = run[vs.Site("pattern", site.layer, site.index)]
                assert torch.allclose(runs.pattern(part, which)[real], expected[real], atol=1e-5), part


@pytest.mark.demo_model
def test_contributions_sum_to_the_logit_difference_on_the_demo_model(demo: vs.Model) -> None:
    pairs = vs.data.ioi(demo, n=2).split("validation")
    logits = demo.run(pairs.tokens("clean")).logits
    full = patching.difference(logits, pairs)
    found = direct_effects(demo, pairs, pairs.tokens("clean"))
    runs = Runs(demo, {pairs.corruption: pairs})
    assert torch.allclose(found.total(), full, atol=1e-4)
    assert torch.allclose(runs.metric("clean"), full, atol=1e-4)
    part = vs.head(17, 3)
    assert torch.allclose(DIRECT_EFFECT.measure(runs, part, {}), found[str(part)], atol=1e-4)


# --- linear layers that are not nn.Linear: what fine-tuned and quantised models have in its place


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class LowRank(nn.Module):
    """As peft wraps a layer: `weight` is the base's, and the adapter is added beside it."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base_layer = base
        self.A = nn.Parameter(0.3 * drawn(rank, base.in_features))
        self.B = nn.Parameter(0.3 * drawn(base.out_features, rank, seed=1))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.A.T @ self.B.T

    def dense(self) -> tuple[Tensor, Tensor | None]:
        return self.base_layer.weight + self.B @ self.A, self.base_layer.bias


class Int8(nn.Linear):
    """As bitsandbytes keeps 8-bit weights: whole numbers in `weight`, the scale of each row beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.scale = base.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((base.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        return self.weight * self.scale, self.bias


class Packed(nn.Module):
    """As GPTQ and nf4 keep 4-bit weights: two codes in a byte, no `weight` at all."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.scale = base.weight.detach().abs().max() / 7
        codes = ((base.weight.detach() / self.scale).round() + 8).to(torch.uint8)
        self.register_buffer("qweight", codes[:, ::2] * 16 + codes[:, 1::2])
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, *self.dense())

    def dense(self) -> tuple[Tensor, Tensor | None]:
        codes = torch.stack([self.qweight // 16, self.qweight % 16], -1).flatten(1)
        return (codes.float() - 8) * self.scale, self.bias


class Transposed(nn.Module):
    """A Conv1D of somebody's own: the weight is [in, out], with a bias far larger than it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(base.weight.detach().T.contiguous())
        self.bias = nn.Parameter(5 * drawn(base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias

    def dense(self) -> tuple[Tensor, Tensor | None]:
        return self.weight.T, self.bias


class Rounding(Int8):
    """8-bit weights that round what they are multiplied with as well."""

    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
        return super().forward((x / step).round() * step)


STAND_INS = [LowRank, Int8, Packed, Transposed]


def with_layers(kind: Callable[[nn.Linear], nn.Module], unembedding: bool = False, **changes: Any) -> Any:
    """A tiny Llama whose output projections, and perhaps unembedding, are of another kind."""
    net = tiny.llama(tie_word_embeddings=False, **changes)
    for layer in net.model.layers:
        layer.self_attn.o_proj = kind(layer.self_attn.o_proj)
    if unembedding:
        net.lm_head = kind(net.lm_head)
    return net


def shares_by_hand(net: Any, pairs: vs.Pairs) -> dict[str, Tensor]:
    """Direct effects of heads from plain hooks, the final norm written out, and the matrix that each layer knows."""
    seen: dict[int, Tensor] = {}
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, n=n: seen.__setitem__(n, args[0]))
        for n, layer in enumerate(net.model.layers)
    ]
    rows = torch.arange(len(pairs))
    handles.append(net.model.norm.register_forward_pre_hook(lambda _, args: seen.__setitem__(-1, args[0])))
    with torch.no_grad():
        net.model(pairs.clean, attention_mask=pairs.real.long())
    for handle in handles:
        handle.remove()
    at = seen[-1][rows, pairs.at]
    scale = 1 / (at.pow(2).mean(-1, keepdim=True) + net.config.rms_norm_eps).sqrt()
    unembed = net.lm_head.dense()[0] if hasattr(net.lm_head, "dense") else net.lm_head.weight
    direction = (unembed[pairs.answer] - unembed[pairs.distractor]) * net.model.norm.weight * scale
    found = {}
    for n, layer in enumerate(net.model.layers):
        matrix, size = layer.self_attn.o_proj.dense()[0], layer.self_attn.head_dim
        for head in range(net.config.num_attention_heads):
            columns = slice(head * size, (head + 1) * size)
            write = seen[n][rows, pairs.at][:, columns] @ matrix[:, columns].T
            found[f"layers.{n}.z[{head}]"] = (write * direction).sum(-1).detach()
    return found


@pytest.mark.parametrize("unembedding", [False, True], ids=["", "unembedding"])
@pytest.mark.parametrize("kind", STAND_INS)
def test_heads_of_any_linear_layer_have_the_shares_that_plain_hooks_give(kind: Any, unembedding: bool) -> None:
    net, pairs = with_layers(kind, unembedding), tiny.pairs()
    model = vs.Model(net)
    found = direct_effects(model, pairs, pairs.tokens("clean"))
    expected = shares_by_hand(net, pairs)
    for name, share in expected.items():
        torch.testing.assert_close(found[name], share, atol=2e-5, rtol=1e-4)
    full = patching.difference(net(pairs.clean, attention_mask=pairs.real.long()).logits.detach(), pairs)
    assert torch.allclose(found.total(), full, atol=1e-4)
    runs = Runs(model, {"corrupted": pairs})
    torch.testing.assert_close(runs.metric("clean"), full, atol=1e-4, rtol=1e-4)
    part = vs.head(1, 2)
    torch.testing.assert_close(DIRECT_EFFECT.measure(runs, part, {}), expected[str(part)], atol=2e-5, rtol=1e-4)
    assert max(share.abs().max() for share in expected.values()) > 0.1


@pytest.mark.parametrize("kind", STAND_INS)
def test_results_of_heads_of_any_linear_layer_sum_to_what_attention_adds(kind: Any) -> None:
    net, pairs = with_layers(kind, attention_bias=True), tiny.pairs()
    run = vs.Model(net).run(pairs.tokens("clean"), capture=["layers.1.result", "layers.1.attn_out"])
    bias = net.model.layers[1].self_attn.o_proj.dense()[1]
    assert bias is not None
    torch.testing.assert_close(run["layers.1.result"].sum(2) + bias, run["layers.1.attn_out"], atol=1e-4, rtol=1e-4)


def test_a_matrix_in_bfloat16_is_read_beside_a_large_bias() -> None:
    net = with_layers(Transposed).bfloat16()
    matrix = net.model.layers[0].self_attn.o_proj.dense()[0]
    read = vs.Model(net).W_O(0).flatten(0, 1).T
    assert read.dtype == torch.bfloat16
    assert (read - matrix).float().norm() / matrix.float().norm() < 0.02


def test_a_sweep_of_quantised_weights_is_a_plain_one() -> None:
    pairs = tiny.pairs()
    for compute in ("float32", "bfloat16"):
        scores = vs.sweep(vs.Model(with_layers(Int8, True)), pairs, sites="layers.1.z", each="head", compute=compute)
        assert scores.values.std() > 0


def test_a_layer_that_is_not_linear_is_refused_by_name() -> None:
    pairs = tiny.pairs()
    model = vs.Model(with_layers(Rounding))
    with pytest.raises(InputError, match=r"a Rounding \(weight: Parameter\) is not linear: .* 0\.\d% off .*dequantise"):
        direct_effects(model, pairs, pairs.tokens("clean"))
    with pytest.raises(InputError, match=r"a Rounding .* is not linear"):
        model.run(pairs.tokens("clean"), capture="layers.0.result")
    # It runs, though, and whole sites are what they are.
    assert model.run(pairs.tokens("clean"), capture="layers.0.z")["layers.0.z"].std() > 0


def test_a_remainder_that_is_not_the_projection_s_bias_is_an_error() -> None:
    net, pairs = tiny.llama(), tiny.pairs()
    adapter = replace(LLAMA, sites={**LLAMA.sites, "attn_out": Access("self_attn")})
    direct_effects(vs.Model(net, adapter=adapter), pairs, pairs.tokens("clean"))
    # Attention that adds more than its output projection gives.
    net.model.layers[1].self_attn.register_forward_hook(lambda _, __, out: (out[0] + 0.1 * drawn(48), *out[1:]))
    with pytest.raises(
        InputError, match=r"layers\.1\.attn_out is not the sum of .* bias: \d+\.\d% of their size is left"
    ):
        direct_effects(vs.Model(net, adapter=adapter), pairs, pairs.tokens("clean"))


@pytest.mark.filterwarnings("ignore")
def test_peft_s_lora_is_in_the_shares_and_its_wrapper_names_the_model_inside() -> None:
    peft = pytest.importorskip("peft")
    net, pairs = tiny.llama(), tiny.pairs()
    plain = direct_effects(vs.Model(net), pairs, pairs.tokens("clean"))
    wrapped = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["o_proj", "q_proj"])).eval()
    with pytest.raises(UnknownArchitectureError, match=r"vs\.Model\(peft_model\.get_base_model\(\)\)"):
        vs.Model(wrapped)
    model = vs.Model(wrapped.get_base_model())
    # An untrained adapter adds nothing.
    untrained = direct_effects(model, pairs, pairs.tokens("clean"))
    for name, share in plain.contributions.items():
        torch.testing.assert_close(untrained[name], share, atol=1e-5, rtol=1e-5)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * drawn(*parameter.shape)
    trained = direct_effects(model, pairs, pairs.tokens("clean"))
    projection = model.module.model.layers[0].self_attn.o_proj
    # peft merges a copy for us: another way to the same matrix.
    merged = projection.base_layer.weight + projection.get_delta_weight("default")
    torch.testing.assert_close(model.W_O(0).flatten(0, 1).T, merged, atol=1e-5, rtol=1e-5)
    full = patching.difference(patching.forward(model, pairs.tokens("clean")), pairs)
    torch.testing.assert_close(trained.total(), full, atol=1e-4, rtol=1e-4)
    assert (trained["layers.0.z[1]"] - plain["layers.0.z[1]"]).abs().max() > 1e-3
