"""From the summary of the comparison by design to one HTML page: accuracy, and how much a reader is told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vesalius import __version__
from vesalius.jobs import write_atomic
from vesalius.report.html import HTML_NAME, JSON_NAME, environment
from vesalius.report.scales import Scale

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BASE = 640.0, 300.0, 54.0, 20.0, 16.0, 250.0


@dataclass(frozen=True)
class Point:
    """A model in the picture, in pixels: fidelity to the right, accuracy upwards, with its interval."""

    name: str
    x: float
    y: float
    low: float
    high: float
    label: float
    css: str
    words: str


@dataclass(frozen=True)
class Picture:
    """Models of one table."""

    points: tuple[Point, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    baseline: float | None
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    base: float = BASE


def render_by_design(summary: Mapping[str, Any]) -> str:
    """One self-contained HTML page. The same summary gives the same page."""
    tables = [
        {**table, "models": [one for one in summary["models"] if one["table"] == table["name"]]}
        for table in summary["tables"]
    ]
    pictures = {table["name"]: picture(table) for table in tables}
    view = {"s": summary, "tables": tables, "pictures": pictures, "version": __version__}
    return environment().get_template("by_design.html.j2").render(view)


def write_by_design(summary: Mapping[str, Any], folder: str | Path) -> Path:
    """Writes report.html and summary.json into the folder, each atomically; returns the path of the page."""
    page, target = render_by_design(summary), Path(folder)
    write_atomic(target / JSON_NAME, json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return write_atomic(target / HTML_NAME, page)


def picture(table: Mapping[str, Any]) -> Picture:
    """Accuracy over fidelity, one point a model."""
    models = table["models"]
    told = [one["fidelity"]["estimate"] for one in models]
    scores = [value for one in models for value in _ends(one["score"])]
    x, y = _scale([*told, 1.0], LEFT + 130, WIDTH - RIGHT), _scale(scores, BASE, TOP)
    labels = _apart([y(one["score"]["estimate"]) for one in models])
    points = tuple(_point(one, x, y, label) for one, label in zip(models, labels, strict=True))
    flat = table["baseline"]["estimate"]
    return Picture(
        points,
        tuple((place, f"{value:.0%}") for place, value in x.ticks(5)),
        tuple((place, f"{value:g}") for place, value in y.ticks(5)),
        y(flat) if min(scores) <= flat <= max(scores) else None,
    )


def _scale(values: list[float], start: float, end: float) -> Scale:
    """From the smallest to the largest, with some room: zero is of no meaning here."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.01
    return Scale(low - room, high + room, start, end)


def _ends(score: Mapping[str, Any]) -> list[float]:
    return [score["estimate"] if score[end] is None else score[end] for end in ("low", "high")]


def _point(model: Mapping[str, Any], x: Scale, y: Scale, label: float) -> Point:
    score, low_high = model["score"], _ends(model["score"])
    words = f"{model['model']}: {score['name']} {score['estimate']:.3f}, fidelity {model['fidelity']['estimate']:.1%}"
    css = "own" if model["by_design"] else "box"
    at = x(model["fidelity"]["estimate"]), y(score["estimate"])
    return Point(model["model"], *at, y(low_high[0]), y(low_high[1]), label, css, words)


def _apart(places: list[float], least: float = 15.0) -> list[float]:
    """Heights of the names, moved down as far as it takes for them not to lie on each other."""
    found, last = [0.0] * len(places), float("-inf")
    for number in sorted(range(len(places)), key=lambda one: places[one]):
        last = max(places[number], last + least)
        found[number] = last
    return found
