"""The Python on the page about images runs, and says what the page says."""

from __future__ import annotations

from pages import run_examples


def test_the_page_runs() -> None:
    names = run_examples("images.md")
    assert len(names["shown"].of("top")) == 8
    assert names["effects"].error < 1e-5
    assert names["evidence"] or not names["claims"]
