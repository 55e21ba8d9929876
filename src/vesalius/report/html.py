"""From a summary to one HTML file that needs nothing else: no script, no font, no network.

All pictures are inline SVG drawn by the templates from plain geometry. That keeps a report at some hundred kilobytes
(plotly's script alone is 4.8 MB), prints sharply, and can't fail in a browser; what interaction pays (switching
conditions, filtering claims, values under the pointer) is done with form controls, CSS and SVG titles.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vesalius.jobs import write_atomic
from vesalius.report import words
from vesalius.report.attention_picture import SHORT, picture
from vesalius.report.circuit_drawing import draw, role_colours
from vesalius.report.distributions import against_random, main_claims, spread
from vesalius.report.forest import forest, forests, shared_scale
from vesalius.report.heatmap import heatmaps
from vesalius.report.scales import colour_rules
from vesalius.report.schema import VERDICTS, check

TEMPLATES = Path(__file__).parent / "templates"
HTML_NAME, JSON_NAME = "report.html", "summary.json"
FILTERS = (
    "component",
    "condition",
    "count",
    "duration",
    "estimate",
    "interval",
    "number",
    "p_value",
    "reason",
    "size",
    "tick",
)
EFFECT_UNIT = "share of the total effect"


def render(summary: Mapping[str, Any]) -> str:
    """One self-contained HTML page of a study. The same summary gives the same page, byte for byte.

    Raises as `schema.check` for a summary that does not follow the schema.
    """
    check(summary)
    return environment().get_template("report.html.j2").render(_view(summary))


def write(summary: Mapping[str, Any], folder: str | Path) -> Path:
    """Writes report.html and summary.json into the folder, each atomically; returns the path of the report.

    Nothing is written unless the page could be made. Raises as `render` and `jobs.write_atomic`.
    """
    page = render(summary)
    target = Path(folder)
    write_atomic(target / JSON_NAME, json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return write_atomic(target / HTML_NAME, page)


@cache
def environment() -> Environment:
    """Templates with escaping on, and words for numbers as filters."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({name: getattr(words, name) for name in FILTERS})
    return environment


def _view(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the templates draw: the summary `s`, and geometry made from it."""
    claims = _ordered(summary["claims"])
    return {
        "s": summary,
        "colour_rules": colour_rules(),
        "verdicts": words.VERDICTS,
        "counts": {name: sum(claim["verdict"] == name for claim in claims) for name in VERDICTS},
        "prompts": _prompts(summary["question"]),
        "templates": _numbered(summary["gate"]["templates"]),
        "claims": list(zip(claims, forests(claims), strict=True)),
        "on_control": _on_control(summary["trained_claims_on_control"]),
        **_effects_view(summary),
        **_circuit_view(summary),
        "effect_unit": EFFECT_UNIT if summary["effects"] is None else summary["effects"]["unit"],
        "pictures": [picture(head) for head in summary["attention"]],
        "short_pictures": all(len(head["tokens"]) <= SHORT for head in summary["attention"]),
        "random_best": _random_best(summary["circuit"]),
        "spreads": _spreads(summary),
    }


def _ordered(claims: Any) -> list[Mapping[str, Any]]:
    return sorted(claims, key=lambda claim: VERDICTS.index(claim["verdict"]))


def _on_control(claims: Any) -> list[tuple[Mapping[str, Any], Any]]:
    ordered = _ordered(claims or ())
    return list(zip(ordered, forests(ordered), strict=True))


def _prompts(question: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, bool]]]]:
    prompts = question["prompts"]
    return [
        (name, words.words_changed(prompts["clean"], prompts[name])) for name in ("clean", *question["corruptions"])
    ]


def _numbered(templates: Any) -> list[tuple[str, Mapping[str, Any]]]:
    return [(f"T{number}", entry) for number, entry in enumerate(templates, start=1)]


def _effects_view(summary: Mapping[str, Any]) -> dict[str, Any]:
    effects = summary["effects"]
    if effects is None or not effects["components"]:
        return {"maps": [], "ranked": []}
    circuit = summary["circuit"]
    members = [] if circuit is None else [member["component"] for member in circuit["members"]]
    maps = heatmaps(effects, members)
    # The embedding carries nearly everything; on its scale the others would shrink to points.
    near = [row.effect for found in maps for row in found.ranking if abs(row.effect["estimate"]) <= 2 * found.limit]
    scale = shared_scale(near)
    ranked = [[(row, forest(row.effect, scale)) for row in found.ranking] for found in maps]
    roles = {} if circuit is None else {member["component"]: member["role"] for member in circuit["members"]}
    return {"maps": maps, "ranked": ranked, "roles": roles}


def _circuit_view(summary: Mapping[str, Any]) -> dict[str, Any]:
    circuit = summary["circuit"]
    if circuit is None or not circuit["members"]:
        return {"drawing": None, "members": [], "against": []}
    by_id = {claim["id"]: claim for claim in summary["claims"]}
    members = sorted(circuit["members"], key=lambda member: -abs(member["effect"]["estimate"] or 0.0))
    scale = shared_scale([member["effect"] for member in members])
    rows = [(m, forest(m["effect"], scale), [by_id[name] for name in m["claims"]]) for m in members]
    return {
        "drawing": draw(circuit, EFFECT_UNIT if summary["effects"] is None else summary["effects"]["unit"]),
        "members": rows,
        "role_colours": role_colours(members),
        "against": against_random(circuit),
    }


def _random_best(circuit: Mapping[str, Any] | None) -> float | None:
    """The largest median of random sets over the ablations: the fairest single number to read the circuit against."""
    drawn = [entry["random"] for entry in circuit["faithfulness"] if entry["random"]] if circuit else []
    return max((found["median"] for found in drawn if found["median"] is not None), default=None)


def _spreads(summary: Mapping[str, Any]) -> list[Any]:
    numbers = {entry["template"]: i for i, entry in enumerate(summary["gate"]["templates"], start=1)}
    return [spread(claim, numbers) for claim in main_claims(summary["claims"])]
