"""Causal tracing equals noise and restoration by plain hooks, and finds a state that is known to carry the subject."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import families
import tiny
import vesalius as vs
from vesalius.errors import InputError, NotFiniteError, SelfCheckError, UnknownNameError
from vesalius.jobs import Event
from vesalius.patching import replay

DRAWS = 3


@pytest.fixture(scope="module", params=sorted(tiny.FAMILIES))
def model(request: pytest.FixtureRequest) -> vs.Model:
    return tiny.model(request.param)


@pytest.fixture(scope="module")
def pairs() -> vs.Pairs:
    return tiny.pairs(n=4)


@pytest.fixture(scope="module")
def subject(pairs: vs.Pairs) -> Tensor:
    """One or two tokens, not at the same places."""
    mask = torch.zeros(4, 9, dtype=torch.bool)
    mask[0, 1] = mask[1, 2] = mask[1, 3] = mask[2, 2] = mask[3, 4] = True
    return mask


def embeddings(model: vs.Model) -> Any:
    return model.module.model.embed_tokens if hasattr(model.module, "model") else model.module.transformer.wte


def part_of(model: vs.Model, kind: str, layer: int) -> Any:
    block = model.layer(layer)
    if kind == "resid_post":
        return block
    if kind == "mlp_out":
        return block.mlp
    return block.attn.c_proj if hasattr(block, "attn") else block.self_attn.o_proj


def by_hand(
    model: vs.Model, ids: Tensor, noise: Tensor | None, restore: list[tuple[Any, Tensor, int]]
) -> tuple[Tensor, dict[Any, Tensor]]:
    """One prompt: logits, and every module's output, with noise on the embeddings and some outputs given back."""
    seen: dict[Any, Tensor] = {}
    handles = []

    def visit(module: Any, _inputs: Any, output: Any) -> Any:
        tensor = output if isinstance(output, Tensor) else output[0]
        if module is embeddings(model) and noise is not None:
            tensor = tensor + noise
        for other, value, position in restore:
            if other is module:
                tensor = tensor.clone()
                tensor[0, position] = value[0, position]
        seen[module] = tensor
        return tensor if isinstance(output, Tensor) else (tensor, *output[1:])

    modules = [part_of(model, kind, layer) for kind in ("resid_post", "mlp_out", "attn_out") for layer in range(3)]
    for module in [embeddings(model), *modules]:
        handles.append(module.register_forward_hook(visit))
    with torch.no_grad():
        logits = model.module(ids).logits
    for handle in handles:
        handle.remove()
    return logits, seen


def noise_by_hand(model: vs.Model, pairs: vs.Pairs, subject: Tensor, row: int, seed: int) -> Tensor:
    """As documented: 3 standard deviations of the subject tokens' embeddings, drawn per example, token after token."""
    std = embeddings(model).weight.detach()[pairs.clean[subject]].std()
    generator = torch.Generator().manual_seed(seed * 1_000_003 + row)
    size = int(pairs.size[row])
    drawn = torch.stack([torch.randn(48, generator=generator) for _ in range(size)])
    return (3 * std * drawn * subject[row, :size, None])[None]


# ------------------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("window", [1, 2])
def test_every_restored_state_equals_plain_hooks(
    model: vs.Model, pairs: vs.Pairs, subject: Tensor, window: int
) -> None:
    found = vs.causal_tracing(model, pairs, subject, draws=DRAWS, window=window, metric=vs.logit_diff, seed=2)
    for row in (0, 1, 3):
        size, answer, wrong = int(pairs.size[row]), pairs.answer[row], pairs.distractor[row]
        ids = pairs.clean[row : row + 1, :size]
        clean = by_hand(model, ids, None, [])[1]
        for draw in range(DRAWS):
            noise = noise_by_hand(model, pairs, subject, row, 2 * 1_009 + draw)
            for kind in ("resid_post", "mlp_out", "attn_out"):
                wide = 1 if kind == "resid_post" else window
                for layer, position in ((0, 4), (1, 1), (2, size - 1), (1, size - 1)):
                    layers = [n for n in range(layer - wide // 2, layer - wide // 2 + wide) if 0 <= n < 3]
                    restore = [(part_of(model, kind, n), clean[part_of(model, kind, n)], position) for n in layers]
                    last = by_hand(model, ids, noise, restore)[0][0, -1]
                    expected = float(last[answer] - last[wrong])
                    assert float(found.draws[kind][draw, layer, position, row]) == pytest.approx(expected, abs=1e-4)
            last = by_hand(model, ids, noise, [])[0][0, -1]
            assert float(found.noised[draw, row]) == pytest.approx(float(last[answer] - last[wrong]), abs=1e-4)


def test_the_result_is_scores_with_means_over_draws(model: vs.Model, pairs: vs.Pairs, subject: Tensor) -> None:
    found = vs.causal_tracing(model, pairs, subject, draws=DRAWS)
    clean = vs.answer_logprob(model.run(pairs.tokens("clean")).logits, pairs)
    for kind in ("resid_post", "mlp_out", "attn_out"):
        scores = found[kind]
        assert scores.values.shape == (3, 9, 4)
        assert scores.sites == tuple(f"layers.{n}.{kind}" for n in range(3))
        assert torch.allclose(scores.values, found.draws[kind].mean(0), atol=1e-5)
        assert torch.allclose(scores.source, clean, atol=1e-5)
        assert torch.allclose(scores.base, found.noised.mean(0), atol=1e-6)
        assert torch.equal(scores.mask, (torch.arange(9)[:, None] < pairs.size).expand(3, -1, -1))
        assert "restore on noised prompts" in repr(scores)
    assert torch.allclose(found.total, clean - found.noised.mean(0), atol=1e-5)
    assert float(found.total.abs().max()) > 0.1


# ----------------------------------------------------------------------------------------------------------------- laws


def test_giving_back_the_last_state_gives_the_clean_run_back(model: vs.Model, pairs: vs.Pairs, subject: Tensor) -> None:
    found = vs.causal_tracing(model, pairs, subject, kinds=["resid_post"], draws=DRAWS)
    last = found["resid_post"].values[2, pairs.at, torch.arange(4)]
    assert torch.allclose(last, found.clean, atol=1e-5)


def test_nothing_before_the_subject_and_nothing_off_the_path_has_an_effect(
    model: vs.Model, pairs: vs.Pairs, subject: Tensor
) -> None:
    found = vs.causal_tracing(model, pairs, subject, draws=DRAWS)
    first = subject.long().argmax(1)
    for kind in ("resid_post", "mlp_out", "attn_out"):
        effects = found[kind].effects
        for row in range(4):
            assert float(effects[:, : int(first[row]), row].abs().max()) == 0.0
            # Only the read position is left after the last layer's attention.
            if kind != "attn_out":
                late = [p for p in range(9) if p != int(pairs.at[row])]
                assert float(effects[2, late, row].abs().max()) < 1e-5
    assert float(found["resid_post"].effects.abs().max()) > 0.05


def test_a_planted_store_of_the_subject_is_found(pairs: vs.Pairs) -> None:
    """Attention of all layers but one is cut, so the subject can only leave its position through that layer."""
    model = tiny.model("llama")
    with torch.no_grad():
        for layer in (0, 2):
            model.layer(layer).self_attn.o_proj.weight.zero_()
    subject = torch.zeros(4, 9, dtype=torch.bool)
    subject[:, 2] = True
    found = vs.causal_tracing(model, pairs, subject, kinds=["resid_post", "attn_out"], draws=DRAWS)
    effects, rows = found["resid_post"].effects, torch.arange(4)
    total = found.total
    assert torch.allclose(effects[0, 2], total, atol=1e-4)  # before the move all of it is at the subject
    assert float(effects[1, 2].abs().max()) < 1e-4  # after it nothing
    assert torch.allclose(effects[1, pairs.at, rows], total, atol=1e-4)  # all of it is at the end
    assert torch.allclose(found["attn_out"].effects[1, pairs.at, rows], total, atol=1e-4)
    assert float(total.abs().min()) > 1e-2


def test_more_draws_average_and_each_is_the_seeds_doing(model: vs.Model, pairs: vs.Pairs, subject: Tensor) -> None:
    options: dict[str, Any] = {"kinds": ["resid_post"], "check": False}
    few, more, other = (
        vs.causal_tracing(model, pairs, subject, draws=n, seed=s, **options) for n, s in ((2, 0), (4, 0), (2, 1))
    )
    assert torch.allclose(few.noised, more.noised[:2], atol=1e-6)
    assert not torch.allclose(few.noised, other.noised, atol=1e-2)
    assert not torch.allclose(few.noised[0], few.noised[1], atol=1e-2)
    none = vs.causal_tracing(model, pairs, subject, draws=1, scale=0.0, **options)
    assert torch.allclose(none.noised[0], none.clean, atol=1e-6)


def test_the_noise_is_measured_in_the_spread_of_the_subjects_embeddings(
    model: vs.Model, pairs: vs.Pairs, subject: Tensor
) -> None:
    found = vs.causal_tracing(model, pairs, subject, kinds=["resid_post"], draws=1)
    assert found.std == pytest.approx(float(embeddings(model).weight[pairs.clean[subject]].std().detach()), rel=1e-5)
    assert vs.causal_tracing(model, pairs, [2, 3], kinds=["mlp_out"], draws=1).std != pytest.approx(found.std, rel=1e-3)


# ------------------------------------------------------------------------------------------------ fallback and refusals


def test_a_model_that_cannot_be_replayed_gives_the_same_and_says_so(pairs: vs.Pairs, subject: Tensor) -> None:
    model, events = tiny.model("llama"), []
    assert model.adapter is not None
    slow = vs.Model(model.module, adapter=replace(model.adapter, replay={}))
    options: dict[str, Any] = {"kinds": ["resid_post", "mlp_out"], "draws": 2}
    found = vs.causal_tracing(slow, pairs, subject, sink=events.append, **options)
    fast = vs.causal_tracing(model, pairs, subject, **options)
    for kind in options["kinds"]:
        assert torch.allclose(found.draws[kind], fast.draws[kind], atol=1e-4)
    assert any(event.kind == "note" and "no replay" in event.message for event in events if isinstance(event, Event))
    assert fast["mlp_out"].cost.spent < 0.6 * found["mlp_out"].cost.spent


def test_where_attention_looks_both_ways_earlier_positions_count_too(pairs: vs.Pairs) -> None:
    model = families.model("bert")
    subject = torch.zeros(4, 9, dtype=torch.bool)
    subject[:, 3] = True
    found = vs.causal_tracing(model, pairs, subject, kinds=["resid_post"], draws=2)
    assert float(found["resid_post"].effects[0, 0].abs().max()) > 1e-4


def test_a_sabotaged_replay_is_caught(
    model: vs.Model, pairs: vs.Pairs, subject: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = replay.Replay.run

    def wrong(self: replay.Replay) -> tuple[Tensor, dict[vs.Site, Tensor]]:
        hidden, seen = real(self)
        return hidden + 0.3 * torch.linspace(-1, 1, hidden.shape[-1]), seen

    monkeypatch.setattr(replay.Replay, "run", wrong)
    with pytest.raises(SelfCheckError, match=r"differ by .* restored; please report"):
        vs.causal_tracing(model, pairs, subject, draws=1, kinds=["resid_post"], seed=1)
    vs.causal_tracing(model, pairs, subject, draws=1, check=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"draws": 0}, InputError, "at least one draw"),
        ({"window": 0}, InputError, "a window of at least 1"),
        ({"kinds": ["z"]}, UnknownNameError, "unknown kind of site 'z'; known: attn_out, mlp_out, resid_post"),
        ({"subject": torch.zeros(4, 9, dtype=torch.bool)}, InputError, "prompt 0 has no subject tokens"),
        ({"subject": 9}, InputError, "position 9 is outside"),
        ({"metric": vs.next_token_loss}, InputError, "next_token_loss reads every position"),
    ],
)
def test_what_cannot_be_traced_is_refused(
    pairs: vs.Pairs, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        vs.causal_tracing(tiny.model("llama"), pairs, **{"subject": 2, "draws": 1, **options})


def test_a_metric_that_is_not_a_number_is_refused(pairs: vs.Pairs) -> None:
    metric = replace(vs.logit_diff, of=lambda logits, _base, chosen: torch.full((len(logits),), float("nan")))
    with pytest.raises(NotFiniteError, match="not finite for example 0"):
        vs.causal_tracing(tiny.model("llama"), pairs, 2, draws=1, metric=metric)


def test_an_unknown_kind_of_result_lists_those_there(pairs: vs.Pairs) -> None:
    found = vs.causal_tracing(tiny.model("llama"), pairs, 2, draws=1, kinds=["mlp_out"])
    with pytest.raises(UnknownNameError, match="unknown kind of site 'attn_out'; known: mlp_out"):
        found["attn_out"]
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.model("llama").module.modules()) == 0


def test_the_cost_is_told_first_and_is_about_the_bill(model: vs.Model, pairs: vs.Pairs, subject: Tensor) -> None:
    heard: list[Event] = []
    found = vs.causal_tracing(model, pairs, subject, kinds=["mlp_out"], draws=DRAWS, sink=heard.append)
    note = next(event.message for event in heard if event.kind == "note")
    assert note == heard[0].message
    assert note.startswith(f"tracing: {found['mlp_out'].cost.describe()}; about ")
    assert repr(found).startswith(f"Tracing({DRAWS} draws take ")


def test_a_subject_may_be_named(model: vs.Model, pairs: vs.Pairs) -> None:
    at = torch.tensor([1, 2, 2, 4])
    named = replace(pairs, named_positions={"subject": at})
    options: dict[str, Any] = {"kinds": ["resid_post"], "draws": DRAWS}
    found = vs.causal_tracing(model, named, "subject", **options)
    assert torch.equal(found.noised, vs.causal_tracing(model, pairs, at, **options).noised)
    with pytest.raises(UnknownNameError, match="unknown position 'topic'; known: first, last, subject"):
        vs.causal_tracing(model, named, "topic", **options)
