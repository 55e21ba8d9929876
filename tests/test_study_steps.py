"""A study is named steps that make named artefacts: other studies than the built-in one are lists of other steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import solvable
import vesalius as vs
from solvable import OPTIONS
from vesalius.circuits import Effects
from vesalius.describe.predictions import claim_about
from vesalius.errors import UnknownNameError
from vesalius.jobs import Blocks, Event, silent
from vesalius.protocol import Evidence, Family
from vesalius.protocol.ledger import Ledger
from vesalius.quantities import Runs
from vesalius.studies import TASK_CIRCUIT, Artefact, Step, StoppedError, Work, run_steps, run_study
from vesalius.studies.task_circuit import EFFECTS
from vesalius.toys import PLANTED
from vesalius.validate import check

MOVER = str(PLANTED["name mover"][0])
RUNS, FAMILY, EVIDENCE = Artefact("my_runs", Runs), Artefact("family", Family), Artefact("evidence", Evidence)
COUNT = Artefact("count", int)


def discover(work: Work) -> Runs:
    return Runs(work.model, work.question.contrast("discovery"), check=False)


def claim(work: Work) -> Family:
    """One claim: the mover's corrupted value changes the metric."""
    runs = work[RUNS]
    with work.counting(runs):
        return work.ledger.register([claim_about(runs, MOVER, "total_effect", study=work.question.name)])


def measure(work: Work) -> Evidence:
    opened = {name: work.ledger.open(pairs, "validation") for name, pairs in work.question.corruptions.items()}
    runs = Runs(work.model, opened, check=False)
    with work.counting(runs):
        found = check(work[FAMILY].claims[0], runs=runs)
    work.ledger.append(found)
    return found


STEPS = (Step("runs", RUNS, discover), Step("claim", FAMILY, claim), Step("test", EVIDENCE, measure))


def answer(made: Mapping[str, Any]) -> list[str]:
    (verdict,) = made["verdicts"]
    return [f"That the mover matters is {verdict.outcome}."]


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def work(tmp_path: Path, events: list[Event]) -> Iterator[Work]:
    question, model = solvable.planted()
    made = Work(question, model, OPTIONS, Blocks(None, ""), tmp_path / "ledger.sqlite", events.append)
    with closing(made):
        yield made


def step(name: str, run: Callable[[Work], Any], makes: Artefact[Any] = COUNT) -> Step[Any]:
    return Step(name, makes, run)


def test_own_steps_make_a_study_with_claims_and_verdicts(work: Work, events: list[Event], tmp_path: Path) -> None:
    study = run_steps(work, STEPS, answer)
    assert [event.task for event in events if event.kind == "note"] == ["runs", "claim", "test"]
    assert list(study.artefacts) == ["my_runs", "family", "evidence"]
    assert study[RUNS] is study["my_runs"] is study.my_runs
    assert [verdict.outcome for verdict in study.verdicts] == ["SUPPORTED"]
    assert study.answer == ("That the mover matters is SUPPORTED.",)
    assert study.claims == study[FAMILY].claims and study.sealed_at is not None
    assert [name for name, _ in study.costs] == ["claim", "test"]
    assert all(cost.spent > 0 for _, cost in study.costs)
    assert study.claims[0].statement in study._repr_html_().replace("&#x27;", "'")
    with Ledger(tmp_path / "ledger.sqlite", create=False) as ledger:
        assert ledger.verify().head == study.ledger_head


def test_a_step_sees_what_was_made_before_it_and_nothing_else(work: Work) -> None:
    def look(so_far: Work) -> int:
        assert RUNS in so_far and "my_runs" in so_far and FAMILY not in so_far
        assert so_far.get(FAMILY) is None and so_far.get("family", 3) == 3
        with pytest.raises(UnknownNameError, match="unknown artefact 'family'; known: my_runs"):
            so_far[FAMILY]
        return len(so_far)

    study = run_steps(work, [STEPS[0], step("look", look)], lambda _: ["looked"])
    assert study[COUNT] == 1
    assert COUNT in study and FAMILY not in study and study.get(FAMILY) is None
    with pytest.raises(UnknownNameError, match="unknown artefact 'family'; known: count, my_runs"):
        study[FAMILY]
    with pytest.raises(AttributeError, match="this study has no 'familly'; its artefacts: my_runs, count"):
        _ = study.familly


def test_a_step_that_makes_something_else_is_an_error(work: Work) -> None:
    with pytest.raises(TypeError, match="step 'count' makes a int; got str"):
        run_steps(work, [step("count", lambda _: "three")], answer)


def test_a_step_can_stop_the_study_and_leave_what_it_found(work: Work, tmp_path: Path) -> None:
    def stop(_: Work) -> int:
        raise StoppedError("there is nothing here", 0)

    later: list[str] = []
    steps = [step("count", stop), step("later", lambda _: later.append("ran") or 1, Artefact("more", int))]
    study = run_steps(work, steps, answer)
    assert (study.stopped, study[COUNT], later) == ("there is nothing here", 0, [])
    assert study.answer == ("there is nothing here", "Nothing is claimed.")
    assert (study.claims, study.verdicts, study.sealed_at, study.ledger_head) == ((), (), None, "")
    assert not (tmp_path / "ledger.sqlite").exists()


def test_a_study_that_stops_after_its_claims_keeps_them(work: Work) -> None:
    def stop(_: Work) -> int:
        raise StoppedError("too little memory to go on")

    study = run_steps(work, [*STEPS, step("stop", stop)], answer)
    assert study.answer == ("too little memory to go on",)
    assert (len(study.claims), len(study.verdicts)) == (1, 1)


def test_a_ledger_that_is_open_can_be_given(tmp_path: Path) -> None:
    question, model = solvable.planted()
    with Ledger(tmp_path / "mine.sqlite") as ledger:
        study = run_steps(Work(question, model, OPTIONS, Blocks(None, ""), ledger, silent), STEPS, answer)
        assert ledger.verdicts(study[FAMILY]) == study.verdicts


def test_the_first_steps_of_a_task_s_study_are_a_study() -> None:
    question, model = solvable.planted()
    study = run_study(question, model, options=OPTIONS, steps=TASK_CIRCUIT[:3], sink=silent)
    assert isinstance(study[EFFECTS], Effects)
    assert list(study.artefacts) == ["gate", "discovery", "effects"]
    assert (study.stopped, study.answer, study.claims) == (None, (), ())


@pytest.mark.slow
def test_a_step_can_be_put_into_a_task_s_study() -> None:
    question, model = solvable.planted()
    steps = [*TASK_CIRCUIT[:3], step("count", lambda work: len(work[EFFECTS].significant)), *TASK_CIRCUIT[3:]]
    study = run_study(question, model, options=OPTIONS, steps=steps, sink=silent)
    plain = run_study(question, model, options=OPTIONS, sink=silent)
    assert study[COUNT] >= 3
    assert study.answer == plain.answer
    assert [claim.id for claim in study.claims] == [claim.id for claim in plain.claims]
    assert vs.studies.summarise(study, command="", timings=solvable.TIMINGS)["claims"]
