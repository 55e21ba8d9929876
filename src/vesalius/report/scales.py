"""Scales that hold every value, round ticks, and the two colour ramps: of effects and of attention."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

LEVELS = 9
"""Steps of each half of the diverging ramp, and of the sequential one: CSS classes, so that themes can differ."""
STEPS = range(1, LEVELS + 1)

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
    """Maps values in [low, high] to pixels in [start, end].

    root: by the square root of their size, with their sign. A head's 5 % and the embedding's 100 % can then be read off
    one axis; nothing has to be cut off.
    """

    low: float
    high: float
    start: float
    end: float
    root: bool = False

    def __call__(self, value: float) -> float:
        """Pixel of a value."""
        low, high = _bent(self.low, self.root), _bent(self.high, self.root)
        share = (_bent(value, self.root) - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)

    @property
    def words(self) -> str:
        """What kind of scale it is, for the axis."""
        return "square-root scale" if self.root else "linear scale"

    def ticks(self, wanted: int = 4) -> list[tuple[float, float]]:
        """(pixel, value) at round values, in order."""
        if self.root:
            return self._root_ticks((self.end - self.start) / (1.25 * wanted))
        step = nice((self.high - self.low) / max(wanted, 1))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [(self(index * step), index * step) for index in range(first, last + 1)]

    def _root_ticks(self, gap: float) -> list[tuple[float, float]]:
        # From the outside in: the ends tell how far the scale reaches, and what is left between them is for the rest.
        largest = max(abs(self.low), abs(self.high))
        powers = [10.0 ** (math.floor(math.log10(largest)) - step) for step in range(4)] if largest else []
        sizes = [digit * power for power in powers for digit in (5, 2, 1)]
        kept = [(self(0.0), 0.0)] if self.low <= 0 <= self.high else []
        for value in (sign * size for size in sizes for sign in (1, -1)):
            if self.low <= value <= self.high and all(abs(self(value) - pixel) >= gap for pixel, _ in kept):
                kept.append((self(value), value))
        return sorted(kept)


def _bent(value: float, root: bool) -> float:
    return math.copysign(math.sqrt(abs(value)), value) if root else value


def _straight(value: float, root: bool) -> float:
    return math.copysign(value * value, value) if root else value


def nice(value: float) -> float:
    """The smallest of 1, 2, 2.5, 5, 10 times a power of ten that is at least the value."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * (1 - 1e-9))


def around(values: Iterable[float | None], start: float, end: float, *, pad: float = 0.06, root: bool = False) -> Scale:
    """A scale that holds all values and zero, with a little room on both sides."""
    known = [value for value in values if value is not None] + [0.0]
    low, high = (_bent(end, root) for end in (min(known), max(known)))
    room = pad * (high - low) or 1.0
    return Scale(_straight(low - room, root), _straight(high + room, root), start, end, root)


def diverging(value: float | None, limit: float) -> str:
    """CSS class of an effect: p1..p9 helps, n1..n9 suppresses, z about zero, missing when not measured.

    By the square root of its share of `limit`, the largest there is: none is off the scale, and small ones show.
    """
    if value is None:
        return "missing"
    step = min(LEVELS, round(LEVELS * math.sqrt(abs(value) / limit)))
    return "z" if step == 0 else f"{'p' if value > 0 else 'n'}{step}"


def sequential(value: float) -> str:
    """CSS class of a share in [0, 1]: z or a1..a9; the power lifts small shares a little."""
    step = min(LEVELS, round(LEVELS * max(value, 0.0) ** 0.75))
    return "z" if step == 0 else f"a{step}"


def colour_rules() -> str:
    """CSS that gives every class of `diverging` and `sequential` its fill; dark screens get their own ramp.

    As backgrounds, for tables, they come with black or white text, whichever stands out more.
    """
    dark = "\n".join(_rules(_DARK))
    return "\n".join(_rules(_LIGHT)) + f"\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}"


def _rules(ramps: dict[str, tuple[str, str, str]]) -> list[str]:
    colours = {"z": ramps["p"][0]}
    colours |= {f"{name}{step}": _colour(stops, step / LEVELS) for name, stops in ramps.items() for step in STEPS}
    return [f".{name}{{fill:{c};background:{c};color:{_readable(c)}}}" for name, c in colours.items()]


def _colour(stops: tuple[str, str, str], share: float) -> str:
    first, second = (stops[0], stops[1]) if share <= 0.5 else (stops[1], stops[2])
    part = 2 * share if share <= 0.5 else 2 * share - 1
    channels = (round((1 - part) * int(first[i : i + 2], 16) + part * int(second[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{channel:02x}" for channel in channels)


def _readable(colour: str) -> str:
    """Black or white, by relative luminance (WCAG 2); the two give equal contrast at .179."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return "#000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "#fff"
