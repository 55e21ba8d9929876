"""From the summary of a study of a concept to one HTML page: accuracy by site with controls, transfer, claims."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vesalius import __version__
from vesalius.jobs import write_atomic
from vesalius.report import study_schemas
from vesalius.report.html import HTML_NAME, JSON_NAME, environment
from vesalius.report.scales import Scale, around

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BASE = 760.0, 340.0, 52.0, 190.0, 14.0, 280.0
BESIDE = {"random_weights": "random weights", "shuffled": "labels dealt out anew"}
FLAT = {"majority": "commonest label", "bag_of_words": "bag of words"}


@dataclass(frozen=True)
class Line:
    """A series of the chart, in pixels. name: at its right end, at `label` from the top."""

    name: str
    path: str
    points: tuple[tuple[float, float, str], ...]
    css: str
    label: float


@dataclass(frozen=True)
class Chart:
    """Accuracy over sites. band: the interval on validation, as the path of an area."""

    lines: tuple[Line, ...]
    band: str
    best: float
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    width: float = WIDTH
    height: float = HEIGHT
    start: float = LEFT
    end: float = WIDTH - RIGHT
    base: float = BASE
    top: float = TOP


def render_probed(summary: Mapping[str, Any]) -> str:
    """One self-contained HTML page. The same summary gives the same page."""
    splits = list(dict.fromkeys(split for line in summary["transfer"].values() for split in line))
    view = {"s": summary, "chart": chart(summary["probes"]), "splits": splits, "version": __version__}
    return environment().get_template("probe.html.j2").render(view)


def write_probed(summary: Mapping[str, Any], folder: str | Path) -> Path:
    """Writes report.html and summary.json into the folder, each atomically; returns the path of the page."""
    study_schemas.check(summary)
    page, target = render_probed(summary), Path(folder)
    write_atomic(target / JSON_NAME, json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return write_atomic(target / HTML_NAME, page)


def chart(probes: Mapping[str, Any]) -> Chart:
    """Validation, other distributions, and every control, site by site."""
    sites = probes["sites"]
    series = _series(sites)
    every = [value for _, values, _ in series for value in values] + [
        end for one in sites for end in (one["validation"]["low"], one["validation"]["high"])
    ]
    x = around([0.0, max(1.0, float(len(sites) - 1))], LEFT, WIDTH - RIGHT, pad=0.01)
    y = around([*every, 0.4, 1.0], BASE, TOP, pad=0.02)
    labels = _apart([y(values[-1]) for _, values, _ in series])
    lines = tuple(
        _line(name, values, css, x, y, label, sites) for (name, values, css), label in zip(series, labels, strict=True)
    )
    ends = [(one["validation"]["low"], one["validation"]["high"]) for one in sites]
    known = all(low is not None for low, _ in ends)
    band = _band([(x(n), y(low), y(high)) for n, (low, high) in enumerate(ends)]) if known and len(sites) > 1 else ""
    names = [one["site"] for one in sites]
    step = max(1, len(sites) // 8)
    ticks = tuple((x(n), _short(names[n])) for n in range(0, len(sites), step))
    return Chart(lines, band, x(names.index(probes["best"])), ticks, tuple((p, f"{v:g}") for p, v in y.ticks(5)))


def _series(sites: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[float], str]]:
    """Name, a value for each site, and how it is drawn."""
    found = [("fresh examples", [one["validation"]["estimate"] for one in sites], "own")]
    for name in sites[0]["shifted"]:
        found.append((name, [one["shifted"][name]["estimate"] for one in sites], "shifted"))
    for key, words in {**BESIDE, **FLAT}.items():
        if all(key in one["controls"] for one in sites):
            css = "control" if key in BESIDE else "flat"
            found.append((words, [one["controls"][key]["value"] for one in sites], css))
    return found


def _line(
    name: str, values: Sequence[float], css: str, x: Scale, y: Scale, label: float, sites: Sequence[Mapping[str, Any]]
) -> Line:
    points = [(x(n), y(value), f"{name}, {sites[n]['site']}: {value:.3f}") for n, value in enumerate(values)]
    return Line(name, "M" + " L".join(f"{px} {py}" for px, py, _ in points), tuple(points), css, label)


def _band(ends: Sequence[tuple[float, float, float]]) -> str:
    upper = " L".join(f"{px} {high}" for px, _, high in ends)
    lower = " L".join(f"{px} {low}" for px, low, _ in reversed(ends))
    return f"M{upper} L{lower} Z"


def _apart(places: Sequence[float], least: float = 14.0) -> list[float]:
    """Places moved down as far as it takes for names not to lie on each other."""
    found, last = [0.0] * len(places), float("-inf")
    for number in sorted(range(len(places)), key=lambda one: places[one]):
        last = max(places[number], last + least)
        found[number] = last
    return found


def _short(site: str) -> str:
    """ "12" of layers.12.resid_post."""
    parts = site.split(".")
    return parts[1] if parts[0] == "layers" and len(parts) > 1 else site[-12:]
