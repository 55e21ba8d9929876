"""From the summary of a study of heads in text to one HTML page: the map of heads, and the table of what each does."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vesalius import __version__
from vesalius.jobs import write_atomic
from vesalius.report import study_schemas
from vesalius.report.claim_schema import VERDICTS
from vesalius.report.explain_page import index_script
from vesalius.report.html import HTML_NAME, JSON_NAME, environment, script_hash

SUPPORTED, COLOURS = "SUPPORTED", 7
CELL, GAP, LEFT, TOP = 22, 3, 34, 18


def render_heads(summary: Mapping[str, Any]) -> str:
    """One self-contained HTML page. The same summary gives the same page."""
    heads, script = summary["heads"], index_script()
    outcomes = Counter(head["verdict"] for head in heads)
    view = {
        "s": summary,
        "version": __version__,
        "verdicts": VERDICTS,
        "outcomes": outcomes,
        "map": _map(heads),
        "script": script,
        "script_hash": script_hash(script),
    }
    return environment().get_template("heads.html.j2").render(view)


def write_heads(summary: Mapping[str, Any], folder: str | Path) -> Path:
    """Writes report.html and summary.json into the folder, each atomically; returns the path of the page."""
    study_schemas.check(summary)
    page, target = render_heads(summary), Path(folder)
    write_atomic(target / JSON_NAME, json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return write_atomic(target / HTML_NAME, page)


def _map(heads: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Layers downwards, heads across: the colour is the role, filled where it is supported."""
    counts = Counter(head["label"] for head in heads if head["label"] and head["verdict"] == SUPPORTED)
    labels = [label for label, _ in counts.most_common()]
    labels += sorted({head["label"] for head in heads if head["label"]} - set(labels))
    colours = {label: f"k{min(number, COLOURS)}" for number, label in enumerate(labels)}
    layers, across = (1 + max(head[name] for head in heads) for name in ("layer", "head"))
    cells = [
        {
            "x": LEFT + head["head"] * (CELL + GAP),
            "y": TOP + head["layer"] * (CELL + GAP),
            "css": " ".join([colours.get(head["label"], "bare"), *(["held"] if head["verdict"] == SUPPORTED else [])]),
            "words": f"{head['part']}: {head['sentence']}" + (f" {head['verdict']}" if head["verdict"] else ""),
        }
        for head in heads
    ]
    return {
        "cells": cells,
        "size": CELL,
        "width": LEFT + across * (CELL + GAP),
        "height": TOP + layers * (CELL + GAP),
        "layers": [(TOP + n * (CELL + GAP) + 15, n) for n in range(layers)],
        "heads": [(LEFT + n * (CELL + GAP) + CELL / 2, n) for n in range(across)],
        "legend": [(colours[label], label, counts[label]) for label in labels],
    }
