"""The Python on the page about concepts runs, and says what the page says."""

from __future__ import annotations

import pytest

import vesalius as vs
from pages import run_examples


@pytest.mark.slow
@pytest.mark.demo_model
def test_the_page_runs_and_its_figures_are_what_comes_out(
    demo: vs.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vs, "load", lambda _: demo)
    names = run_examples("concepts.md")
    said = capsys.readouterr().out
    assert "['present, not used']" in said
    linear = next(leak for leak in vs.concepts.leaks(names["eraser"][names["site"]], names["rows"], names["site"]))
    counts = names["concept"].balance()["discovery"]
    majority = max(counts["true"], counts["false"]) / (counts["true"] + counts["false"])
    assert linear.fitted_before > 0.95 and linear.fitted_after <= majority + 1e-9
    assert {"majority", "bag_of_words", "shuffled"} <= set(names["probes"].best.report.controls)
