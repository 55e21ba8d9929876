"""What a study owes its reader: fair comparisons, sentences that say what was tested, and nothing left unclaimed."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import solvable
import tiny
import vesalius as vs
from pages import Page
from solvable import OPTIONS, small_study, summary_of
from vesalius import report
from vesalius.describe import Discovery, claims_of, describe_circuit
from vesalius.describe.predictions import claim_about
from vesalius.jobs import Event, silent
from vesalius.protocol import Verdict
from vesalius.protocol.ledger import Ledger
from vesalius.protocol.verdict import decide
from vesalius.quantities import Runs
from vesalius.quantities.circuit import metric_without, random_sets
from vesalius.quantities.contrast import EMBED
from vesalius.stats import groups_to_decide
from vesalius.studies import Question, Study, claim_row, random_weights_control, run_study, sentences
from vesalius.studies.forecast import LEVEL, TYPICAL_CLAIMS, TYPICAL_EFFECT, power_note
from vesalius.studies.task_circuit import CIRCUIT, DESCRIPTIONS, DISCOVERY, EFFECTS, TESTED
from vesalius.toys import PLANTED, planted_pairs
from vesalius.validate import check

MOVERS = tuple(str(site) for site in PLANTED["name mover"])


@pytest.fixture(scope="module")
def study() -> Study:
    return small_study(None)


@pytest.fixture(scope="module")
def summary(study: Study) -> dict[str, Any]:
    return summary_of(study)


# --- what a circuit is compared with


@pytest.mark.parametrize("seed", range(6))
def test_random_sets_outside_never_hold_a_member(study: Study, seed: int) -> None:
    runs, members = study[DISCOVERY], study[CIRCUIT].members
    sets = random_sets(runs, members, 20, seed, outside=True)
    assert len(sets) == 20
    kinds = Counter(part.writes[0].kind for part in members)
    for some in sets:
        assert not set(some) - {EMBED} & set(members)
        assert Counter(part.writes[0].kind for part in some) == kinds


def test_completeness_is_compared_with_sets_outside_the_circuit(study: Study) -> None:
    tested, members = study[TESTED], study[CIRCUIT].members
    claim = next(claim for claim in study.claims if claim.quantity == "completeness")
    sets = random_sets(tested.runs, members, claim.control["draws"], tested.runs.seed, outside=True)
    without = metric_without(tested.runs, [[part for part in some if part != EMBED] for some in sets], "resample")
    lost = tested.runs.metric("clean").double().numpy() - without
    np.testing.assert_allclose(tested.evidence[claim.id].control, lost.mean(0), atol=1e-4)
    assert "outside the circuit" in claim.control["rule"]


def test_with_too_few_components_outside_there_is_no_such_leg_and_it_says_so(study: Study) -> None:
    runs = study[DISCOVERY]
    most = runs.components[:-2]
    assert random_sets(runs, most, 3, 0, outside=True) == []
    setting = Discovery.of(runs, most)
    kept, lost = (claim for claim, _ in claims_of(describe_circuit(setting, most, 5), setting))
    assert kept.control and not lost.control
    assert "too few components lie outside it to compare with" in lost.statement
    evidence = check(lost, runs=study[TESTED].runs)
    (verdict,) = decide([lost], {lost.id: evidence})
    assert evidence.control is None
    assert [leg["name"] for leg in verdict.legs] == ["effect"]
    row = claim_row(lost, verdict, evidence)
    assert (row["control"], row["control_estimate"], row["control_values"]) == (None, None, None)
    assert "control" not in row["measured"]


# --- true, and nothing special


def not_specific(tmp_path: Path, study: Study) -> tuple[vs.Claim, Verdict, Any]:
    """A claim about one mover that is compared with the other, which does the same."""
    runs = study[DISCOVERY]
    claim = claim_about(runs, MOVERS[0], "attends", {"query": "end", "key": "answer", "elsewhere": "distractor_first"})
    claim = replace(claim, control={"rule": "the other mover", "parts": [MOVERS[1]]})
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.register([claim])
        opened = {name: ledger.open(pairs, "validation") for name, pairs in study.question.corruptions.items()}
        evidence = check(claim, runs=Runs(study.model, opened))
        ledger.append(evidence)
        return claim, ledger.verdict(claim), evidence


def test_an_effect_that_its_control_has_too_is_not_specific(study: Study, tmp_path: Path) -> None:
    claim, verdict, evidence = not_specific(tmp_path, study)
    assert verdict.outcome == "NOT SPECIFIC"
    effect, control = verdict.legs[:2]
    assert effect["p_greater"] < 0.05 and control["p_less"] < 0.05
    row = claim_row(claim, verdict, evidence)
    assert (row["verdict"], row["p"]) == ("NOT SPECIFIC", verdict.p_refuted)
    assert row["measured"].endswith(f"; the control {row['control_estimate']:+.3g}.")


def test_what_is_not_specific_is_counted_apart_in_answer_summary_and_page(study: Study, tmp_path: Path) -> None:
    (specific,) = (replace(study.verdicts[0], outcome="NOT SPECIFIC", reason=None),)
    odd = replace(study, verdicts=(specific, *study.verdicts[1:]))
    odd = replace(odd, answer=tuple(sentences({**odd.artefacts, "verdicts": odd.verdicts})))
    before, after = (Counter(verdict.outcome for verdict in one.verdicts) for one in (study, odd))
    assert after["SUPPORTED"] == before["SUPPORTED"] - 1
    assert f"{after['SUPPORTED']} were supported, 0 refuted, 1 true but not specific" in odd.answer[1]
    summary = summary_of(odd)
    report.schema.check(summary)
    assert [row["verdict"] for row in summary["claims"]].count("NOT SPECIFIC") == 1
    tallies = Page(report.write(summary, tmp_path).read_text()).text
    assert re.search(rf"{after['SUPPORTED']} \S+ supported", tallies) and re.search(r"\b1 \S+ not specific", tallies)
    assert re.search(r"\b0 \S+ refuted", tallies)


# --- sentences that say what was tested


def test_the_sentence_under_a_verdict_states_the_threshold_and_what_validation_measured(
    study: Study, summary: dict[str, Any], tmp_path: Path
) -> None:
    text = Page(report.write(summary, tmp_path).read_text()).text
    for claim, row in zip(study.claims, summary["claims"], strict=True):
        tested, measured = row["measured"].split(" Measured on ")
        assert tested.startswith(f"Tested: at {'least' if claim.sign > 0 else 'most'} {claim.sign * claim.delta:+.3g}")
        assert measured.startswith(f"{row['n']} fresh prompts in {row['n_groups']} groups")
        assert f"{row['estimate']:+.3g} [" in measured
        assert row["measured"] in text


def test_the_estimate_of_discovery_stands_in_no_sentence_of_a_claim(study: Study, summary: dict[str, Any]) -> None:
    estimates = study[DESCRIPTIONS].estimates
    for claim, row in zip(study.claims, summary["claims"], strict=True):
        assert row["discovery"] == estimates[claim.id]
        changed = claim_row(claim, study.verdicts[0], study[TESTED].evidence[claim.id], 123.456)
        assert "123" not in changed["measured"] + changed["statement"]
        # What a claim states is its threshold, which may be half of the estimate but never is the estimate.
        assert f"{claim.sign * claim.delta:+.3g}" in claim.statement
        assert f"{estimates[claim.id]:.2f}" not in claim.statement


def test_the_headline_names_all_three_ablations_with_what_each_keeps(study: Study, summary: dict[str, Any]) -> None:
    said = {
        "resample": "when the rest gets corrupted values",
        "mean": "when it gets its mean",
        "zero": "when it gets zeros",
    }
    kept = {row["ablation"]: row for row in summary["circuit"]["faithfulness"]}
    assert sorted(kept) == sorted(said)
    for ablation, words in said.items():
        row = kept[ablation]
        assert f"{row['estimate']:.0%} [{row['low']:.0%}, {row['high']:.0%}] {words}" in study.answer[0]


# --- nothing left unclaimed


def test_every_member_with_an_effect_above_delta_has_a_causal_claim(study: Study) -> None:
    effects, runs = study[EFFECTS], study[DISCOVERY]
    delta = Discovery.of(runs, study[CIRCUIT].members).delta
    mean = dict(zip(effects.components, effects.conditions[0].effects, strict=True))
    large = [part for part in study[CIRCUIT].members if part != EMBED and abs(mean[part].estimate) >= delta]
    assert large
    causal = {claim.subject["name"] for claim in study.claims if claim.quantity == "total_effect"}
    assert {str(part) for part in large} <= causal


def test_a_member_without_a_role_is_claimed_to_matter_all_the_same() -> None:
    model = tiny.model("llama", layers=2)
    found = run_study(solvable.random_question(model), model, options=OPTIONS, sink=silent)
    fits = found[DESCRIPTIONS].fits
    plain = {claim.subject["name"]: claim for claim in found.claims if claim.role is None}
    # Those whose role says nothing of it, and those that have none.
    bare = [name for name in plain if fits[name] is None or fits[name].label.startswith("acts at")]
    assert bare
    for name in bare:
        assert (plain[name].quantity, plain[name].kind) == ("total_effect", "causal")
    report.schema.check(summary_of(found))


# --- what the data can decide


def test_too_few_templates_are_told_before_anything_is_patched() -> None:
    model, events = tiny.model("llama", layers=1), list[Event]()
    question = solvable.random_question(model)
    run_study(question, model, options=OPTIONS, sink=events.append)
    notes = {event.task: (number, event.message) for number, event in enumerate(events) if event.kind == "note"}
    number, message = notes["power"]
    assert number < notes["patching"][0]
    needed = groups_to_decide(TYPICAL_EFFECT, alpha=LEVEL / TYPICAL_CLAIMS, skewed=True)
    assert f"the validation split has 4 templates; about {needed} decide a typical claim" in message
    assert f"Give prompts of {needed - 4} more templates" in message


def test_prompts_without_groups_are_counted_themselves_and_enough_need_no_word() -> None:
    model = tiny.model("llama", layers=1)
    pairs = replace(solvable.random_question(model, n=12).corruptions["corrupted"], groups={})
    (sentence,) = power_note(Question("bare", "?", {"corrupted": pairs}))
    assert "the validation split has 6 prompts" in sentence
    (sentence,) = power_note(Question("planted", "?", planted_pairs(16)))
    assert "the validation split has 12 templates" in sentence
    many = replace(planted_pairs(32)["swap"], groups={})
    assert power_note(Question("bare", "?", {"swap": many})) == []


# --- the control, from Python


@pytest.mark.slow
def test_the_random_weights_control_is_one_call(study: Study, tmp_path: Path) -> None:
    found = random_weights_control(study.question, study.model, out=tmp_path, options=OPTIONS, sink=silent)
    assert found.control is not None and found.control.options.control == "random-weights"
    assert [verdict.outcome for verdict in found.trained.verdicts] == [verdict.outcome for verdict in study.verdicts]
    assert [row["id"] for row in found.rows] == [claim.id for claim in found.trained.claims]
    assert sum(row["verdict"] == "SUPPORTED" for row in found.rows) <= 1
    assert {"ledger.sqlite", "trained", "trained-claims.sqlite"} <= {path.name for path in tmp_path.iterdir()}
    assert found._repr_html_().count("<table>") == 2


def test_the_control_of_a_model_that_stops_at_the_gate_is_none() -> None:
    model = tiny.model("llama", layers=1)
    question = solvable.random_question(model, wrong=range(32))
    found = random_weights_control(question, model, options=OPTIONS, sink=silent)
    assert (found.control, found.rows) == (None, ())
    assert found.trained.stopped and found._repr_html_() == found.trained._repr_html_()
