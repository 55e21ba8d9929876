"""The Python on the page about explaining runs, and says what the page says."""

from __future__ import annotations

import re

import pytest

import vesalius as vs
from pages import run_examples


@pytest.mark.slow
@pytest.mark.demo_model
def test_the_page_runs_and_neuron_90_is_found_to_fire_on_the(
    demo: vs.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vs, "load", lambda _: demo)
    run_examples("explain.md")
    said = capsys.readouterr().out
    assert re.search(r"Of 4 parts, \d have a description", said)
    assert re.search(r'layers\.2\.mlp_post\[90\] SUPPORTED neuron 2\.90 as rule: fires more on "the"', said), said
    assert "tokens that its rule picks; promotes" in said
