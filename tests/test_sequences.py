"""Answers of several tokens: scored teacher-forced, in plain runs, sweeps, studies' runs and the gate alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
import vesalius as vs
from vesalius.errors import InputError, PairsError
from vesalius.jobs import silent
from vesalius.quantities import DIRECT_EFFECT
from vesalius.studies import gate

FAMILIES = sorted(tiny.FAMILIES)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> vs.Model:
    return tiny.model(request.param)


@pytest.fixture(scope="module")
def pairs() -> vs.Pairs:
    """Answers and distractors of one to three tokens."""
    one = tiny.pairs(6)
    more = torch.tensor([[3, 4], [-1, -1], [5, -1], [6, 7], [-1, -1], [9, -1]])
    other = torch.tensor([[5, -1], [2, 3], [-1, -1], [4, -1], [8, 2], [-1, -1]])
    answer, distractor = (torch.cat([a[:, None], b], 1) for a, b in ((one.answer, more), (one.distractor, other)))
    return replace(one, answer=answer, distractor=distractor)


def logprob(model: vs.Model, pairs: vs.Pairs, which: str, side: str, edits: Any = ()) -> Tensor:
    """Of each prompt's answer or distractor, one prompt at a time, one forward for each of its tokens."""
    found = []
    for row in range(len(pairs)):
        ids = getattr(pairs, which)[row, : int(pairs.size[row])]
        total = torch.zeros(())
        for token in getattr(pairs, side)[row]:
            if token >= 0:
                logits = model.run(vs.Tokens(ids[None]), interventions=edits[row] if edits else ()).logits[0, -1]
                total = total + logits.log_softmax(-1)[token]
                ids = torch.cat([ids, token[None]])
        found.append(total)
    return torch.stack(found)


def difference(model: vs.Model, pairs: vs.Pairs, which: str, edits: Any = ()) -> Tensor:
    return logprob(model, pairs, which, "answer", edits) - logprob(model, pairs, which, "distractor", edits)


def patches(model: vs.Model, pairs: vs.Pairs, name: str, position: int | None = None) -> list[list[vs.Ablate]]:
    """Zero ablation at the prompt's positions (all, and what follows too) or at one."""
    return [[vs.Ablate(name, positions=None if position is None else [position])] for _ in range(len(pairs))]


def test_a_sweep_scores_whole_sequences(model: vs.Model, pairs: vs.Pairs) -> None:
    scores = vs.sweep(model, pairs, sites=["layers.0.mlp_out", "layers.1.z[2]"], edit="zero", sink=silent)
    assert (scores.values.shape, scores.unit) == ((2, 6), "nats")
    torch.testing.assert_close(scores.base, difference(model, pairs, "corrupted"), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores.source, difference(model, pairs, "clean"), atol=1e-4, rtol=1e-4)
    for row, name in enumerate(scores.sites):
        expected = difference(model, pairs, "corrupted", patches(model, pairs, name))
        torch.testing.assert_close(scores.values[row], expected, atol=1e-4, rtol=1e-4)
    assert float(scores.effects.abs().max()) > 0.05


def test_patching_brings_the_clean_prompts_score_back(model: vs.Model, pairs: vs.Pairs) -> None:
    scores = vs.sweep(model, pairs, sites=["embed"], sink=silent)
    torch.testing.assert_close(scores.values[0], scores.source, atol=1e-4, rtol=1e-4)


def test_positions_are_those_of_the_prompt(model: vs.Model, pairs: vs.Pairs) -> None:
    scores = vs.sweep(model, pairs, sites="layers.1.resid_post", each="position", edit="zero", sink=silent)
    assert scores.values.shape == (1, pairs.clean.shape[1], 6)
    assert torch.equal(scores.mask[0], torch.arange(pairs.clean.shape[1])[:, None] < pairs.size)
    for position in (1, 4):
        expected = difference(model, pairs, "corrupted", patches(model, pairs, "layers.1.resid_post", position))
        torch.testing.assert_close(scores.values[0, position], expected, atol=1e-4, rtol=1e-4)


def test_the_log_probability_of_the_answer_alone(model: vs.Model, pairs: vs.Pairs) -> None:
    scores = vs.sweep(model, pairs, sites="layers.0.attn_out", edit="zero", metric=vs.answer_logprob, sink=silent)
    torch.testing.assert_close(scores.base, logprob(model, pairs, "corrupted", "answer"), atol=1e-4, rtol=1e-4)


def test_of_one_token_it_is_the_logit_difference(model: vs.Model) -> None:
    """The same prompts with answers written as sequences of one token and a row of two that nothing compares."""
    one = tiny.pairs(6)
    padded = replace(one, answer=torch.nn.functional.pad(one.answer[:, None], (0, 1), value=-1))
    assert padded.several
    plain, sequences = (vs.sweep(model, p, sites="layers.*.mlp_out", sink=silent) for p in (one, padded))
    torch.testing.assert_close(sequences.values, plain.values, atol=1e-4, rtol=1e-4)
    assert not replace(one, answer=one.answer[:, None]).several


def test_runs_fold_rows_into_pairs(model: vs.Model, pairs: vs.Pairs) -> None:
    runs, part = vs.Runs(model, pairs), vs.Unit(vs.Site("z", 0, 1))
    torch.testing.assert_close(runs.metric("clean"), difference(model, pairs, "clean"), atol=1e-4, rtol=1e-4)
    noising = runs.effects([part], "corrupted", "noising")[0]
    assert noising.shape == (6,)
    assert runs.shuffled_effects([part], "corrupted", "noising").shape == (1, 6)
    patched = vs.sweep(model, pairs, sites=[part], base="clean", sink=silent)
    torch.testing.assert_close(noising, patched.base - patched.values[0], atol=1e-5, rtol=1e-5)
    assert "several tokens" in DIRECT_EFFECT.refuses(runs, part)


def test_the_gate_reads_sequences(model: vs.Model, pairs: vs.Pairs) -> None:
    found = gate(model, pairs)
    answer, distractor = (logprob(model, pairs, "clean", side) for side in ("answer", "distractor"))
    assert found.preference.values == pytest.approx((answer > distractor).double().tolist())
    assert found.answer_probability.values == pytest.approx(answer.exp().tolist(), abs=1e-6)
    assert found.logit_diff.values == pytest.approx((answer - distractor).tolist(), abs=1e-4)


def test_one_run_cannot_be_scored_and_other_metrics_take_one_token(model: vs.Model, pairs: vs.Pairs) -> None:
    logits = model.run(pairs.tokens("clean")).logits
    with pytest.raises(InputError, match="logit_diff of answers of several tokens cannot be read off one run"):
        vs.logit_diff(logits, pairs)
    with pytest.raises(InputError, match="kl_divergence takes answers of one token; logit_diff and answer_logprob"):
        vs.sweep(model, pairs, sites="layers.0.mlp_out", metric=vs.kl_divergence, sink=silent)


def test_answers_that_are_no_sequences_are_refused(pairs: vs.Pairs) -> None:
    with pytest.raises(PairsError, match="answer of several tokens has them first and -1 only after the last"):
        replace(pairs, answer=pairs.answer.flip(1))
    with pytest.raises(PairsError, match="pair 0: answer equals distractor"):
        replace(pairs, distractor=pairs.answer)
    early = replace(pairs, read=pairs.at - 1)
    with pytest.raises(PairsError, match="follow the end of a decoder-only model's prompts"):
        early.teacher_forced()


def test_two_answers_with_the_same_first_token_are_different(pairs: vs.Pairs) -> None:
    distractor = pairs.answer.clone()
    distractor[:, 1] = 10
    assert len(replace(pairs, distractor=distractor).teacher_forced()) == 12
