"""From a summary to one HTML file that needs nothing else: no font, no library, no network.

All pictures are inline SVG, or tables, drawn by the templates from plain geometry: that keeps a page at some hundred
kilobytes (plotly's script alone is 4.8 MB), prints sharply, and reads without a script. The page's own script adds
what a pointer and a keyboard can do: sorting, filtering, the edges' threshold, paths through a part. The page's
content security policy names that script by its hash and allows nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vesalius.jobs import write_atomic
from vesalius.report import words
from vesalius.report.scales import colour_rules
from vesalius.report.schema import check
from vesalius.report.view import view

TEMPLATES = Path(__file__).parent / "templates"
HTML_NAME, JSON_NAME = "report.html", "summary.json"
SCRIPTS = ("select.js", "page.js", "tables.js", "heatmap.js", "circuit.js", "attention.js")
FILTERS = (
    "component",
    "condition",
    "count",
    "css",
    "duration",
    "estimate",
    "interval",
    "number",
    "p_value",
    "rank",
    "reason",
    "size",
    "tick",
    "token",
)


def render(summary: Mapping[str, Any]) -> str:
    """One self-contained HTML page of a study. The same summary gives the same page, byte for byte.

    Raises as `schema.check` for a summary that does not follow the schema.
    """
    # First of all, so that a wrong summary is refused by the path of what is wrong and not by a template's error.
    check(summary)
    script = page_script()
    more = {"colour_rules": colour_rules(), "script": script, "script_hash": script_hash(script)}
    return environment().get_template("report.html.j2").render(view(summary), **more)


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


@cache
def page_script(names: tuple[str, ...] = SCRIPTS) -> str:
    """A page's script: one file for each thing that it does, in one scope of its own."""
    parts = "".join((TEMPLATES / name).read_text("utf-8") for name in names)
    return f'"use strict";(() => {{\n{parts}}})();'


def script_hash(script: str) -> str:
    """What a content security policy calls a script by."""
    # A browser compares the policy's hash with that of the text between the tags, exactly as it stands there.
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
