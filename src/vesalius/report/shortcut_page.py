"""From the summary of the medical case to one HTML page that a clinician can read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vesalius import __version__
from vesalius.jobs import write_atomic
from vesalius.report.html import HTML_NAME, JSON_NAME, environment

HOME, AWAY = "validation", "elsewhere"
LEAST = 0.3
"""Accuracy at the left end of the picture; nothing there is worse."""


@dataclass(frozen=True)
class Dot:
    """A share with its interval, as percent of the width of its track."""

    at: float
    low: float
    high: float
    words: str


@dataclass(frozen=True)
class Row:
    """A model's accuracy at home and away."""

    name: str
    home: Dot
    away: Dot


def render_shortcut(summary: Mapping[str, Any]) -> str:
    """One self-contained HTML page. The same summary gives the same page."""
    rows = [
        Row(name, _dot(of[HOME], "at home"), _dot(of[AWAY], "at the other hospital"))
        for name, of in summary["accuracy"].items()
    ]
    claims = {split: [one for one in summary["claims"] if one["split"] == split] for split in (HOME, AWAY)}
    mark = summary["mark"]
    ranks = {method: [one["column"] for one in some].index(mark) + 1 for method, some in summary["attribution"].items()}
    audited = [one["column"] for one in summary["audit"]].index(mark) + 1
    view = {
        "s": summary, "rows": rows, "claims": claims, "ranks": ranks, "audited": audited, "version": __version__,
        "ticks": [(_place(share), f"{share:.0%}") for share in (0.4, 0.6, 0.8, 1.0)],
        "bars": {
            "audit": _bars([(one["column"], one["auroc"]) for one in summary["audit"]], 0.5, mark),
            "attribution": _bars(
                [(one["column"], one["share"]) for one in summary["attribution"]["integrated_gradients"]], 0.0, mark
            ),
        },
    }  # fmt: skip
    return environment().get_template("shortcut.html.j2").render(view)


def write_shortcut(summary: Mapping[str, Any], folder: str | Path) -> Path:
    """Writes report.html and summary.json into the folder, each atomically; returns the path of the page."""
    page, target = render_shortcut(summary), Path(folder)
    write_atomic(target / JSON_NAME, json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return write_atomic(target / HTML_NAME, page)


def _place(share: float) -> float:
    return round(100 * max(0.0, (share - LEAST) / (1 - LEAST)), 2)


def _dot(found: Mapping[str, Any], where: str) -> Dot:
    low, high = (found[end] if found[end] is not None else found["estimate"] for end in ("low", "high"))
    words = f"{found['estimate']:.1%} [{low:.1%}, {high:.1%}] of {found['n']} patients {where}"
    return Dot(_place(found["estimate"]), _place(low), _place(high), words)


def _bars(found: Sequence[tuple[str, float]], start: float, mark: str) -> list[dict[str, Any]]:
    most = max(value for _, value in found) - start
    return [
        {"name": name, "value": value, "width": round(100 * max(0.0, value - start) / most, 1), "mark": name == mark}
        for name, value in found
    ]
