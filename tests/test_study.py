"""A study from end to end: reproducible, resumable, sealed before it is tested, and honest when there is nothing."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import solvable
import tiny
import vesalius as vs
from pages import Page
from solvable import OPTIONS, small_study, summary_of, timeless
from vesalius import report
from vesalius.circuits import edges_from_json, edges_to_json
from vesalius.describe import Descriptions
from vesalius.errors import FileFormatError, InputError
from vesalius.jobs import Event
from vesalius.protocol.ledger import Ledger
from vesalius.quantities import Runs
from vesalius.studies import Question, Study, claims_on, run_study, supported_roles, task_circuit
from vesalius.studies.task_circuit import CIRCUIT, DESCRIPTIONS, DISCOVERY, FAMILY, TESTED
from vesalius.toys import PLANTED
from vesalius.validate import reinitialised

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return []


@pytest.fixture(scope="module")
def study(folder: Path, events: list[Event]) -> Study:
    return small_study(folder, events.append)


@pytest.fixture(scope="module")
def summary(study: Study) -> dict[str, Any]:
    return summary_of(study)


def files(folder: Path) -> dict[str, bytes]:
    """Content of every file; SQLite's bookkeeping aside."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(("-wal", "-shm")))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


# --- what comes out


def test_the_summary_follows_the_schema_and_makes_a_report(summary: dict[str, Any], tmp_path: Path) -> None:
    report.schema.check(summary)
    page = report.write(summary, tmp_path).read_text()
    assert summary["answer"][0] in page
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))


def test_the_study_finds_the_planted_parts_and_its_claims_stand(study: Study, summary: dict[str, Any]) -> None:
    members = {member["component"] for member in summary["circuit"]["members"]}
    assert members == {"embed", *(str(part) for parts in PLANTED.values() for part in parts)}
    supported = supported_roles(study.artefacts, study.verdicts)
    assert supported["name mover"] == [str(PLANTED["name mover"][0])]
    assert supported["negative mover"] == [str(PLANTED["negative mover"][0])]
    outcomes = {row["quantity"]: row["verdict"] for row in summary["claims"] if row["kind"] == "circuit"}
    assert outcomes["faithfulness"] == "SUPPORTED"
    assert "negative mover" in summary["answer"][0]


def test_faithfulness_is_given_under_every_ablation_against_random_sets(summary: dict[str, Any]) -> None:
    rows = {row["ablation"]: row for row in summary["circuit"]["faithfulness"]}
    assert sorted(rows) == ["mean", "resample", "zero"]
    assert rows["resample"]["estimate"] == pytest.approx(1.0, abs=0.05)
    for row in rows.values():
        assert row["random"]["draws"] == len(row["random"]["values"]) == OPTIONS.random_sets
        assert row["random"]["p"] >= 1 / (OPTIONS.random_sets + 1) - 1e-12
    left = {row["ablation"]: row["estimate"] for row in summary["circuit"]["completeness"]}
    assert left["resample"] < 0.2


def test_the_steps_are_announced_in_order(study: Study, events: list[Event], summary: dict[str, Any]) -> None:
    notes = [event.task for event in events if event.kind == "note"]
    assert notes == ["gate", "record", "cost", "power", "patching", "circuit", "describe", "seal", "validate"]
    costly = [step["name"] for step in summary["cost"]["steps"]]
    assert costly == ["patching", "circuit", "describe", "validate"]
    assert all(step["forwards"] > 0 for step in summary["cost"]["steps"] if step["name"] != "describe")


def test_claims_about_the_circuit_say_how_many_random_sets_they_are_held_against(study: Study) -> None:
    tested, claims = study[TESTED], {claim.quantity: claim for claim in study.claims if claim.kind == "circuit"}
    for quantity, sets in (("faithfulness", tested.with_only), ("completeness", tested.without)):
        control = claims[quantity].control
        assert control["draws"] == len(sets["resample"]) - 2
        assert f"mean of {control['draws']} random sets" in control["rule"]


def test_a_study_shows_in_a_notebook(study: Study) -> None:
    shown = study._repr_html_()
    assert shown.count("<tr>") == 1 + len(study.verdicts)
    assert "SUPPORTED" in shown
    claims = (replace(study.claims[0], statement="<script>alert(1)</script>"),)
    odd = replace(study, claims=claims, verdicts=study.verdicts[:1], answer=("<b>stopped</b>",))._repr_html_()
    assert "<script>" not in odd and "&lt;script&gt;" in odd
    assert "<b>" not in odd and "&lt;b&gt;" in odd


# --- reproducible and resumable


def test_two_runs_with_one_seed_give_the_same_summary(summary: dict[str, Any]) -> None:
    assert timeless(summary_of(small_study(None))) == timeless(summary)


def test_a_finished_study_is_read_back_without_measuring(
    folder: Path, summary: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    evaluate = Runs.evaluate

    def counted(self: Runs, variants: Any, base: Any, source: Any, task: str, watch: Any = ()) -> Any:
        measured.append(task)
        return evaluate(self, variants, base, source, task, watch)

    monkeypatch.setattr(Runs, "evaluate", counted)
    monkeypatch.setattr(task_circuit, "describe", lambda *_: pytest.fail("described again"))
    assert timeless(summary_of(small_study(folder))) == timeless(summary)
    assert measured == []


def test_claims_are_read_back_to_the_last_digit(study: Study) -> None:
    described, circuit = study[DESCRIPTIONS], study[CIRCUIT]
    found = Descriptions.from_json(through_json(described.to_json()), *circuit.members)
    assert [claim.id for claim in found.claims] == [claim.id for claim in study.claims]
    assert list(found.fits) == list(described.fits)
    assert through_json(found.to_json()) == through_json(described.to_json())
    assert found.estimates == described.estimates
    assert edges_from_json(through_json(edges_to_json(circuit.edges)), circuit.members) == circuit.edges
    assert edges_from_json([], circuit.members) == {}


def through_json(data: Any) -> Any:
    return json.loads(json.dumps(data))


def test_a_study_that_is_killed_again_and_again_ends_like_one_that_is_not(
    summary: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, str(TESTS / "killed_study.py"), str(out), "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=TESTS)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["ended"].count(-9) >= 3
    assert found["ended"][-1] == 0
    assert found["summary"] == timeless(summary)
    with Ledger(out / "ledger.sqlite", create=False) as ledger:
        assert ledger.verify().evidence == summary["family"]["m"]


# --- the protocol


def test_claims_are_sealed_before_the_validation_split_is_opened(folder: Path, study: Study) -> None:
    with sqlite3.connect(folder / "ledger.sqlite") as connection:
        rows = connection.execute("SELECT kind, json_extract(payload, '$.split') FROM records ORDER BY seq").fetchall()
    connection.close()
    kinds = [kind for kind, _ in rows]
    discovery, validation = (rows.index(("opening", split)) for split in ("discovery", "validation"))
    assert discovery < kinds.index("family") < validation < kinds.index("evidence")
    assert kinds.count("family") == 1
    assert kinds.count("evidence") == len(study.claims)
    with Ledger(folder / "ledger.sqlite", create=False) as ledger:
        assert not ledger.families()[0].exploratory
        opened = [opening.split for opening in ledger.openings()]
        each = len(study.question.corruptions)
        # Some tests before this one went through the finished study again.
        assert opened[: 2 * each] == ["discovery"] * each + ["validation"] * each
        assert study.sealed_at == ledger.openings()[each].at


def test_claims_name_discovery_as_their_parents_and_are_tested_on_validation_only(study: Study) -> None:
    corruptions = study.question.corruptions.values()
    discovery = tuple(pairs.split("discovery").content_hash for pairs in corruptions)
    seen = {h for pairs in corruptions for h in pairs.split("discovery").example_hashes}
    fresh = set(study.question.corruptions["swap"].split("validation").example_hashes)
    for claim in study.claims:
        assert claim.parents == discovery
        tested = set(study[TESTED].evidence[claim.id].example_hashes)
        assert tested <= fresh
        assert not tested & seen


def test_nothing_of_the_validation_split_enters_the_claims(study: Study) -> None:
    question, model = solvable.planted()
    changed = {name: other_fillers(pairs) for name, pairs in question.corruptions.items()}
    other = run_study(replace(question, corruptions=changed), model, options=OPTIONS)
    assert other[FAMILY].id == study[FAMILY].id
    assert [v.estimate for v in other.verdicts] != [v.estimate for v in study.verdicts]


def other_fillers(pairs: vs.Pairs) -> vs.Pairs:
    """The same pairs, with another first token in the validation prompts; it belongs to no planted pair."""
    rows = torch.tensor([split == "validation" for split in pairs.splits])
    token = torch.where(pairs.clean[:, 0] == 63, 62, 63)
    clean, corrupted = pairs.clean.clone(), pairs.corrupted.clone()
    clean[rows, 0], corrupted[rows, 0] = token[rows], token[rows]
    return replace(pairs, clean=clean, corrupted=corrupted)


def test_the_ledger_verifies_and_its_verdicts_are_the_study_s(folder: Path, study: Study) -> None:
    with Ledger(folder / "ledger.sqlite", create=False) as ledger:
        found = ledger.verify()
        assert ledger.verdicts(study[FAMILY].id) == study.verdicts
    assert found.claims == found.evidence == len(study.verdicts)
    assert found.replications == 0


# --- the gate


@pytest.fixture(scope="module")
def model() -> vs.Model:
    return tiny.model("llama", layers=1)


def test_a_model_that_cannot_do_the_task_is_stopped_and_nothing_is_claimed(model: vs.Model, tmp_path: Path) -> None:
    question = solvable.random_question(model, wrong=range(32))
    stopped = run_study(question, model, out=tmp_path, options=OPTIONS)
    assert stopped.stopped is not None
    assert "prefers the answer to the distractor in 0% of 16 discovery prompts" in stopped.stopped
    assert "--past-gate" in stopped.stopped
    assert not (tmp_path / "ledger.sqlite").exists()
    summary = summary_of(stopped)
    report.schema.check(summary)
    assert (summary["claims"], summary["circuit"], summary["family"]) == ([], None, None)
    assert stopped._repr_html_().startswith("<p>")
    assert stopped.stopped in report.write(summary, tmp_path).read_text()


def test_past_the_gate_the_same_folder_goes_on(model: vs.Model, tmp_path: Path) -> None:
    question = solvable.random_question(model, wrong=range(32))
    assert run_study(question, model, out=tmp_path, options=OPTIONS).stopped
    gone_on = run_study(question, model, out=tmp_path, options=replace(OPTIONS, past_gate=True))
    assert gone_on.stopped is None
    assert gone_on.verdicts
    summary = summary_of(gone_on)
    report.schema.check(summary)
    assert summary["gate"]["passed"] is False


def test_templates_below_the_gate_are_left_out_on_discovery_and_no_row_is_on_validation(model: vs.Model) -> None:
    # Rows 1, 5, 9, 13 are template t1 of discovery; rows 18, 22, 26, 30 t6 of validation, all wrong.
    question = solvable.random_question(model, wrong=(1, 5, 9, 18, 22, 26, 30))
    study = run_study(question, model, options=OPTIONS)
    assert set(study[DISCOVERY].pairs.groups["template"]) == {"t0", "t2", "t3"}
    validation = question.corruptions["corrupted"].split("validation")
    assert study[TESTED].runs.pairs.content_hash == validation.content_hash
    for evidence in study[TESTED].evidence.values():
        assert evidence.example_hashes == validation.example_hashes
        assert evidence.groups["template"].count("t6") == 4
    assert {verdict.n for verdict in study.verdicts} == {16}


def test_the_summary_and_the_page_count_the_prompts_that_were_used(model: vs.Model, tmp_path: Path) -> None:
    question = solvable.random_question(model, wrong=(1, 5, 9, 18, 22, 26, 30))
    summary = summary_of(run_study(question, model, options=OPTIONS))
    assert summary["question"]["n"] == {"discovery": 16, "validation": 16}
    assert summary["question"]["used"] == {"discovery": 12, "validation": 16}
    rows = {row["template"]: row for row in summary["gate"]["templates"]}
    assert [name for name, row in rows.items() if not row["used"]] == ["t1"]
    assert {row["passed"] for row in rows.values() if row["split"] == "validation"} == {None}
    assert rows["t6"]["preference"] == 0.0
    page = Page(report.write(summary, tmp_path).read_text()).text
    assert "12 prompt pairs were used to find the circuit (discovery, of 16 made) and 16 fresh ones" in page


def test_one_template_in_each_split_is_enough_for_a_study_but_not_for_support(model: vs.Model) -> None:
    pairs = solvable.random_question(model).corruptions["corrupted"]
    pairs = replace(pairs, groups={"template": tuple(f"only {split}" for split in pairs.splits)})
    study = run_study(Question("one", "?", {"corrupted": pairs}), model, options=OPTIONS)
    report.schema.check(summary_of(study))
    assert {verdict.outcome for verdict in study.verdicts} == {"INCONCLUSIVE"}


# --- folders


def test_a_folder_of_another_study_is_refused_and_left_alone(folder: Path, study: Study, model: vs.Model) -> None:
    before = files(folder)
    for changes in ({"seed": 5}, {"random_sets": 9}):
        with pytest.raises(InputError, match=f"{folder} holds another study .* choose another folder, or delete"):
            small_study(folder, **changes)
    stopping = solvable.random_question(model, wrong=range(32))
    with pytest.raises(InputError, match="holds another study"):
        run_study(stopping, model, out=folder, options=OPTIONS)
    assert files(folder) == before


def test_a_ledger_that_is_none_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_text("my notes")
    with pytest.raises(FileFormatError, match=r"ledger.sqlite cannot be used as a ledger"):
        small_study(tmp_path)
    assert files(tmp_path) == {"ledger.sqlite": b"my notes"}


def test_too_few_random_sets_are_refused() -> None:
    with pytest.raises(InputError, match="random_sets must be at least 4; got 3"):
        replace(OPTIONS, random_sets=3)


# --- the control


def test_the_trained_model_s_claims_are_tested_on_random_weights(study: Study, tmp_path: Path) -> None:
    blank = reinitialised(study.model, 0)
    rows = claims_on(study, blank, tmp_path)
    assert [row["id"] for row in rows] == [row["id"] for row in summary_of(study)["claims"]]
    assert sum(row["verdict"] == "SUPPORTED" for row in summary_of(study)["claims"]) > 5
    assert sum(row["verdict"] == "SUPPORTED" for row in rows) <= 1
    with Ledger(tmp_path / "trained-claims.sqlite", create=False) as ledger:
        assert ledger.verify().evidence == len(rows)
        assert ledger.families()[0].study == f"planted, on {blank.name}"
    assert claims_on(study, blank, tmp_path) == rows
    summary = summary_of(study, on_control=rows)
    report.schema.check(summary)
    assert summary["trained_claims_on_control"] == rows


def test_a_stopped_study_has_no_claims_to_test_elsewhere(model: vs.Model, tmp_path: Path) -> None:
    stopped = run_study(solvable.random_question(model, wrong=range(32)), model, options=OPTIONS)
    assert claims_on(stopped, model, tmp_path) == []
