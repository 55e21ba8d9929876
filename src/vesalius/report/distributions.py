"""Distributions: the circuit against random sets, and the effects of the main claims per example and template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vesalius.report.scales import Scale, around

BINS = 70
PANEL_WIDTH, PANEL_LEFT = 520.0, 12.0
LINE_WIDTH, BAR_TOP, BAR_BASE = 760.0, 26.0, 92.0
ROW_HEIGHT, ROWS_LEFT, ROWS_TOP, MOST_ROWS = 15.0, 40.0, 10.0, 16
MAIN_CLAIMS, MAIN_SUPPORTED = 8, 6


@dataclass(frozen=True)
class Against:
    """One ablation: histogram of random sets (x, y, height per bar), the circuit's estimate, its examples as dots."""

    ablation: str
    found: Mapping[str, Any]
    rest: Mapping[str, Any] | None
    scale: Scale
    bars: tuple[tuple[float, float, float], ...]
    bar_width: float
    dots: tuple[tuple[float, float], ...]
    width: float = LINE_WIDTH
    height: float = BAR_BASE + 46
    base: float = BAR_BASE


@dataclass(frozen=True)
class Strip:
    """One template: dots of its examples' effects and of the matched controls', and the mean effect."""

    y: float
    label: str
    title: str
    effects: tuple[float, ...]
    controls: tuple[float, ...]
    mean: float


@dataclass(frozen=True)
class Spread:
    """Per-template, per-example effects of one claim."""

    claim: Mapping[str, Any]
    scale: Scale
    band: tuple[float, float] | None
    strips: tuple[Strip, ...]
    width: float
    height: float


def against_random(circuit: Mapping[str, Any]) -> list[Against]:
    """One panel per ablation, all on one scale that holds every prompt, and 0 and 1 (nothing and everything kept)."""
    entries = circuit["faithfulness"]
    ends = [entry[name] for entry in entries for name in ("low", "high", "estimate")]
    random = [value for entry in entries if entry["random"] for value in entry["random"]["values"]]
    every = [value for entry in entries for value in entry["per_example"]]
    scale = around([0.0, 1.0, *ends, *random, *every], PANEL_LEFT, LINE_WIDTH - PANEL_LEFT, pad=0.03)
    rest = {entry["ablation"]: entry for entry in circuit["completeness"]}
    return [_against(entry, rest.get(entry["ablation"]), scale) for entry in entries]


def _against(entry: Mapping[str, Any], rest: Mapping[str, Any] | None, scale: Scale) -> Against:
    width = (scale.end - scale.start) / BINS
    counts = [0] * BINS
    for value in (entry["random"] or {"values": ()})["values"]:
        if value is not None:
            counts[min(BINS - 1, int((scale(value) - scale.start) / width))] += 1
    tallest = max(counts) or 1
    heights = [round((BAR_BASE - BAR_TOP) * count / tallest, 1) for count in counts]
    bars = [(round(scale.start + i * width, 1), BAR_BASE - h, h) for i, h in enumerate(heights) if h]
    dots = [
        # On four lines, so that prompts of about one value can be told apart.
        (scale(value), BAR_BASE + 8 + 3.5 * (i % 4))
        for i, value in enumerate(entry["per_example"])
        if value is not None
    ]
    return Against(entry["ablation"], entry, rest, scale, tuple(bars), round(width - 1, 2), tuple(dots))


def drawable(claims: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The claims that have more than one example to draw."""
    return [claim for claim in claims if len(claim["values"]) > 1 and claim["estimate"] is not None]


def main_claims(claims: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The claims whose distributions are shown at once: the largest supported ones, one per part, then the others."""
    first: dict[str, Mapping[str, Any]] = {}
    # One claim a part: three panels of one head would push the others out of sight.
    for claim in sorted(drawable(claims), key=_importance):
        first.setdefault(claim["component"] or claim["id"], claim)
    kept = list(first.values())
    supported = [c for c in kept if c["verdict"] == "SUPPORTED"]
    others = [c for c in kept if c["verdict"] != "SUPPORTED"]
    # What was not supported is evidence too, so some room is kept for it.
    room = max(MAIN_SUPPORTED, MAIN_CLAIMS - len(others))
    return supported[:room] + others[: MAIN_CLAIMS - len(supported[:room])]


def _importance(claim: Mapping[str, Any]) -> tuple[bool, float]:
    return claim["verdict"] != "SUPPORTED", -abs(claim["estimate"]) / (claim["delta"] or 1.0)


def spread(claim: Mapping[str, Any], numbers: Mapping[str, int], width: float = PANEL_WIDTH) -> Spread:
    """Geometry of one claim's examples; `numbers` gives each template its number in the table of templates."""
    controls = claim["control_values"] or []
    delta = claim["delta"]
    ends = [*claim["values"], *controls, *(() if delta is None else (delta, -delta))]
    scale = around(ends, ROWS_LEFT, width - PANEL_LEFT)
    groups = _groups(claim, numbers)
    strips = tuple(_strip(i, label, title, rows, claim, scale) for i, (label, title, rows) in enumerate(groups))
    band = None if delta is None else (scale(-delta), scale(delta))
    return Spread(claim, scale, band, strips, width, ROWS_TOP + ROW_HEIGHT * len(strips) + 24)


def _groups(claim: Mapping[str, Any], numbers: Mapping[str, int]) -> list[tuple[str, str, list[int]]]:
    """(label, title, indices of examples) per template; one group when there are no templates or too many to draw."""
    every = list(range(len(claim["values"])))
    names = sorted(set(claim["templates"]), key=lambda name: (numbers.get(name, 1 << 30), name))
    # Many templates of one prompt each would make a row for every dot.
    if not 1 < len(names) <= MOST_ROWS:
        return [("all", "all examples", every)]
    members = {name: [i for i in every if claim["templates"][i] == name] for name in names}
    return [(f"T{numbers[name]}" if name in numbers else name[:5], name, members[name]) for name in names]


def _strip(index: int, label: str, title: str, rows: Sequence[int], claim: Mapping[str, Any], scale: Scale) -> Strip:
    values = [claim["values"][i] for i in rows if claim["values"][i] is not None]
    controls = [claim["control_values"][i] for i in rows] if claim["control_values"] else []
    return Strip(
        ROWS_TOP + ROW_HEIGHT * (index + 0.5),
        label,
        title,
        tuple(scale(value) for value in values),
        tuple(scale(value) for value in controls if value is not None),
        scale(sum(values) / len(values)) if values else scale(0),
    )
