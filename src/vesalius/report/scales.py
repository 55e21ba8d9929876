"""Linear scales, round ticks, and the two colour ramps (diverging for effects, sequential for attention)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

LEVELS = 9
"""Steps of each half of the diverging ramp, and of the sequential one: CSS classes, so that themes can differ."""

# Blue helps, orange suppresses: told apart by the common forms of colour blindness, and by a mark besides.
_LIGHT = {
    "p": ("#f3f0ea", "#7fb2dc", "#0a437f"),
    "n": ("#f3f0ea", "#f0a868", "#8f3d02"),
    "a": ("#f6f3ee", "#8d8fc4", "#29245f"),
}
_DARK = {
    "p": ("#262a33", "#3474ad", "#a9d4fb"),
    "n": ("#262a33", "#b0621f", "#ffcf9e"),
    "a": ("#1f232b", "#6a67b5", "#dcd8ff"),
}


@dataclass(frozen=True)
class Scale:
    """Maps values in [low, high] to pixels in [start, end], linearly."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Pixel of a value; values outside stay at the edge, so that nothing is drawn outside its frame."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def holds(self, value: float) -> bool:
        """Whether a value lies inside, so that its pixel is where it really is."""
        return self.low <= value <= self.high

    def ticks(self, wanted: int = 4) -> list[tuple[float, float]]:
        """(pixel, value) at round values."""
        step = nice((self.high - self.low) / max(wanted, 1))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [(self(index * step), index * step) for index in range(first, last + 1)]


def nice(value: float) -> float:
    """The smallest of 1, 2, 2.5, 5, 10 times a power of ten that is at least the value."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * (1 - 1e-9))


def around(values: Iterable[float | None], start: float, end: float, *, pad: float = 0.06) -> Scale:
    """A scale that holds all values and zero, with a little room on both sides."""
    known = [value for value in values if value is not None] + [0.0]
    low, high = min(known), max(known)
    room = pad * (high - low) or 1.0
    return Scale(low - room, high + room, start, end)


def diverging(value: float | None, limit: float) -> str:
    """CSS class of an effect: p1..p9 helps, n1..n9 suppresses, z about zero, missing when not measured."""
    if value is None:
        return "missing"
    step = min(LEVELS, round(LEVELS * abs(value) / limit))
    return "z" if step == 0 else f"{'p' if value > 0 else 'n'}{step}"


def sequential(value: float) -> str:
    """CSS class of a share in [0, 1]: z or a1..a9; the power lifts small shares a little."""
    step = min(LEVELS, round(LEVELS * max(value, 0.0) ** 0.75))
    return "z" if step == 0 else f"a{step}"


def colour_rules() -> str:
    """CSS that gives every class of `diverging` and `sequential` its fill; dark screens get their own ramp."""
    dark = "\n".join(_rules(_DARK))
    return "\n".join(_rules(_LIGHT)) + f"\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}"


def _rules(ramps: dict[str, tuple[str, str, str]]) -> list[str]:
    rules = [f".z{{fill:{ramps['p'][0]}}}"]
    for name, stops in ramps.items():
        rules += [f".{name}{step}{{fill:{_colour(stops, step / LEVELS)}}}" for step in range(1, LEVELS + 1)]
    return rules


def _colour(stops: tuple[str, str, str], share: float) -> str:
    first, second = (stops[0], stops[1]) if share <= 0.5 else (stops[1], stops[2])
    part = 2 * share if share <= 0.5 else 2 * share - 1
    channels = (round((1 - part) * int(first[i : i + 2], 16) + part * int(second[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{channel:02x}" for channel in channels)
