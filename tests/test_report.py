"""The report: whatever a study measured is shown, nothing else gets in, and it needs nothing from outside."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest

from pages import Page, luminance
from summaries import VARIANTS, ioi, tiny
from vesalius import report
from vesalius.errors import InputError, UnknownNameError
from vesalius.report import forest, heatmap, words
from vesalius.report.attention_picture import picture

PARSED = cache(Page)


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {name: report.render(make()) for name, make in VARIANTS.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_page_is_well_formed_and_needs_nothing_from_outside(pages: dict[str, str], name: str) -> None:
    page = PARSED(pages[name])
    assert not page.badly_closed and not page.open
    tags = {tag for tag, _ in page.tags}
    assert "main" in tags and "h1" in tags
    assert not tags & {"script", "link", "img", "iframe", "object", "use", "image"}
    attributes = {key for _, found in page.tags for key in found}
    assert not attributes & {"src", "href", "srcset", "xlink:href"}
    assert not {key for key in attributes if key.startswith("on")}
    assert "http://" not in pages[name] and "https://" not in pages[name] and "url(" not in pages[name]
    assert len(pages[name]) < 700_000


@pytest.mark.parametrize("name", VARIANTS)
def test_drawings_hold_only_finite_numbers_and_words_for_those_who_cannot_see(pages: dict[str, str], name: str) -> None:
    page = PARSED(pages[name])
    for tag, found in page.tags:
        for key in ("x", "y", "width", "height", "cx", "cy", "x1", "x2", "y1", "y2", "d", "viewbox"):
            assert not re.search(r"nan|inf|None", found.get(key) or ""), (tag, found)
        if tag == "svg":
            assert found.get("aria-label") or found.get("aria-hidden") == "true"
    assert all("scope" in found for tag, found in page.tags if tag == "th")
    ids = [found["id"] for _, found in page.tags if "id" in found]
    assert len(ids) == len(set(ids))
    text = page.text
    assert "None" not in text.split() and "nan" not in text.split() and "Undefined" not in text


def test_the_page_is_a_function_of_the_summary() -> None:
    assert report.render(ioi()) == report.render(json.loads(json.dumps(ioi())))


def test_sections_come_in_the_promised_order(pages: dict[str, str]) -> None:
    headings = re.findall(r"<h2>(.*?)</h2>", pages["ioi"])
    assert headings[-10:] == [
        "An example",
        "Can the model do it?",
        "Which parts matter?",
        "The circuit",
        "Where the key heads look",
        "Is the circuit enough?",
        "The main claims, prompt by prompt",
        "Every claim and its verdict",
        "What it cost",
        "How to reproduce",
    ]


def test_every_claim_is_in_the_table_with_verdict_numbers_and_reason(pages: dict[str, str]) -> None:
    summary = ioi()
    table = pages["ioi"].split('<section id="claims">')[1].split("</section>")[0]
    rows = table.split("<tr class=")[1:]
    assert len(rows) == len(summary["claims"]) == 46
    shown = [
        " ".join(Page("<table><tbody><tr class=" + row.split("</tr>")[0] + "</tr></tbody></table>").text.split())
        for row in rows
    ]
    for claim in summary["claims"]:
        row = next(r for r in shown if claim["statement"] in r)
        assert claim["verdict"].lower() in row and f"{claim['n']} ({claim['n_groups']})" in row
        assert words.estimate(claim, claim["unit"]) in row and words.p_value(claim["p_holm"]) in row
        assert words.number(claim["delta"], claim["unit"]) in row and words.reason(claim) in row
        if claim["control"]:
            assert claim["control"] in row
    assert {claim["reason"] for claim in summary["claims"]} >= {
        "absent",
        "opposite",
        "too_small",
        "not_specific",
        "unmeasured",
    }
    assert "About 96 examples would decide." in table and "exploratory" in table


def test_reasons_are_plain_words_and_unknown_ones_are_not_swallowed() -> None:
    claim = ioi()["claims"][0] | {"verdict": "REFUTED", "n_to_decide": None}
    said = {
        name: words.reason(claim | {"reason": name}) for name in ("absent", "opposite", "too_small", "not_specific")
    }
    assert len(set(said.values())) == 4 and not any("_" in text for text in said.values())
    assert words.reason(claim | {"reason": "lost_in_transit"}) == "Lost in transit."
    assert words.reason(claim | {"verdict": "SUPPORTED", "reason": None}) == ""
    undecided = claim | {"verdict": "INCONCLUSIVE", "reason": None, "n_to_decide": 1234}
    assert words.reason(undecided).endswith("About 1,234 examples would decide.")


def test_text_from_outside_is_shown_and_never_becomes_markup(pages: dict[str, str]) -> None:
    page = PARSED(pages["hostile"])
    assert page.count("script") == 0 and page.count("img") == 0
    assert "<script>alert(1)</script>" in page.text and "<script" not in pages["hostile"]
    assert '"> < img src = x onerror'.replace(" ", "") in page.text.replace(" ", "")
    # A token of more than 14 characters is cut, but stays text.
    assert "<script>alert" in picture(VARIANTS["hostile"]()["attention"][0]).queries[3].text


def test_a_stopped_study_says_why_and_shows_the_failed_templates(pages: dict[str, str]) -> None:
    page = PARSED(pages["stopped"])
    assert "The study stopped at the gate." in page.text and "below the .80 that was required" in page.text
    assert page.text.count("✕ failed") == 24 and "No: it prefers the answer in 41 %" in page.text
    assert page.count("svg", "heat") == 0 and "no claim was registered" in page.text


def test_a_study_that_went_on_past_the_gate_says_so(pages: dict[str, str]) -> None:
    summary = ioi()
    summary["gate"]["passed"] = False
    lead = next(piece for piece in PARSED(report.render(summary)).pieces if "past the gate" in piece)
    assert "they stay listed as failed. The study was told to go on past the gate" in lead
    assert not [piece for page in pages.values() for piece in PARSED(page).pieces if re.search(r"[a-z]\.[A-Z]", piece)]


def test_failed_templates_stay_in_the_list(pages: dict[str, str]) -> None:
    rows = [found for found in PARSED(pages["ioi"]).having("tr", "failed")]
    failed = [entry for entry in ioi()["gate"]["templates"] if not entry["passed"]]
    assert len(rows) == len(failed) == 2
    assert "2 of 24 templates are not above 50 %" in PARSED(pages["ioi"]).text


def test_a_control_says_so_loudly_and_what_was_expected(pages: dict[str, str]) -> None:
    page = PARSED(pages["control"])
    assert page.text.index("Control study: the weights are random.") < page.text.index("How does the model decide")
    assert "no claim supported was expected; 0 of 46 were" in page.text
    assert "tested on random weights" in page.text and "0 of 12 are" in page.text
    assert "Control study" not in PARSED(pages["ioi"]).text


def test_a_control_with_false_alarms_names_them() -> None:
    summary = VARIANTS["control"]()
    summary["claims"][0].update(verdict="SUPPORTED", reason=None)
    assert "Each supported claim here is a false alarm" in Page(report.render(summary)).text


@pytest.mark.parametrize(("name", "conditions"), [("ioi", 4), ("one_corruption", 2), ("tiny", 4)])
def test_every_condition_has_its_heatmap_and_switch(pages: dict[str, str], name: str, conditions: int) -> None:
    page = PARSED(pages[name])
    assert page.count("svg", "heat") == conditions
    switches = [found for tag, found in page.tags if tag == "input" and found.get("name") == "condition"]
    assert len(switches) == conditions and sum("checked" in found for found in switches) == 1
    assert f"#condition-{conditions}:checked" in pages[name]


def test_text_colours_have_enough_contrast_in_both_themes(pages: dict[str, str]) -> None:
    light, dark = re.findall(r":root \{(.*?)\}", pages["ioi"], flags=re.S)
    for theme in (light, dark):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", theme))
        paper = luminance(colours["paper"])
        for name in ("ink", "soft", "helps", "against", "supported", "refuted", "inconclusive"):
            first, second = sorted((luminance(colours[name]), paper), reverse=True)
            assert (first + 0.05) / (second + 0.05) >= 4.5, name


def test_what_was_not_measured_is_a_dash_and_no_drawing() -> None:
    summary = ioi()
    claim = next(c for c in summary["claims"] if c["reason"] == "unmeasured")
    drawn = forest.forests([claim])[0]
    assert drawn.point is None and drawn.line is None and words.estimate(claim) == "–"
    summary["gate"]["accuracy"].update(estimate=None, low=None, high=None)
    summary["effects"]["conditions"][0]["mean"][5] = None
    assert "missing" in {c.colour for c in heatmap.heatmaps(summary["effects"], [])[0].cells}
    assert "None" not in Page(report.render(summary)).text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.1234, "", "0.123"), (-6.126, "", "−6.13"), (12345.6, "", "12,346"), (0.83, "share of total", "83 %"),
        (-0.021, "share", "−2.1 %"), (0.0, "share", "0 %"), (0.0, "", "0"), (0.00012, "", "0.00012"), (None, "", "–"),
    ],
)  # fmt: skip
def test_numbers_read_well(value: float | None, unit: str, text: str) -> None:
    assert words.number(value, unit) == text


def test_changed_words_are_marked_and_nothing_else() -> None:
    clean = "After Anna and Paul finished, Paul gave it to"
    found = words.words_changed(clean, clean.replace("Paul gave", "Anna gave"))
    assert "".join(word for word, _ in found) == clean.replace("Paul gave", "Anna gave")
    assert [word for word, changed in found if changed] == ["Anna"]
    assert [word for word, changed in words.words_changed("a b", "a longer b") if changed] == ["longer"]


def test_write_leaves_page_and_summary_side_by_side(tmp_path: Path) -> None:
    summary = tiny()
    path = report.write(summary, tmp_path / "runs" / "a")
    assert path == tmp_path / "runs" / "a" / "report.html" and path.read_text(encoding="utf-8") == report.render(
        summary
    )
    assert json.loads((path.parent / "summary.json").read_text(encoding="utf-8")) == summary
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "summary.json"]


def test_fragments_escape_and_round() -> None:
    shown = report.fragments.table([{"a<b": "<i>x</i>", "n": 12345, "v": 0.12345, "ok": True}], caption="T & U")
    page = Page(shown)
    assert page.count("i") == 0 and "<i>x</i>" in page.text and "a<b" in page.text and "T & U" in page.text
    assert "12,345" in page.text and "0.123" in page.text and "True" in page.text and not page.badly_closed
    assert "✓ supported" in report.fragments.verdict("SUPPORTED")
    assert Page(report.fragments.table([])).count("td") == 0


def test_fragments_refuse_what_they_cannot_show() -> None:
    with pytest.raises(InputError, match=r"row 1 has the keys \['b'\]; the first row has \['a'\]"):
        report.fragments.table([{"a": 1}, {"b": 2}])
    with pytest.raises(UnknownNameError, match="unknown verdict 'PROVEN'; known: INCONCLUSIVE, REFUTED, SUPPORTED"):
        report.fragments.verdict("PROVEN")


def test_public_names_are_explicit() -> None:
    pages = ["quality_answer", "render", "render_quality", "write", "write_quality"]
    assert report.__all__ == sorted(["fragments", "quality_schema", "schema", *pages])
    assert all(hasattr(report, name) for name in report.__all__)
