"""Histograms as plain geometry: bars for what was found, an outline for what chance gives, one axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vesalius.report.scales import Scale

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BASE = 540.0, 190.0, 10.0, 10.0, 18.0, 150.0


@dataclass(frozen=True)
class Bar:
    """One bin."""

    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Histogram:
    """bars: of what was found. outline: SVG path of the null, each scaled to its own highest bin; empty without one.

    ticks: (pixel, label).
    """

    bars: tuple[Bar, ...]
    outline: str
    ticks: tuple[tuple[float, str], ...]
    width: float = WIDTH
    height: float = HEIGHT
    base: float = BASE
    start: float = LEFT
    end: float = WIDTH - RIGHT


def cosines(found: Mapping[str, Any], name: str) -> Histogram:
    """Cosines of one histogram (key `name`) against its null; empty bins at either end are not drawn."""
    # Cosines run from -1 to 1, but most dictionaries use a narrow part of that.
    used = [number for number, pair in enumerate(zip(found[name], found["null"], strict=True)) if any(pair)]
    first, stop = (used[0], used[-1] + 1) if used else (0, len(found["null"]))
    edges, counts, null = found["edges"][first : stop + 1], found[name][first:stop], found["null"][first:stop]
    scale = Scale(edges[0], edges[-1], LEFT, WIDTH - RIGHT)
    ticks = tuple((pixel, f"{value:.3g}".replace("-", "−")) for pixel, value in scale.ticks(6))
    label = lambda low, high, count: f"{count:,} latents with a cosine from {low:.2f} to {high:.2f}"  # noqa: E731
    return Histogram(_bars(edges, counts, scale, label), _outline(edges, null, scale), ticks)


def densities(found: Mapping[str, Any]) -> Histogram:
    """Latents by the logarithm of the share of rows in which they are active."""
    edges = found["edges"]
    scale = Scale(edges[0], edges[-1], LEFT + 20, WIDTH - RIGHT - 20)
    label = lambda low, high, count: f"{count:,} latents active in {_share(low)} to {_share(high)} of rows"  # noqa: E731
    ticks = tuple((scale(power), _share(power)) for power in range(round(edges[0]), round(edges[-1]) + 1))
    return Histogram(_bars(edges, found["counts"], scale, label), "", ticks)


def _share(power: float) -> str:
    return f"{100 * 10.0**power:.3g} %"


def _bars(edges: Sequence[float], counts: Sequence[int], scale: Scale, label: Any) -> tuple[Bar, ...]:
    tallest = max(counts, default=0) or 1
    found = []
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        if count:
            height = round((BASE - TOP) * count / tallest, 1)
            width = round(max(scale(high) - scale(low) - 1, 0.5), 1)
            found.append(Bar(scale(low), round(BASE - height, 1), width, height, label(low, high, count)))
    return tuple(found)


def _outline(edges: Sequence[float], counts: Sequence[int], scale: Scale) -> str:
    """A path of steps over the bins, closed at the base line."""
    tallest = max(counts, default=0) or 1
    steps = [
        f"V{round(BASE - (BASE - TOP) * count / tallest, 1)}H{scale(high)}"
        for high, count in zip(edges[1:], counts, strict=True)
    ]
    return f"M{scale(edges[0])} {BASE}" + "".join(steps) + f"V{BASE}z"
