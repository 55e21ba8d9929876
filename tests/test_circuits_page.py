"""docs/circuits.md: its examples run, and its methods are those there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import vesalius as vs
from pages import run_examples

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "circuits.md").read_text("utf-8")


def test_the_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    circuit = run_examples("circuits.md")["circuit"]
    assert isinstance(circuit, vs.circuits.Circuit) and len(circuit.edges) == 5
    printed = capsys.readouterr().out
    assert "layers.1.z[0] -> logits: -" in printed and "random edges cut exactly" in printed


def test_the_methods_on_the_page_are_all_there_are() -> None:
    table = PAGE.split("| method |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == set(vs.circuits.METHODS)
