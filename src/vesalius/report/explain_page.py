"""From the summary of an explanation to its pages: an index with search and sorting, and one page for each part."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from vesalius.jobs import write_atomic
from vesalius.report import explain_schema
from vesalius.report.claim_schema import VERDICTS
from vesalius.report.html import TEMPLATES, environment, script_hash

INDEX, JSON_NAME, PAGES = "index.html", "summary.json", "parts"
_PRELUDE = (
    "const $ = (selector, root = document) => root.querySelector(selector);\n"
    "const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];\n"
    "const reveal = () => {};\n"
    'document.documentElement.classList.add("js");\n'
)


def page_names(parts: Sequence[str]) -> list[str]:
    """Of each part, its page relative to the index; no two alike."""
    found: list[str] = []
    taken: set[str] = set()
    for part in parts:
        plain = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in part).strip("_")[:120]
        name, number = plain, 1
        while name.lower() in taken:
            number += 1
            name = f"{plain}-{number}"
        taken.add(name.lower())
        found.append(f"{PAGES}/{name}.html")
    return found


def render_index(summary: Mapping[str, Any]) -> str:
    """The index: one self-contained HTML page. Raises as `explain_schema.check`."""
    explain_schema.check(summary)
    script = index_script()
    return (
        environment()
        .get_template("explain.html.j2")
        .render(s=summary, rows=summary["parts"], verdicts=VERDICTS, script=script, script_hash=script_hash(script))
    )


def render_part(summary: Mapping[str, Any], row: Mapping[str, Any], card: str) -> str:
    """The page of one part. card: what it looks like in a notebook (`Explained._repr_html_()`)."""
    return environment().get_template("explained.html.j2").render(s=summary, row=row, card=card)


def write_explained(summary: Mapping[str, Any], cards: Iterable[str], folder: str | Path) -> Path:
    """Writes summary.json, one page for each part and the index, each atomically; returns the path of the index.

    cards: HTML of each part, in the order of the summary. Nothing is written unless the index could be made.
    """
    index, target = render_index(summary), Path(folder)
    for row, card in zip(summary["parts"], cards, strict=True):
        write_atomic(target / row["page"], render_part(summary, row, card))
    write_atomic(target / JSON_NAME, json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return write_atomic(target / INDEX, index)


@cache
def index_script() -> str:
    """The index's script: that of every table that can be sorted and searched."""
    return f'"use strict";(() => {{\n{_PRELUDE}{(TEMPLATES / "tables.js").read_text("utf-8")}}})();'
