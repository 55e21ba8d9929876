"""How much of a circuit its descriptions say: everything of a planted one, nothing without descriptions."""

from __future__ import annotations

from dataclasses import replace

import pytest

import vesalius as vs
from vesalius.describe import GOES_FIRST, ROLES, WHERE_IT_ACTS, Descriptions, Discovery, describe, described
from vesalius.errors import InputError
from vesalius.quantities import Runs
from vesalius.studies import Question, describe_members, summarise_members
from vesalius.toys import planted_induction, planted_pairs

MEMBERS = ("embed", "layers.0.z[1]", "layers.1.z[2]", "layers.2.z[0]", "layers.2.z[3]")


@pytest.fixture(scope="module")
def runs() -> tuple[Runs, Runs]:
    model, pairs = planted_induction(0), planted_pairs(36)
    discovery, fresh = (
        Runs(model, {n: p.split(split) for n, p in pairs.items()}) for split in ("discovery", "validation")
    )
    return discovery, fresh


@pytest.fixture(scope="module")
def members() -> list[vs.Part]:
    return [vs.Unit(vs.Site.parse(name)) for name in MEMBERS]


@pytest.fixture(scope="module")
def found(runs: tuple[Runs, Runs], members: list[vs.Part]) -> Descriptions:
    return describe(Discovery.of(runs[0], members), ROLES, GOES_FIRST, WHERE_IT_ACTS)


def test_descriptions_of_a_planted_circuit_say_all_of_it(
    runs: tuple[Runs, Runs], members: list[vs.Part], found: Descriptions
) -> None:
    kept = described(*runs, members, found.fits)
    assert kept.estimate == pytest.approx(1.0, abs=0.02)
    assert kept.diagnostics["with_a_value"] == kept.diagnostics["members"] == 4


def test_without_descriptions_nothing_is_said(runs: tuple[Runs, Runs], members: list[vs.Part]) -> None:
    assert described(*runs, members, {}).estimate == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("gone", MEMBERS[1:])
def test_one_description_less_says_less(
    runs: tuple[Runs, Runs], members: list[vs.Part], found: Descriptions, gone: str
) -> None:
    whole = described(*runs, members, found.fits)
    less = described(*runs, members, {**found.fits, gone: None})
    assert less.diagnostics["with_a_value"] == 3
    assert abs(less.estimate - whole.estimate) > 0.1


def test_a_wrong_description_says_something_else(
    runs: tuple[Runs, Runs], members: list[vs.Part], found: Descriptions
) -> None:
    """The name mover, told to look at the distractor."""
    mover = found.fits["layers.1.z[2]"]
    assert mover is not None
    looks = replace(mover.predictions[0], parameters={**mover.predictions[0].parameters, "key": "distractor_first"})
    wrong = replace(mover, predictions=(looks, *mover.predictions[1:]))
    assert described(*runs, members, {**found.fits, str(mover.part): wrong}).estimate < 0.5


def test_what_is_no_head_or_mlp_is_refused(runs: tuple[Runs, Runs]) -> None:
    with pytest.raises(InputError, match="neither"):
        described(*runs, [vs.Group("layers.0.z", [0, 1])], {})


def test_the_members_of_a_found_circuit_are_described_and_tested() -> None:
    model, pairs = planted_induction(0), planted_pairs(36)
    question = Question("planted", "Which token followed?", pairs)
    circuit = vs.circuits.discover(
        model, pairs[question.main].split("discovery"), "eap", size=25, drawn=5, sink=vs.silent
    )
    study = describe_members(question, model, circuit, sink=vs.silent)
    summary = summarise_members(study)
    assert summary["share"]["estimate"] == study.described.estimate
    assert "is kept on fresh prompts" in summary["answer"][0]
    by_member = {claim["component"] for claim in summary["claims"] if claim["verdict"] == "SUPPORTED"}
    assert "layers.1.z[2]" in by_member
    with pytest.raises(InputError, match="empty"):
        describe_members(question, model, replace(circuit, members=()), sink=vs.silent)
    other = {**circuit.setting, "model": "another"}
    with pytest.raises(InputError, match="another model"):
        describe_members(question, model, replace(circuit, setting=other), sink=vs.silent)
