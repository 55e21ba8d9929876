"""Direct contributions are an exact account of the logit difference, and a bench measures what plain runs show."""

from __future__ import annotations

import pytest
import torch
from vesalius.bench import Bench, components

import patching
import tiny
import vesalius as vs
from vesalius.errors import UnknownNameError
from vesalius.model.direct import direct_effects

FAMILIES = sorted(tiny.FAMILIES)


@pytest.fixture(params=FAMILIES)
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(tiny.model(request.param), {"corrupted": tiny.pairs()})


@pytest.mark.parametrize("which", ["clean", "corrupted"])
def test_contributions_sum_to_the_logit_difference(bench: Bench, which: str) -> None:
    tokens = bench.pairs.tokens(which)
    found = direct_effects(bench.model, bench.pairs, tokens)
    full = patching.difference(patching.forward(bench.model, tokens), bench.pairs)
    assert torch.allclose(found.total(), full, atol=1e-4)
    assert full.std() > 0.1


def test_a_bias_of_the_unembedding_is_counted() -> None:
    module = tiny.llama()
    module.lm_head.bias = torch.nn.Parameter(torch.randn(tiny.VOCAB, generator=torch.Generator().manual_seed(3)))
    pairs = tiny.pairs()
    found = direct_effects(vs.Model(module), pairs, pairs.tokens("clean"))
    full = patching.difference(module(pairs.clean, attention_mask=pairs.real.long()).logits.detach(), pairs)
    assert torch.allclose(found.total(), full, atol=1e-4)
    assert torch.allclose(Bench(vs.Model(module), {"corrupted": pairs}).metric("clean"), full, atol=1e-4)


def test_every_component_has_its_share_and_an_unknown_one_lists_them(bench: Bench) -> None:
    found = direct_effects(bench.model, bench.pairs, bench.pairs.tokens("clean"))
    assert {str(part) for part in components(bench.model)} <= set(found.contributions)
    with pytest.raises(UnknownNameError, match=r"unknown component 'layers.9.mlp_out'; known: bias, embed, "):
        _ = found["layers.9.mlp_out"]


def test_a_bench_gives_the_same_shares(bench: Bench) -> None:
    found = direct_effects(bench.model, bench.pairs, bench.pairs.tokens("clean"))
    for part in components(bench.model)[1:]:
        assert torch.allclose(bench.direct(part), found[part], atol=1e-5), part


def test_the_embeddings_of_a_bench_hold_positions_too(bench: Bench) -> None:
    found = direct_effects(bench.model, bench.pairs, bench.pairs.tokens("clean"))
    names = [name for name in ("embed", "pos_embed") if name in found.contributions]
    assert torch.allclose(bench.direct(vs.Site("embed")), torch.stack([found[n] for n in names]).sum(0), atol=1e-5)


@pytest.mark.parametrize("which", ["clean", "corrupted"])
def test_the_metric_of_a_bench_is_that_of_full_logits(bench: Bench, which: str) -> None:
    logits = patching.forward(bench.model, bench.pairs.tokens(which))
    assert torch.allclose(bench.metric(which), patching.difference(logits, bench.pairs), atol=1e-4)
    shuffled = patching.difference(logits, bench.shuffled)
    assert torch.allclose(bench.metric(which, bench.shuffled), shuffled, atol=1e-4)


def test_the_pattern_of_a_bench_is_the_run_s_on_real_positions(bench: Bench) -> None:
    for which in ("clean", "corrupted"):
        run = bench.model.run(bench.pairs.tokens(which), capture=["layers.*.pattern"])
        real = bench.pairs.real
        for part in components(bench.model):
            if part.kind == "z":
                expected = run[vs.Site("pattern", part.layer, part.index)]
                assert torch.allclose(bench.pattern(part, which)[real], expected[real], atol=1e-5), part


@pytest.mark.demo_model
def test_contributions_sum_to_the_logit_difference_on_the_demo_model(demo: vs.Model) -> None:
    pairs = vs.data.ioi(demo, n=2).split("validation")
    logits = demo.run(pairs.tokens("clean")).logits
    full = patching.difference(logits, pairs)
    found = direct_effects(demo, pairs, pairs.tokens("clean"))
    bench = Bench(demo, {pairs.corruption: pairs})
    assert torch.allclose(found.total(), full, atol=1e-4)
    assert torch.allclose(bench.metric("clean"), full, atol=1e-4)
    part = vs.Site("z", 17, 3)
    assert torch.allclose(bench.direct(part), found[part], atol=1e-4)
