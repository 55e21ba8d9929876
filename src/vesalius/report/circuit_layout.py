"""Where the parts of a circuit stand: layers go up, every role has columns of its own, curves go around the parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vesalius.report.words import NO_ROLE

NODE_WIDTH, NODE_HEIGHT = 56.0, 31.0
STEP_X, STEP_Y = 68.0, 40.0
LEFT, RIGHT, HEAD, BAR, GAP = 54.0, 14.0, 58.0, 22.0, 24.0
TALLEST = 9
"""Members above which a lane gets one more column."""
OUTER = 5.0
"""Pixels at either end of a node's side where no edge begins or ends."""
BENDS = (0.0, 34.0, -34.0, 62.0, -62.0, 96.0, -96.0, 130.0, -130.0)
"""How far a curve may swing to a side, by preference."""
SAMPLES = np.linspace(0.06, 0.94, 14)[:, None]
EMBED, LOGITS = "embed", "logits"

Member = Mapping[str, Any]
Point = tuple[float, float]


@dataclass(frozen=True)
class Lane:
    """The columns of one role, or of the parts of one kind without a role."""

    role: str
    kind: str
    first: int
    count: int

    @property
    def x(self) -> float:
        """Left edge."""
        return LEFT + STEP_X * self.first

    @property
    def width(self) -> float:
        """Width of its columns together."""
        return STEP_X * self.count


@dataclass(frozen=True)
class Layout:
    """Column and row of every member (rows from below) and the layer of every row."""

    columns: Mapping[str, int]
    rows: Mapping[str, int]
    lanes: tuple[Lane, ...]
    layers: tuple[int | None, ...]

    @property
    def width(self) -> float:
        """Of the whole drawing."""
        return LEFT + STEP_X * sum(lane.count for lane in self.lanes) + RIGHT

    @property
    def height(self) -> float:
        """Of the whole drawing."""
        return HEAD + 2 * (BAR + GAP) + STEP_Y * max(len(self.layers) - 1, 0) + NODE_HEIGHT

    @property
    def output(self) -> float:
        """Lower edge of the output bar."""
        return HEAD + BAR

    @property
    def input(self) -> float:
        """Upper edge of the input bar."""
        return self.height - BAR

    def row_top(self, row: int) -> float:
        """Upper edge of the nodes of a row."""
        return round(self.input - GAP - NODE_HEIGHT - STEP_Y * row, 1)

    def corner(self, name: str) -> Point:
        """Top left corner of a member."""
        x = LEFT + STEP_X * self.columns[name] + (STEP_X - NODE_WIDTH) / 2
        return round(x, 1), self.row_top(self.rows[name])

    def middle(self, name: str) -> float:
        """Horizontal middle of a member; of input and output, which are bars, the middle of the drawing."""
        return self.corner(name)[0] + NODE_WIDTH / 2 if name in self.columns else self.width / 2

    def beside(self, source: str, target: str) -> bool:
        """Whether both stand in one row: a head and the MLP of its layer."""
        return source in self.rows and self.rows[source] == self.rows.get(target)

    @cached_property
    def boxes(self) -> dict[str, Any]:
        """Left, top, right and bottom of every member, a little smaller than it is drawn."""
        corners = {name: self.corner(name) for name in self.columns}
        return {
            name: np.array([x + 2, y + 2, x + NODE_WIDTH - 2, y + NODE_HEIGHT - 2]) for name, (x, y) in corners.items()
        }

    def curve(self, source: str, target: str, start: Point, end: Point) -> str:
        """SVG path from start to end: of a few bends the one that runs behind the fewest members, then the mildest."""
        if self.beside(source, target):
            return _arch(start, end)
        others = [box for name, box in self.boxes.items() if name not in (source, target)]
        boxes = np.array(others).reshape(-1, 4).T
        return min((_Curve(start, end, bend) for bend in BENDS), key=lambda curve: curve.hidden(boxes)).path


@dataclass(frozen=True)
class _Curve:
    """A cubic curve upwards that leaves and arrives about vertically, and swings `bend` pixels to one side."""

    start: Point
    end: Point
    bend: float

    @property
    def points(self) -> tuple[Point, Point, Point, Point]:
        (x0, y0), (x1, y1) = self.start, self.end
        reach = max(7.0, 0.42 * abs(y0 - y1))
        return self.start, (x0 + self.bend, y0 - reach), (x1 + self.bend, y1 + reach), self.end

    @property
    def path(self) -> str:
        (x0, y0), *controls, (x1, y1) = self.points
        inner = " ".join(f"{x:.0f} {y:.0f}" for x, y in controls)
        return f"M{x0:g} {y0:g}C{inner} {x1:g} {y1:g}"

    def hidden(self, boxes: Any) -> int:
        """How many members (left, top, right, bottom: [4, member]) it runs behind."""
        first, second, third, last = (np.array(point) for point in self.points)
        t, s = SAMPLES, 1 - SAMPLES
        x, y = (s**3 * first + 3 * s**2 * t * second + 3 * s * t**2 * third + t**3 * last).T[..., None]
        left, top, right, bottom = boxes
        return int(((x > left) & (x < right) & (y > top) & (y < bottom)).any(axis=0).sum())


def _arch(start: Point, end: Point) -> str:
    # Within a layer (a head's output into the MLP) a line goes over what stands between them.
    (x0, y0), (x1, y1) = start, end
    return f"M{x0:g} {y0:g}C{x0:g} {y0 - 13:g} {x1:g} {y1 - 13:g} {x1:g} {y1:g}"


def forward(member: Member) -> tuple[int, bool, int]:
    """Sorting key: by layer, MLPs after the heads; what belongs to no layer comes first."""
    layer = -1 if member["layer"] is None else member["layer"]
    return layer, member["kind"] == "mlp", member["head"] or 0


def arrange(members: Sequence[Member]) -> Layout:
    """Places for all members but the embedding."""
    ordered = sorted(members, key=forward)
    layers = tuple(dict.fromkeys(member["layer"] for member in ordered))
    rows = {member["component"]: layers.index(member["layer"]) for member in ordered}
    columns: dict[str, int] = {}
    lanes: list[Lane] = []
    for alike in sorted(_alike(ordered), key=lambda found: _lane_order(found, rows)):
        start = sum(lane.count for lane in lanes)
        count = _columns_needed([rows[member["component"]] for member in alike])
        columns |= _spread(alike, rows, start, count)
        lanes.append(Lane(alike[0]["role"], alike[0]["kind"], start, count))
    return Layout(columns, rows, tuple(lanes), layers)


def _alike(members: Sequence[Member]) -> list[list[Member]]:
    """Members by role; those without one by kind."""
    keys = [(member["role"], member["kind"] if member["role"] == NO_ROLE else "") for member in members]
    return [[m for m, key in zip(members, keys, strict=True) if key == wanted] for wanted in dict.fromkeys(keys)]


def _lane_order(alike: Sequence[Member], rows: Mapping[str, int]) -> tuple[int, float, str]:
    # Roles in the order of the forward pass, so that they run from the lower left to the upper right. What has none
    # stands at the sides: heads at the left, close to the early roles that feed them, MLPs at the right.
    height = sum(rows[member["component"]] for member in alike) / len(alike)
    is_mlp, is_named = alike[0]["kind"] == "mlp", alike[0]["role"] != NO_ROLE
    side = (2 if is_named else 3) if is_mlp else (1 if is_named else 0)
    return side, height, alike[0]["role"]


def _columns_needed(rows: Sequence[int]) -> int:
    """Enough that no two members of one row share a place, and no lane is a tall tower."""
    return max(math.ceil(len(rows) / TALLEST), max(rows.count(row) for row in rows))


def _spread(alike: Sequence[Member], rows: Mapping[str, int], start: int, count: int) -> dict[str, int]:
    """A column for each: of those free in its row the one left empty for longest, so that curves find a way up."""
    last = [-1 - column for column in range(count)][::-1]
    found = {}
    for member in alike:
        row = rows[member["component"]]
        column = min((c for c in range(count) if last[c] != row), key=lambda c: (last[c], c))
        last[column] = row
        found[member["component"]] = start + column
    return found
