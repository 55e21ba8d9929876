"""The gate says whether a model does the task, per template, by thresholds that are fixed beforehand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import patching
import solvable
import tiny
import vesalius as vs
from vesalius.studies.gate import FEWEST_ROWS, NO_TEMPLATE, PREFERENCE, TEMPLATE_PREFERENCE, Gate, gate


@pytest.fixture(scope="module")
def model() -> vs.Model:
    return tiny.model("llama", layers=1)


def passed(model: vs.Model, wrong: range | tuple[int, ...] = (), n: int = 16) -> Gate:
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
