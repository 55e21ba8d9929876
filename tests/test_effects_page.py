"""The Python on the page about what parts do runs, and says what the page says."""

from __future__ import annotations

import re

import pytest

import vesalius as vs
from pages import run_examples


@pytest.mark.slow
@pytest.mark.demo_model
def test_the_page_runs_and_its_figures_are_what_comes_out(
    demo: vs.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vs, "load", lambda _: demo)
    names = run_examples("effects.md")
    said = capsys.readouterr().out
    assert re.search(r"at layers\.29\.resid_post: (0|\d\S*e-\d+) ", said), said
    kl = names["tuned"].metadata["kl_of_unseen_rows"]["layers.20.resid_post"]
    assert kl["tuned_lens"] < kl["logit_lens"]
    assert 0.3 < names["split"].blind_spot < 0.9
    assert abs(float(names["split"].measurement("layers.20.mlp_out", "direct").estimate)) < 0.2
    assert names["steered"].effects.mean() > 0.0
    assert names["steered"].p_value(names["scale"]) <= 0.1
    assert names["scope"].precision()[1] > names["scope"].precision()[0]
    assert "City in Western Europe" in said
    assert names["faith"].values("early answering").tolist() == pytest.approx([1 - 1 / 6] * 2)
