"""A small forest plot for one line of a table: interval, estimate, the band of effects too small to claim, control.

All of them are on square-root scales, so that the embedding's 100 % and a head's 2 % have room on one axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vesalius.report.scales import Scale, around

WIDTH, HEIGHT, MARGIN = 190.0, 26.0, 10.0
TICKS = 4


@dataclass(frozen=True)
class Forest:
    """Pixel places along one line; what was not measured is None. ticks: (pixel, value), for an axis."""

    zero: float
    band: tuple[float, float] | None
    line: tuple[float, float] | None
    point: float | None
    control: float | None
    ticks: tuple[tuple[float, float], ...]
    width: float = WIDTH
    height: float = HEIGHT


def forest(
    found: Mapping[str, Any], scale: Scale, *, delta: float | None = None, control: float | None = None
) -> Forest:
    """Geometry of one estimate with `low` and `high` on a shared scale."""
    low, high, point = found["low"], found["high"], found["estimate"]
    return Forest(
        scale(0),
        None if delta is None else (scale(-delta), scale(delta)),
        None if low is None or high is None else (scale(low), scale(high)),
        None if point is None else scale(point),
        None if control is None else scale(control),
        tuple(scale.ticks(TICKS)),
    )


def shared_scale(found: Sequence[Mapping[str, Any]], extra: Sequence[float | None] = ()) -> Scale:
    """One scale for estimates that are read against each other; it holds all of them, with their intervals."""
    ends = [item[name] for item in found for name in ("low", "high", "estimate")]
    return around([*ends, *extra], MARGIN, WIDTH - MARGIN, pad=0.02, root=True)


def forests(claims: Sequence[Mapping[str, Any]]) -> list[Forest]:
    """One forest per claim; claims of one unit share a scale."""
    scales = {}
    for unit in {claim["unit"] for claim in claims}:
        alike = [claim for claim in claims if claim["unit"] == unit]
        # Thresholds and controls belong on the axis too: a verdict is read from how the three lie.
        extra = [value for claim in alike for value in (claim["delta"], claim["control_estimate"])]
        scales[unit] = shared_scale(alike, [*extra, *(None if c["delta"] is None else -c["delta"] for c in alike)])
    return [forest(c, scales[c["unit"]], delta=c["delta"], control=c["control_estimate"]) for c in claims]
