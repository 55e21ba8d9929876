"""The report: whatever a study measured is shown, nothing else gets in, and it needs nothing from outside."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from pages import Page, contrast
from summaries import VARIANTS, ioi, tiny
from summary_parts import Summary
from vesalius import report
from vesalius.errors import InputError, UnknownNameError
from vesalius.report import forest, heatmap, scales, words
from vesalius.report.attention_picture import picture
from vesalius.report.claim_schema import VERDICTS

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
    assert not tags & {"link", "img", "iframe", "object", "use", "image"}
    attributes = {key for _, found in page.tags for key in found}
    assert not attributes & {"src", "srcset", "xlink:href"}
    assert not {key for key in attributes if key.startswith("on")}
    assert "http://" not in pages[name] and "https://" not in pages[name] and "url(" not in pages[name]
    assert len(pages[name].encode()) < 700_000


@pytest.mark.parametrize("name", VARIANTS)
def test_every_link_leads_to_a_place_on_the_page(pages: dict[str, str], name: str) -> None:
    page = PARSED(pages[name])
    ids = {found["id"] for _, found in page.tags if "id" in found}
    links = [found["href"] or "" for _, found in page.tags if "href" in found]
    assert len(links) > 3 and {link[0] for link in links} == {"#"} and {link[1:] for link in links} <= ids


@pytest.mark.parametrize("name", VARIANTS)
def test_only_the_pages_own_script_may_run(pages: dict[str, str], name: str) -> None:
    page = PARSED(pages[name])
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [found["content"] or "" for _, found in page.tags if found.get("http-equiv")]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["script-src"] == f"'sha256-{digest}'"
    assert rules["style-src"] == "'unsafe-inline'" and not set(rules) & {"connect-src", "img-src", "font-src"}
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|eval|Function|import|localStorage|open)\(", script)


@pytest.mark.parametrize("name", VARIANTS)
def test_drawings_hold_only_finite_numbers_and_words_for_those_who_cannot_see(pages: dict[str, str], name: str) -> None:
    page = PARSED(pages[name])
    for tag, found in page.tags:
        for key in ("x", "y", "width", "height", "cx", "cy", "x1", "x2", "y1", "y2", "d", "viewbox"):
            assert not re.search(r"nan|inf|None", found.get(key) or ""), (tag, found)
        if tag in ("svg", "nav", "aside"):
            assert found.get("aria-label") or found.get("role") == "note" or found.get("aria-hidden") == "true"
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
        "Does the model do the task?",
        "Which parts have an effect?",
        "The circuit",
        "Where the key heads look",
        "Is the circuit enough?",
        "Every claim and its verdict",
        "The claims, prompt by prompt",
        "What it cost",
        "How to reproduce",
    ]


def test_every_claim_is_in_the_table_with_verdict_numbers_and_reason(pages: dict[str, str]) -> None:
    summary = ioi()
    table = pages["ioi"].split('<section id="claims">')[1].split("</section>")[0]
    rows = table.split('<tr id="claim-')[1:]
    assert len(rows) == len(summary["claims"]) == 46
    shown = [
        " ".join(Page('<table><tbody><tr id="' + row.split("</tr>")[0] + "</tr></tbody></table>").text.split())
        for row in rows
    ]
    for claim in summary["claims"]:
        row = next(r for r in shown if claim["statement"] in r)
        assert (
            claim["verdict"].lower() in row
            and claim["measured"] in row
            and f"{claim['n']} ({claim['n_groups']})" in row
        )
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
    assert "Inconclusive: about 96 prompts would decide." in table and "exploratory" in table
    assert {claim["verdict"] for claim in summary["claims"]} == set(VERDICTS)


def test_reasons_are_plain_words_and_unknown_ones_are_not_swallowed() -> None:
    claim = ioi()["claims"][0] | {"verdict": "REFUTED", "n_to_decide": None}
    said = {
        name: words.reason(claim | {"reason": name}) for name in ("absent", "opposite", "too_small", "not_specific")
    }
    assert len(set(said.values())) == 4 and not any("_" in text for text in said.values())
    assert words.reason(claim | {"reason": "lost_in_transit"}) == "Lost in transit."
    assert words.reason(claim | {"verdict": "SUPPORTED", "reason": None}) == ""
    undecided = claim | {"verdict": "INCONCLUSIVE", "reason": None, "n_to_decide": 1234}
    assert words.reason(undecided) == "Inconclusive: about 1,234 prompts would decide."
    for verdict in ("REFUTED", "NOT SPECIFIC", "INCONCLUSIVE"):
        assert words.reason(claim | {"verdict": verdict, "reason": None, "n_to_decide": None})
    everything = " ".join(words.reason(claim | {"reason": name}) for name in (*said, "unmeasured", "n_too_small"))
    assert "data allow both" not in everything


def test_text_from_outside_is_shown_and_never_becomes_markup(pages: dict[str, str]) -> None:
    page = PARSED(pages["hostile"])
    assert page.count("script") == 1 and page.count("img") == 0
    assert "<script>alert(1)</script>" in page.text and pages["hostile"].count("<script") == 1
    assert '"> < img src = x onerror'.replace(" ", "") in page.text.replace(" ", "")
    # A token of more than 14 characters is cut, but stays text.
    head = VARIANTS["hostile"]()["attention"][0]
    assert "<script>alert" in picture(head, head["prompts"][0]).queries[3].text


def test_a_stopped_study_says_why_and_shows_the_failed_templates(pages: dict[str, str]) -> None:
    page = PARSED(pages["stopped"])
    assert "The study stopped at the gate." in page.text and "below the .80 that was required" in page.text
    assert page.text.count("✕ failed") == 12 and "No: it prefers the answer in 41 %" in page.text
    assert page.text.count("not judged") == 12 and "No prompt pair was used (32 were made for discovery" in page.text
    assert page.count("table", "heat") == 0 and "no claim was registered" in page.text


def test_a_study_that_went_on_past_the_gate_says_so(pages: dict[str, str]) -> None:
    summary = ioi()
    summary["gate"]["passed"] = False
    lead = next(piece for piece in PARSED(report.render(summary)).pieces if "past the gate" in piece)
    assert "it is listed as failed and left out. The study was told to go on past the gate" in lead
    assert not [piece for page in pages.values() for piece in PARSED(page).pieces if re.search(r"[a-z]\.[A-Z]", piece)]


def test_failed_templates_stay_in_the_list(pages: dict[str, str]) -> None:
    rows = [found for found in PARSED(pages["ioi"]).having("tr", "failed")]
    failed = [entry for entry in ioi()["gate"]["templates"] if entry["passed"] is False]
    assert len(rows) == len(failed) == 1
    assert "1 of 24 templates is not above 50 %" in PARSED(pages["ioi"]).text
    inside = pages["ioi"].split('<details class="templates-left-out">')[1].split("</details>")[0]
    assert inside.count('<tr class="failed"') == 1 and "✕ failed" in inside


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
    assert page.count("table", "heat") == conditions
    switches = [found for tag, found in page.tags if tag == "input" and found.get("name") == "condition"]
    assert len(switches) == conditions and sum("checked" in found for found in switches) == 1
    assert f"#condition-{conditions}:checked" in pages[name]


TEXT = ("ink", "soft", "helps", "against", "supported", "refuted", "not-specific", "inconclusive")


@pytest.mark.parametrize("theme", [0, 1])
def test_text_has_enough_contrast_in_both_themes(pages: dict[str, str], theme: int) -> None:
    css = pages["ioi"].split("<style>")[1].split("</style>")[0]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", re.findall(r":root \{(.*?)\}", css, flags=re.S)[theme]))
    for name in TEXT:
        for behind in ("paper", "wash"):
            assert contrast(colours[name], colours[behind]) >= 4.5, (name, behind)
    assert contrast(colours["ink"], colours["mark"]) >= 4.5
    # A supported claim's chip is written in the colour of the paper.
    assert contrast(colours["paper"], colours["supported"]) >= 4.5
    ramp = re.findall(r"^\.(\w+)\{fill:(#\w+);background:(#\w+);color:(#\w+)\}", scales.colour_rules(), flags=re.M)
    assert len(ramp) == 2 * (1 + 3 * 9)
    assert all(contrast(background, text) >= 4.5 for _, _, background, text in ramp)


def test_no_text_has_a_colour_of_which_the_contrast_is_not_checked(pages: dict[str, str]) -> None:
    css = pages["ioi"].split("<style>")[1].split("</style>")[0]
    used = set(re.findall(r"(?<![\w-])color: ([^;}]+)", css)) - {
        "inherit",
        "transparent",
        "var(--verdict)",
        "var(--paper)",
    }
    # Arrows and lines of the drawing take their colour from the group that they stand in.
    graphics = {"var(--edge)"}
    assert used - graphics <= {f"var(--{name})" for name in TEXT}
    of_verdicts = set(re.findall(r"--verdict: var\(--([\w-]+)\)", css))
    assert of_verdicts == {"supported", "refuted", "not-specific", "inconclusive"}
    texts = re.findall(r"\.(tick|tok|lane-name|terminal-name|strong|axis text)[^{]*\{[^}]*fill: ([^;}]+)", css)
    assert {fill for _, fill in texts} <= {f"var(--{name})" for name in TEXT}


def test_a_screen_reader_gets_every_cell_of_the_heatmap_with_its_row_and_column(pages: dict[str, str]) -> None:
    effects = ioi()["effects"]
    table = pages["ioi"].split('<table class="heat')[1].split("</table>")[0]
    page = Page(f'<table class="heat{table}</table>')
    assert [found.get("scope") for _, found in page.tags if found.get("scope")] == ["col"] * 32 + ["row"] * 10
    cells = [found["title"] or "" for tag, found in page.tags if tag == "td" and "title" in found]
    assert len(cells) == len(effects["components"]) == 301
    said = dict(cell.split(": ", 1) for cell in cells)
    for name, mean in zip(effects["components"], effects["conditions"][0]["mean"], strict=True):
        assert said[words.component(name)].startswith(words.number(mean, effects["unit"]))


def test_a_node_leads_to_its_row_and_the_row_to_its_claims_and_back(pages: dict[str, str]) -> None:
    page, summary = pages["ioi"], ioi()
    for number, member in enumerate(
        sorted(summary["circuit"]["members"], key=lambda m: -abs(m["effect"]["estimate"])), start=1
    ):
        assert f'<a id="node-{number}"' in page and f'href="#part-{number}"' in page
        row = page.split(f'<tr id="part-{number}"')[1].split("</tr>")[0]
        assert words.component(member["component"]) in row and f'href="#node-{number}"' in row
        claims = re.findall(r'href="#claim-(\d+)"', row)
        assert len(claims) == len(member["claims"]) == 2
        for claim in claims:
            back = page.split(f'<tr id="claim-{claim}"')[1].split("</tr>")[0]
            assert f'href="#part-{number}"' in back


def test_every_measured_claim_leads_to_its_prompts_and_back(pages: dict[str, str]) -> None:
    page = PARSED(pages["ioi"])
    panels = [found["id"] or "" for tag, found in page.tags if tag == "figure" and "id" in found]
    measured = [claim for claim in ioi()["claims"] if claim["estimate"] is not None]
    assert len(panels) == len(set(panels)) == len(measured) < len(ioi()["claims"])
    links = [found.get("href") for _, found in page.tags]
    for panel in panels:
        assert f"#{panel}" in links and f"#{panel.replace('prompts', 'claim')}" in links


def test_the_tile_and_the_tables_count_what_is_not_specific_apart(pages: dict[str, str]) -> None:
    count = sum(claim["verdict"] == "NOT SPECIFIC" for claim in ioi()["claims"])
    page = PARSED(pages["ioi"])
    assert count > 1 and page.count("tr", "not-specific") == page.count("span", "not-specific") - _panels(page) == count
    assert f"{count} not specific" in next(a["aria-label"] or "" for _, a in page.tags if a.get("class") == "stack")


def _panels(page: Page) -> int:
    """Chips over the panels of claims that are not specific: each is measured, so each has one."""
    return sum(claim["verdict"] == "NOT SPECIFIC" for claim in ioi()["claims"])


def test_counts_are_those_of_prompts_that_were_used(pages: dict[str, str]) -> None:
    text = PARSED(pages["ioi"]).text
    assert "29 prompt pairs were used to find the circuit (discovery, of 32 made) and 32 fresh ones" in text
    assert (
        "on the 29 discovery prompts that were used" in text and "on the 32 validation prompts that were used" in text
    )


def test_failed_templates_and_parts_without_a_role_are_folded(pages: dict[str, str]) -> None:
    folded = re.findall(r"<details class=\"no-role\">.*?</details>", pages["ioi"], flags=re.S)
    nameless = [member for member in ioi()["circuit"]["members"] if member["role"] == words.NO_ROLE]
    assert len(folded) == 1 and folded[0].count("<tr id=") == len(nameless) == 3
    assert " open" not in re.findall(r"<details[^>]*>", pages["ioi"])


def test_an_estimate_on_discovery_is_never_shown_without_its_label(pages: dict[str, str]) -> None:
    text = PARSED(pages["ioi"]).text
    claims = [claim for claim in ioi()["claims"] if claim["discovery"] is not None]
    assert text.count("on discovery: ") == len(claims)
    for claim in claims:
        assert f"on discovery: {words.number(claim['discovery'], claim['unit'])}" in text


def test_an_uncertain_part_is_said_to_be_so_and_drawn_so(pages: dict[str, str]) -> None:
    page = PARSED(pages["ioi"])
    uncertain = [member for member in ioi()["circuit"]["members"] if member["uncertain"]]
    drawn = page.having("a", "unsure")
    assert len(drawn) == len(uncertain) > 0 and all("may be zero" in (found["aria-label"] or "") for found in drawn)
    assert page.text.count("may be zero") - len(drawn) == len(uncertain)


def test_latents_neurons_and_directions_are_parts_like_any_other() -> None:
    names = ["layers.1.mlp_out latent 513", "layers.0.mlp_post[7]", "'plural' at layers.1.resid_post"]
    summary = tiny()
    old = [member["component"] for member in summary["circuit"]["members"]]
    text = json.dumps(summary)
    for before, after in zip(old, names, strict=True):
        text = text.replace(json.dumps(before), json.dumps(after))
    changed = json.loads(text)
    for member, kind in zip(changed["circuit"]["members"], ("latent", "neuron", "direction"), strict=True):
        member.update(kind=kind, layer=None if kind == "direction" else member["layer"], head=None)
    page = Page(report.render(changed))
    shown = [found["aria-label"] or "" for found in page.having("a", "node")]
    assert sorted(label.split(":")[0] for label in shown) == sorted(map(words.component, names))
    assert "neuron 0.7" in page.text and "'plural' at layers.1.resid_post" in page.text
    assert page.count("table", "heat") == 4 and "1 latent" in page.text


def test_what_was_not_measured_is_a_dash_and_no_drawing() -> None:
    summary = ioi()
    claim = next(c for c in summary["claims"] if c["reason"] == "unmeasured")
    drawn = forest.forests([claim])[0]
    assert drawn.point is None and drawn.line is None and words.estimate(claim) == "–"
    summary["gate"]["preference"].update(estimate=None, low=None, high=None)
    summary["effects"]["conditions"][0]["mean"][5] = None
    lines = heatmap.heatmaps(summary["effects"], [])[0].lines
    assert "missing" in {cell.colour for line in lines for cell in line.cells if cell is not None}
    assert "None" not in Page(report.render(summary)).text


def _only_the_embedding(summary: Summary) -> None:
    member = summary["circuit"]["members"][0] | {"component": "embed", "kind": "embed", "layer": None, "role": "input"}
    summary["circuit"].update(members=[member], edges=[{"source": "embed", "target": "logits", "weight": 1.0}])


def _no_effect_known(summary: Summary) -> None:
    for member in summary["circuit"]["members"]:
        member["effect"] = {"estimate": None, "low": None, "high": None}
    for condition in summary["effects"]["conditions"]:
        condition["mean"] = [None] * len(condition["mean"])


def _sparse(summary: Summary) -> None:
    summary["circuit"].update(edges=[], faithfulness=[], completeness=[])
    for head in summary["attention"]:
        head["prompts"] = []
    for claim in summary["claims"]:
        claim.update(values=[], control_values=None, templates=[])


@pytest.mark.parametrize("change", [_only_the_embedding, _no_effect_known, _sparse])
def test_what_is_all_but_empty_still_has_a_page(change: Callable[[Summary], None]) -> None:
    summary = tiny()
    change(summary)
    page = Page(report.render(summary))
    assert not page.badly_closed and not page.open
    assert not [found for _, found in page.tags if re.search(r"nan|inf|None", found.get("d") or "")]
    ids = {found["id"] for _, found in page.tags if "id" in found}
    assert {(found["href"] or "")[1:] for _, found in page.tags if "href" in found} <= ids


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.1234, "", "0.123"), (-6.126, "", "−6.13"), (12345.6, "", "12,346"), (0.83, "share of total", "83 %"),
        (-0.021, "share", "−2.1 %"), (0.0, "share", "0 %"), (-0.0002, "share", "0 %"), (0.0, "", "0"),
        (0.00012, "", "0.00012"), (None, "", "–"),
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
    assert "≈ not specific" in report.fragments.verdict("NOT SPECIFIC")
    assert Page(report.fragments.table([])).count("td") == 0


def test_fragments_refuse_what_they_cannot_show() -> None:
    with pytest.raises(InputError, match=r"row 1 has the keys \['b'\]; the first row has \['a'\]"):
        report.fragments.table([{"a": 1}, {"b": 2}])
    with pytest.raises(
        UnknownNameError, match="unknown verdict 'PROVEN'; known: INCONCLUSIVE, NOT SPECIFIC, REFUTED, SUPPORTED"
    ):
        report.fragments.verdict("PROVEN")


def test_public_names_are_explicit() -> None:
    pages = ["quality_answer", "render", "render_quality", "write", "write_quality"]
    pages += ["render_steering", "steering_answer", "write_steering", "link_explained", "page_names", "write_explained"]
    drawn = ["by_design", "edges", "heads", "probed", "shortcut"]
    pages += [f"{verb}_{name}" for verb in ("render", "write") for name in drawn]
    pages += ["summarise_channel", "summarise_input", "write_channel", "write_curves", "write_input"]
    known = ["explain_schema", "fragments", "quality_schema", "schema", "study_schemas"]
    assert report.__all__ == sorted([*known, *pages])
    assert all(hasattr(report, name) for name in report.__all__)
