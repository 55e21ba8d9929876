"""From the summary of a search for a circuit of edges to one HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vesalius import __version__
from vesalius.jobs import write_atomic
from vesalius.report.circuit_drawing import draw
from vesalius.report.html import JSON_NAME, environment, page_script, script_hash
from vesalius.report.scales import colour_rules

PAGE_NAME, UNIT = "circuit.html", "share of the total effect"
SCRIPTS = ("select.js", "circuit.js")
EDGE_WORDS = "changes the metric when it is cut; the thicker, the larger the share of the effect of cutting everything"
EFFECT_WORDS = "the effect of the strongest edge that it writes"


def render_edges(summary: Mapping[str, Any]) -> str:
    """One self-contained HTML page. The same summary gives the same page."""
    circuit, script = summary["circuit"], page_script(SCRIPTS)
    numbers = {member["component"]: number for number, member in enumerate(circuit["members"], 1)}
    drawing = draw(circuit, numbers, UNIT) if numbers else None
    return environment().get_template("edges.html.j2").render(
        s=summary, drawing=drawing, effect_unit=UNIT, edge_words=EDGE_WORDS, effect_words=EFFECT_WORDS,
        colour_rules=colour_rules(), script=script, script_hash=script_hash(script), version=__version__,
    )  # fmt: skip


def write_edges(summary: Mapping[str, Any], folder: str | Path) -> Path:
    """Writes circuit.html and summary.json into the folder, each atomically; returns the path of the page."""
    page, target = render_edges(summary), Path(folder)
    write_atomic(target / JSON_NAME, json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return write_atomic(target / PAGE_NAME, page)
