"""What a head looks at on one example: a query x key matrix with the tokens written on both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vesalius.report.scales import sequential
from vesalius.report.words import token

SHORT, LARGEST, SMALLEST = 18, 24.0, 9.0
FRAMES = {True: 262.0, False: 400.0}
"""Side of the matrix in pixels: up to `SHORT` tokens three fit side by side, else two."""
CHARACTER, LISTED = 6.4, 2


@dataclass(frozen=True)
class Square:
    """One query-key pair with enough of the query's attention to have a colour."""

    x: float
    y: float
    colour: str
    title: str


@dataclass(frozen=True)
class Side:
    """A token beside (`y`) or above (`x`) the matrix."""

    place: float
    text: str
    last: bool


@dataclass(frozen=True)
class Picture:
    """Geometry of one head's attention. `looks_at`: where the last token looks most, with its share."""

    component: str
    role: str
    left: float
    top: float
    side: float
    cell: float
    squares: tuple[Square, ...]
    queries: tuple[Side, ...]
    keys: tuple[Side, ...]
    looks_at: tuple[tuple[str, float], ...]

    @property
    def width(self) -> float:
        return self.left + self.side + 30

    @property
    def height(self) -> float:
        return self.top + self.side + 4


def picture(head: Mapping[str, Any]) -> Picture:
    """Geometry of one entry of summary.attention."""
    tokens, pattern = [token(text) for text in head["tokens"]], head["pattern"]
    cell = round(max(SMALLEST, min(LARGEST, FRAMES[len(tokens) <= SHORT] / max(len(tokens), 1))), 1)
    left = round(max((len(text) for text in tokens), default=0) * CHARACTER + 12, 1)
    top = round(left * 0.8 + 6, 1)
    squares = [
        Square(round(left + k * cell, 1), round(top + q * cell, 1), sequential(share), _title(tokens, q, k, share))
        for q, row in enumerate(pattern)
        for k, share in enumerate(row)
        if share is not None and sequential(share) != "z"
    ]
    last = len(tokens) - 1
    queries = tuple(Side(round(top + (i + 0.5) * cell + 3.5, 1), text, i == last) for i, text in enumerate(tokens))
    keys = tuple(Side(round(left + (i + 0.5) * cell, 1), text, i == last) for i, text in enumerate(tokens))
    side = round(len(tokens) * cell, 1)
    return Picture(
        head["component"],
        head["role"],
        left,
        top,
        side,
        cell,
        tuple(squares),
        queries,
        keys,
        _looks_at(tokens, pattern),
    )


def _title(tokens: Sequence[str], query: int, key: int, share: float) -> str:
    return f"{tokens[query]} → {tokens[key]}: {share:.2f}"


def _looks_at(tokens: Sequence[str], pattern: Sequence[Sequence[float | None]]) -> tuple[tuple[str, float], ...]:
    if not pattern:
        return ()
    known = [(tokens[key], share) for key, share in enumerate(pattern[-1]) if share is not None and share >= 0.05]
    return tuple(sorted(known, key=lambda pair: -pair[1])[:LISTED])
