"""The page of a dictionary's quality: by its schema, self-contained, the same figures as the JSON, nothing hidden."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pages import Page
from planted_features import draw
from test_quality import made
from vesalius import report
from vesalius.dictionaries import Quality, quality
from vesalius.dictionaries.evaluation import WORDS
from vesalius.errors import InputError, NotFiniteError, UnknownNameError
from vesalius.report.histograms import BASE, TOP, cosines, densities
from vesalius.report.quality_page import LABELS, NAMES

LOSSES = {
    "ce_clean": 3.0, "ce": 3.5, "ce_increase": 0.5, "ce_increase_mean": 5.0, "ce_increase_zero": 12.0, "kl": 0.6,
    "kl_mean": 5.1, "kl_zero": 12.2, "loss_recovered": 0.958, "loss_recovered_mean": 0.9, "kl_recovered": 0.95,
    "kl_recovered_mean": 0.88,
}  # fmt: skip


@pytest.fixture(scope="module")
def found() -> Quality:
    return quality(made(8, 30), torch.randn(400, 8, generator=draw(0)), others=[made(8, 30, seed=9)])


@pytest.fixture
def plain(found: Quality) -> dict[str, Any]:
    """As JSON, with losses in a model put in."""
    stored: dict[str, Any] = json.loads(json.dumps(found.to_json()))
    losses = {name: {"value": value, "low": value - 0.05, "high": value + 0.05} for name, value in LOSSES.items()}
    for entry in (stored, *stored["baselines"]):
        entry["figures"] |= losses
    stored["model"] = {"name": "<tiny> & Co", "hash": "0" * 64, "note": "quantised"}
    return stored


def test_what_quality_gives_follows_the_schema(found: Quality, plain: dict[str, Any]) -> None:
    report.quality_schema.check(found.to_json())
    report.quality_schema.check(plain)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda q: q.pop("data"), InputError, "quality lacks the key"),
        (lambda q: q["figures"]["fvu"].update(value=float("nan")), NotFiniteError, r"quality\.figures\.fvu\.value"),
        (lambda q: q["data"].update(colour="red"), UnknownNameError, "key in quality.data 'colour'"),
        (lambda q: q["density"]["counts"].pop(), InputError, r"quality\.density\.counts has 39 bins for 41 edges"),
        (lambda q: q["seeds"][0]["shared"]["histogram"]["null"].pop(), InputError, r"seeds\[0\]\.shared\.histogram"),
    ],
)  # fmt: skip
def test_what_does_not_follow_it_is_refused(
    plain: dict[str, Any], change: Callable[[dict[str, Any]], object], error: type[Exception], words: str
) -> None:
    change(plain)
    with pytest.raises(error, match=words):
        report.render_quality(plain, WORDS)


def test_the_page_about_the_schema_is_generated_from_it() -> None:
    page = Path(__file__).parent.parent / "docs" / "quality-schema.md"
    assert page.read_text("utf-8") == report.quality_schema.markdown()


def test_without_a_share_the_page_gives_the_differences(plain: dict[str, Any]) -> None:
    for entry in (plain, *plain["baselines"]):
        del entry["figures"]["loss_recovered_mean"]
        entry["figures"]["ce_increase_mean"] = {"value": 0.4, "low": -0.1, "high": 0.9}
    page = report.render_quality(plain, WORDS)
    assert "Loss recovered" not in page
    assert "Mean ablation adds</h2>" in page
    assert "that may be nothing, so no share of it is given" in page
    assert "0.100 nats</td>" in page.replace("−", "-").replace("-0.1", "0.1")
    assert "no share of that harm is given" in page


def test_the_page_is_whole_and_needs_nothing_else(plain: dict[str, Any]) -> None:
    text = report.render_quality(plain, WORDS, "vesalius quality a b")
    page = Page(text)
    assert page.badly_closed == [] and page.open == []
    assert page.count("script") == page.count("link") == page.count("img") == 0
    assert "http://" not in text.replace("http-equiv", "") and "https://" not in text
    assert "<tiny>" not in text and "<tiny> & Co" in page.text
    assert report.render_quality(plain, WORDS, "vesalius quality a b") == text
    assert "vesalius quality a b" in page.text


def test_every_figure_stands_on_the_page_with_its_definition(plain: dict[str, Any]) -> None:
    page = Page(report.render_quality(plain, WORDS)).text
    assert set(LABELS) == set(WORDS)
    for name in plain["figures"]:
        assert LABELS[name] in page
        assert " ".join(WORDS[name].split()) in page
    assert "It flatters" in page
    for baseline in plain["baselines"]:
        assert NAMES[baseline["name"]] in page and baseline["words"] in page


def test_the_answer_says_what_the_figures_say(plain: dict[str, Any]) -> None:
    plain["figures"]["fvu"]["value"], plain["figures"]["l0"]["value"] = 0.25, 12.34
    first, second, third = report.quality_answer(plain)
    assert first == "75 % of the variance of module:tensor0|out is reconstructed, with 12.3 of 30 latents per row."
    assert second.startswith("With as many numbers per row: principal components ")
    assert third == "In the model it adds 0.500 nats to a cross-entropy of 3.00; the mean in its place adds 5.00."


def test_rows_that_were_trained_on_make_a_banner(plain: dict[str, Any]) -> None:
    fresh = {**plain, "data": {**plain["data"], "seen": False}}
    seen = {**plain, "data": {**plain["data"], "seen": True}}
    assert "Measured on rows that it was trained on" not in Page(report.render_quality(fresh, WORDS)).text
    assert "Measured on rows that it was trained on" in Page(report.render_quality(seen, WORDS)).text
    assert "Nothing tells whether" in Page(report.render_quality(plain, WORDS)).text


def test_without_model_geometry_baselines_and_seeds_there_is_still_a_page(plain: dict[str, Any]) -> None:
    bare = copy.deepcopy(plain)
    bare |= {"model": None, "geometry": None, "baselines": [], "seeds": []}
    bare["figures"] = {
        name: bare["figures"][name] for name in ("fvu", "l0", "dead", "dense_1pct", "dense_10pct", "cosine")
    }
    page = Page(report.render_quality(bare, WORDS))
    assert page.badly_closed == []
    assert "What does the model lose" not in page.text


def test_page_and_figures_are_written_together_or_not_at_all(plain: dict[str, Any], tmp_path: Path) -> None:
    where = report.write_quality(plain, WORDS, tmp_path / "out")
    assert sorted(path.name for path in where.parent.iterdir()) == ["quality.html", "quality.json"]
    assert json.loads((where.parent / "quality.json").read_text()) == plain
    plain.pop("figures")
    with pytest.raises(InputError):
        report.write_quality(plain, WORDS, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_bars_are_as_high_as_their_counts() -> None:
    drawn = densities({"edges": [-2.0, -1.5, -1.0, -0.5, 0.0], "counts": [0, 2, 4, 1]})
    assert [bar.height for bar in drawn.bars] == pytest.approx([(BASE - TOP) * n / 4 for n in (2, 4, 1)], abs=0.1)
    assert drawn.bars[0].title == "2 latents active in 3.16 % to 10 % of rows"
    assert [label for _, label in drawn.ticks] == ["1 %", "10 %", "100 %"]


def test_empty_ends_are_left_out_and_what_chance_gives_is_an_outline() -> None:
    found = {"edges": [0.0, 0.25, 0.5, 0.75, 1.0], "nearest": [0, 3, 0, 0], "null": [0, 0, 5, 0]}
    drawn = cosines(found, "nearest")
    assert len(drawn.bars) == 1
    assert drawn.bars[0].x == pytest.approx(drawn.start)
    assert drawn.outline.startswith(f"M{drawn.start} {BASE}") and drawn.outline.endswith("z")
