"""The Python on the pages about models that can be read, the medical case and agents runs, and says what they say."""

from __future__ import annotations

import pytest

import vesalius as vs
from pages import run_examples


def test_the_page_about_models_that_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    names = run_examples("by-design.md")
    said = capsys.readouterr().out
    assert said.count("-> SUPPORTED") >= 3 and "-> REFUTED" not in said
    assert {names["names"][edge].name for edge in ((0, 0, 0), (0, 0, 1))} == {"sin", "x^2"}
    assert names["found"].leaks


def test_the_page_about_the_medical_case() -> None:
    names = run_examples("medical.md")
    table = names["asked"].table
    assert {name: table.splits.count(name) for name in table.split_names} == {
        "discovery": 140,
        "validation": 180,
        "elsewhere": 249,
    }


def test_the_page_about_agents(capsys: pytest.CaptureFixture[str]) -> None:
    names = run_examples("agents.md")
    assert {label: one.said for label, one in names["found"].items()} == {
        "goal": vs.studies.USED,
        "hazard": vs.studies.UNUSED,
    }
    assert float(capsys.readouterr().out.split("tensor(")[1].split(")")[0]) > 0.9
