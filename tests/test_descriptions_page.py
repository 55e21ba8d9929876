"""The Python on the page about descriptions runs, and says what the page says."""

from __future__ import annotations

import re

import pytest

import vesalius as vs
from pages import run_examples


@pytest.mark.slow
@pytest.mark.demo_model
def test_the_page_runs_and_a_rule_goes_from_examples_to_a_verdict(
    demo: vs.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vs, "load", lambda _: demo)
    run_examples("descriptions.md")
    said = capsys.readouterr().out
    assert re.search(
        r"Synthesis\(layers\.2\.mlp_post\[90\]: reaches \S+, which (beats|does not beat) the corpus's", said
    ), said
    assert re.search(r"fires on \d+\.\d% of tokens: \(\(' the'", said)
    assert re.search(r'neuron 2\.90 fires more on "the".*: at least \+\S+ SD -> SUPPORTED', said), said
