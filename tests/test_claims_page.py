"""The Python on the page about claims runs: every kind of part goes from a sweep to a verdict."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import vesalius as vs
from pages import run_examples
from vesalius.quantities import QUANTITIES

PAGE = (Path(__file__).parents[1] / "docs" / "claims.md").read_text()


@pytest.mark.slow
@pytest.mark.demo_model
def test_every_kind_of_part_goes_from_a_sweep_to_a_verdict(
    demo: vs.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vs, "load", lambda _: demo)
    names: dict[str, object] = {}
    names = run_examples("claims.md")
    parts = names["parts"]
    assert isinstance(parts, list)
    kinds = [type(part).__name__ for part in parts]
    assert kinds == ["Unit", "Unit", "Direction", "Latent", "Latent"]
    assert [len(part.writes) for part in parts] == [1, 1, 1, 1, 2]
    outcomes = re.findall(r"-> ([A-Z ]+)\n", capsys.readouterr().out)
    # As the page says: the head stands the test, the rest does too little.
    assert outcomes == ["SUPPORTED", "REFUTED", "REFUTED", "REFUTED", "REFUTED"]
    with vs.Ledger(names["folder"] / "ledger.sqlite", create=False) as ledger:  # type: ignore[operator]
        assert ledger.verify().claims == len(parts)


def test_the_page_lists_every_quantity() -> None:
    assert set(re.findall(r"(?m)^\| `(\w+)` \|", PAGE)) == set(QUANTITIES)
