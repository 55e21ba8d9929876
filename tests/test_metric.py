"""Metrics against brute force on full logits, one example and one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import tiny
import vesalius as vs
from vesalius.errors import InputError


@pytest.fixture(scope="module")
def pairs() -> vs.Pairs:
    return tiny.pairs()


def logits(seed: int) -> Tensor:
    return 3 * torch.randn(6, 9, tiny.VOCAB, generator=torch.Generator().manual_seed(seed))


def probabilities(row: Tensor) -> list[float]:
    top = max(row.tolist())
    weights = [math.exp(x - top) for x in row.tolist()]
    return [w / sum(weights) for w in weights]


def test_logit_diff_is_answer_less_distractor_where_the_metric_reads(pairs: vs.Pairs) -> None:
    given = logits(0)
    by_hand = [
        float(given[i, pairs.at[i], pairs.answer[i]] - given[i, pairs.at[i], pairs.distractor[i]]) for i in range(6)
    ]
    assert vs.logit_diff(given, pairs).tolist() == pytest.approx(by_hand)


def test_answer_logprob_is_the_log_of_the_answers_probability(pairs: vs.Pairs) -> None:
    given = logits(0)
    by_hand = [math.log(probabilities(given[i, pairs.at[i]])[pairs.answer[i]]) for i in range(6)]
    assert vs.answer_logprob(given, pairs).tolist() == pytest.approx(by_hand, rel=1e-5)


def test_kl_divergence_goes_from_the_base_to_the_edited_run(pairs: vs.Pairs) -> None:
    given, base = logits(0), logits(1)
    by_hand = []
    for i in range(6):
        p, q = (probabilities(x[i, pairs.at[i]]) for x in (base, given))
        by_hand.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    assert vs.kl_divergence(given, pairs, base).tolist() == pytest.approx(by_hand, rel=1e-4)
    assert vs.kl_divergence(base, pairs, base).abs().max() < 1e-6


def test_kl_divergence_needs_the_base(pairs: vs.Pairs) -> None:
    with pytest.raises(InputError, match="kl_divergence compares with a base run: pass its logits as base="):
        vs.kl_divergence(logits(0), pairs)


def test_next_token_loss_is_the_mean_over_real_next_tokens(pairs: vs.Pairs) -> None:
    given = logits(0)
    by_hand = []
    for i in range(6):
        size = int(pairs.size[i])
        losses = [-math.log(probabilities(given[i, p])[pairs.clean[i, p + 1]]) for p in range(size - 1)]
        by_hand.append(sum(losses) / len(losses))
    assert vs.next_token_loss(given, pairs).tolist() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("metric", [vs.logit_diff, vs.answer_logprob, vs.next_token_loss], ids=lambda m: m.name)
def test_padding_is_never_read(pairs: vs.Pairs, metric: vs.Metric) -> None:
    given = logits(0)
    assert bool((~pairs.real).any())
    garbage = torch.where(pairs.real[..., None], given, 1e4 * logits(2))
    assert torch.equal(metric(garbage, pairs), metric(given, pairs))


def test_a_metric_reads_no_more_than_it_declares(pairs: vs.Pairs) -> None:
    for metric in (vs.logit_diff, vs.answer_logprob, vs.kl_divergence):
        given = logits(0).requires_grad_()
        metric(given, pairs, logits(1)).sum().backward()
        assert given.grad is not None
        touched = given.grad.abs() > 0
        rows = torch.arange(6)
        assert not touched[:, :, :].sum((1, 2)).sub(touched[rows, pairs.at].sum(1)).any()
        tokens = metric.tokens(pairs)
        if tokens is not None:
            assert touched[rows, pairs.at].sum(1).tolist() == [tokens.shape[1]] * 6


def test_metrics_declare_what_they_need(pairs: vs.Pairs) -> None:
    assert vs.logit_diff.needs.tokens == "answer_distractor"
    assert vs.kl_divergence.needs.base
    assert vs.next_token_loss.needs.positions == "all"
    assert torch.equal(vs.logit_diff.tokens(pairs)[:, 0], pairs.answer)  # type: ignore[index]
    assert vs.answer_logprob.tokens(pairs) is None


def test_shapes_in_signatures_are_checked_in_this_run() -> None:
    """Of functions, methods and frozen values; elsewhere nothing is checked."""
    from jaxtyping import TypeCheckError

    from vesalius.metric import next_token_loss_of
    from vesalius.quantities.rules import Text

    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(TypeCheckError):
        next_token_loss_of(torch.zeros(2, 3), vs.Tokens(ids))
    with pytest.raises(TypeCheckError):
        Text(ids.float(), ids.bool(), str)
    with pytest.raises(TypeCheckError):
        tiny.model("llama").head_writes(0, torch.zeros(2))
