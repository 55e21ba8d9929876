"""Direct contributions are an exact account of the logit difference, and runs measure what plain ones show."""

from __future__ import annotations

import pytest
import torch

import patching
import tiny
import vesalius as vs
from vesalius.errors import UnknownNameError
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
