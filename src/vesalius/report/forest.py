"""A small forest plot for one line of a table: interval, estimate, the band of effects too small to claim, control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vesalius.report.scales import Scale, around

WIDTH, HEIGHT, MARGIN = 190.0, 26.0, 6.0


@dataclass(frozen=True)
class Forest:
    """Pixel places along one line; what was not measured is None. `beyond` (-1, 1): the point is off the scale."""

    zero: float
    band: tuple[float, float] | None
    line: tuple[float, float] | None
    point: float | None
    control: float | None
    beyond: int = 0
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
        0 if point is None or scale.holds(point) else 1 if point > 0 else -1,
    )


def shared_scale(found: Sequence[Mapping[str, Any]], extra: Sequence[float | None] = ()) -> Scale:
    """One scale for estimates that are read against each other."""
    ends = [item[name] for item in found for name in ("low", "high", "estimate")]
    return around([*ends, *extra], MARGIN, WIDTH - MARGIN)


def forests(claims: Sequence[Mapping[str, Any]]) -> list[Forest]:
    """One forest per claim; claims of one unit share a scale."""
    scales = {}
    for unit in {claim["unit"] for claim in claims}:
        alike = [claim for claim in claims if claim["unit"] == unit]
        extra = [value for claim in alike for value in (claim["delta"], claim["control_estimate"])]
        scales[unit] = shared_scale(alike, [*extra, *(None if c["delta"] is None else -c["delta"] for c in alike)])
    return [forest(c, scales[c["unit"]], delta=c["delta"], control=c["control_estimate"]) for c in claims]
