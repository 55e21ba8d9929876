"""What a head looks at on one prompt: a query x key matrix with the tokens written on both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vesalius.report.scales import LEVELS, sequential
from vesalius.report.words import token

SHORT, LARGEST, SMALLEST = 20, 24.0, 9.0
FRAMES = {True: 225.0, False: 400.0}
"""Side of the matrix in pixels: up to `SHORT` tokens four fit side by side, else two."""
CHARACTER, LISTED = 6.4, 2


@dataclass(frozen=True)
class Side:
    """A token beside (`y`) or above (`x`) the matrix."""

    place: float
    text: str
    last: bool


@dataclass(frozen=True)
class Picture:
    """Geometry of one head's attention on one prompt.

    squares: SVG path per colour class, of all query-key pairs that have it. shares: every row's attention in per cent,
    for a script that shows the pair under the pointer. looks_at: where the last token looks most, with its share.
    """

    component: str
    role: str
    left: float
    top: float
    side: float
    cell: float
    squares: tuple[tuple[str, str], ...]
    shares: str
    queries: tuple[Side, ...]
    keys: tuple[Side, ...]
    looks_at: tuple[tuple[str, float], ...]

    @property
    def width(self) -> float:
        """Of the whole picture, with the slanted tokens above the last columns."""
        return self.left + self.side + 30

    @property
    def height(self) -> float:
        """Of the whole picture."""
        return self.top + self.side + 4


def picture(head: Mapping[str, Any], prompt: Mapping[str, Any]) -> Picture:
    """Geometry of one head of summary.attention on one of its prompts."""
    tokens, pattern = [token(text) for text in prompt["tokens"]], prompt["pattern"]
    cell = round(max(SMALLEST, min(LARGEST, FRAMES[len(tokens) <= SHORT] / max(len(tokens), 1))), 1)
    left = round(max((len(text) for text in tokens), default=0) * CHARACTER + 12, 1)
    top = round(left * 0.8 + 6, 1)
    last = len(tokens) - 1
    return Picture(
        head["component"],
        head["role"],
        left,
        top,
        round(len(tokens) * cell, 1),
        cell,
        _squares(pattern, left, top, cell),
        ";".join(_shares(row) for row in pattern),
        tuple(Side(round(top + (i + 0.5) * cell + 3.5, 1), text, i == last) for i, text in enumerate(tokens)),
        tuple(Side(round(left + (i + 0.5) * cell, 1), text, i == last) for i, text in enumerate(tokens)),
        _looks_at(tokens, pattern),
    )


def opening(tokens: Sequence[str], most: int = 34) -> str:
    """The first words of a prompt, to choose it by; what precedes every prompt is left out."""
    # Special tokens are written in angle brackets by every common tokenizer.
    text = "".join(token for token in tokens if not token.startswith("<")).strip().replace("\n", " ")
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " …"


def _squares(
    pattern: Sequence[Sequence[float | None]], left: float, top: float, cell: float
) -> tuple[tuple[str, str], ...]:
    # One path per colour instead of one rectangle per pair: a tenth of the size, and there are several prompts.
    side = round(cell - 0.6, 1)
    paths = {f"a{step}": "" for step in range(1, LEVELS + 1)}
    for q, row in enumerate(pattern):
        for k, share in enumerate(row):
            if share is not None and sequential(share) != "z":
                x, y = round(left + k * cell, 1), round(top + q * cell, 1)
                paths[sequential(share)] += f"M{x:g} {y:g}h{side:g}v{side:g}h-{side:g}z"
    return tuple((colour, path) for colour, path in paths.items() if path)


def _shares(row: Sequence[float | None]) -> str:
    """A row in per cent, as far as its last pair that is not zero: causal attention has many zeros after it."""
    shown = ["" if share is None else f"{100 * share:.0f}" for share in row]
    while shown and shown[-1] == "0":
        shown.pop()
    return ",".join(shown)


def _looks_at(tokens: Sequence[str], pattern: Sequence[Sequence[float | None]]) -> tuple[tuple[str, float], ...]:
    if not pattern:
        return ()
    known = [(tokens[key], share) for key, share in enumerate(pattern[-1]) if share is not None and share >= 0.05]
    return tuple(sorted(known, key=lambda pair: -pair[1])[:LISTED])
