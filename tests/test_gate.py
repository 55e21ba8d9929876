"""The gate says whether a model does the task, per template, by thresholds that are fixed beforehand."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import patching
import solvable
import tiny
import vesalius as vs
from pages import Page
from vesalius import report
from vesalius.jobs import silent
from vesalius.studies import run_study
from vesalius.studies.gate import FEWEST_ROWS, NO_TEMPLATE, PREFERENCE, TEMPLATE_PREFERENCE, Gate, gate

FIGURES = ("preference", "top1", "answer_probability", "answer_rank", "logit_diff")


@pytest.fixture(scope="module")
def model() -> vs.Model:
    return tiny.model("llama", layers=1)


def passed(model: vs.Model, wrong: Collection[int] = (), n: int = 16) -> Gate:
    pairs = solvable.random_pairs(2 * n).split("discovery")
    return gate(model, solvable.solved(model, pairs, wrong), "discovery")


def test_its_figures_are_those_of_full_logits(model: vs.Model) -> None:
    pairs = solvable.random_pairs(40).split("discovery")
    assert len(pairs) > 16  # several batches
    found = gate(model, pairs, "discovery")
    expected = patching.difference(patching.forward(model, pairs.tokens("clean")), pairs).double().numpy()
    np.testing.assert_allclose(found.logit_diff.values, expected, atol=1e-4)
    assert found.preference.estimate == pytest.approx((expected > 0).mean())
    assert found.logit_diff.estimate == pytest.approx(expected.mean(), abs=1e-4)
    assert found.logit_diff.low is not None and found.logit_diff.high is not None
    assert found.logit_diff.low < expected.mean() < found.logit_diff.high


def test_a_model_that_does_the_task_passes(model: vs.Model) -> None:
    found = passed(model)
    assert found.passed
    assert found.preference.estimate == 1.0
    assert found.rows == list(range(16))


def test_a_model_that_does_not_do_the_task_is_stopped(model: vs.Model) -> None:
    assert not passed(model, wrong=range(16)).passed
    almost = passed(model, wrong=(0, 1, 2, 4, 5))
    assert almost.preference.estimate == 11 / 16 < PREFERENCE
    assert not almost.passed


def test_a_failed_template_is_left_out_and_stays_in_the_report(model: vs.Model) -> None:
    # Rows 1, 5, 9 and 13 have template t1: two of four right is chance.
    found = passed(model, wrong=(1, 5))
    rows = {row.template: row for row in found.templates}
    assert rows["t1"].preference == TEMPLATE_PREFERENCE
    assert not rows["t1"].passed
    assert {name for name, row in rows.items() if row.passed} == {"t0", "t2", "t3"}
    assert found.rows == [row for row in range(16) if row % 4 != 1]
    assert found.passed
    assert rows["t1"].to_json() == {
        "template": "t1", "split": "discovery", "n": 4, "preference": 0.5, "top1": 0.5,
        "logit_diff": rows["t1"].logit_diff, "passed": False, "used": False,
    }  # fmt: skip


def test_one_right_of_many_templates_is_too_few_prompts(model: vs.Model) -> None:
    pairs = solvable.random_pairs(8, templates=8).split("discovery")
    found = gate(model, solvable.solved(model, pairs, wrong=(0,)), "discovery")
    assert found.preference.estimate == 0.75
    assert len(found.rows) < FEWEST_ROWS
    assert not found.passed


def test_prompts_without_templates_are_one_row(model: vs.Model) -> None:
    pairs = replace(solvable.random_pairs(16).split("discovery"), groups={})
    found = gate(model, solvable.solved(model, pairs), "discovery")
    assert [row.template for row in found.templates] == [NO_TEMPLATE]
    assert found.rows == list(range(8))


def test_a_single_template_is_no_obstacle(model: vs.Model) -> None:
    pairs = replace(solvable.random_pairs(16).split("discovery"), groups={"template": ("one",) * 8})
    assert gate(model, solvable.solved(model, pairs), "discovery").passed


# --- what it shows beside the preference


def test_top_1_probability_and_rank_are_those_of_full_logits(model: vs.Model) -> None:
    pairs = solvable.random_pairs(40).split("discovery")
    found = gate(model, pairs, "discovery")
    end = patching.forward(model, pairs.tokens("clean"))[torch.arange(len(pairs)), pairs.at].double()
    own = end[torch.arange(len(pairs)), pairs.answer]
    rank = 1 + (end > own[:, None]).sum(1)
    assert found.top1.estimate == pytest.approx(float((rank == 1).double().mean()))
    assert found.answer_probability.estimate == pytest.approx(float((own - end.logsumexp(1)).exp().mean()), abs=1e-5)
    assert found.answer_rank.estimate == float(np.median(rank.numpy()))
    assert found.answer_rank.low is found.answer_rank.high is None


def test_shares_keep_their_intervals_between_0_and_1(model: vs.Model) -> None:
    for wrong in ((), (3,), range(15)):
        found = passed(model, wrong)
        for figure in (found.preference, found.top1):
            assert figure.low is not None and figure.high is not None
            assert 0 <= figure.low <= figure.estimate <= figure.high <= 1


def test_answers_of_several_tokens_are_scored_as_sequences(model: vs.Model) -> None:
    pairs = solvable.random_pairs(40).split("discovery")
    second = (pairs.answer + 3) % 40 + 2
    longer = replace(pairs, answer=torch.stack([pairs.answer, second], 1))
    found = gate(model, longer, "discovery")
    rows = longer.teacher_forced()
    logits = patching.forward(model, rows.tokens("clean")).double().log_softmax(-1)[: len(pairs)]
    at = torch.arange(len(pairs))
    both = logits[at, pairs.at, pairs.answer] + logits[at, pairs.at + 1, second]
    assert found.answer_probability.estimate == pytest.approx(float(both.exp().mean()), abs=1e-6)
    alone = logits[at, pairs.at, pairs.distractor]
    np.testing.assert_allclose(found.logit_diff.values, (both - alone).numpy(), atol=1e-4)


def test_preference_and_not_accuracy_is_what_is_said(model: vs.Model, tmp_path: Path) -> None:
    study = run_study(solvable.random_question(model), model, options=solvable.OPTIONS, sink=silent)
    summary, found = solvable.summary_of(study), study["gate"]
    assert "accuracy" not in json.dumps(summary["gate"])
    shown = {name: summary["gate"][name]["estimate"] for name in FIGURES}
    assert shown == {name: getattr(found, name).estimate for name in FIGURES}
    page = Page(report.write(summary, tmp_path).read_text()).text
    assert "accuracy" not in page.lower()
    assert f"it prefers the answer in {found.preference.estimate:.0%}".replace("%", " %") in page.replace("\u00a0", " ")
    assert "The answer is the likeliest of all tokens in" in page
    assert "its probability is" in page and f"its median rank {found.answer_rank.estimate:.0f}," in page
    notebook = found._repr_html_()
    for words in ("answer preferred to the distractor", "first of all tokens", "probability of the answer", "rank"):
        assert words in notebook
    assert "accuracy" not in notebook
