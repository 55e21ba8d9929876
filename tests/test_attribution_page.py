"""The Python on the page about explanations of single inputs runs, and says what the page says."""

from __future__ import annotations

import pytest

from pages import run_examples


def test_the_page_runs_and_its_shares_add_up() -> None:
    names = run_examples("attribution.md")
    assert names["found"].relative_gap < 1e-9
    assert names["trials"].deletion.p == pytest.approx(1 / 21)
    assert [one.method for one in names["given"]] == ["shapley", "deep_lift", "lime"]
