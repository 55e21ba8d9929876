"""The circuit as a graph: layers go up, each role has its own lane, edges are as thick as their measured weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vesalius.report.words import NO_ROLE, component, number

LEFT, RIGHT, NODE_WIDTH, NODE_HEIGHT, STEP_X, STEP_Y = 66.0, 18.0, 103.0, 25.0, 120.0, 37.0
HEAD, BAR, GAP = 40.0, 24.0, 26.0
NARROWEST = 420.0
PER_COLUMN = 6
MOST_NODES, MOST_EDGES = 64, 110
COLOURS = 8
"""Role colours in the style sheet (role-0 ... role-7); further roles share the grey of "no role fits"."""

Member = Mapping[str, Any]


@dataclass(frozen=True)
class Node:
    """One member: top left corner, colour number of its role (None: no role), and its words."""

    x: float
    y: float
    name: str
    effect: str
    colour: int | None
    suppresses: bool
    title: str


@dataclass(frozen=True)
class Edge:
    """A curve upwards from source to target; `width` in pixels follows |weight|."""

    path: str
    width: float
    negative: bool
    title: str


@dataclass(frozen=True)
class Lane:
    """The strip of one role: its left edge and width, and its name over at most two lines."""

    x: float
    width: float
    lines: tuple[str, ...]
    colour: int | None


@dataclass(frozen=True)
class Level:
    """A row of the drawing with its label at the left."""

    y: float
    text: str


@dataclass(frozen=True)
class Drawing:
    """All geometry of the drawing. `bars`: (y, text) of input and output, drawn across all lanes.

    `edges_left_out` were weaker, and `members_left_out` had smaller effects, than what is drawn.
    """

    width: float
    height: float
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    lanes: tuple[Lane, ...]
    levels: tuple[Level, ...]
    bars: tuple[tuple[float, str], ...]
    edges_left_out: int
    members_left_out: int
    description: str
    node_width: float = NODE_WIDTH
    node_height: float = NODE_HEIGHT
    bar_height: float = BAR


@dataclass(frozen=True)
class _Layout:
    """Column and row of every member; rows count from the bottom."""

    columns: Mapping[str, int]
    rows: Mapping[str, int]
    lanes: Mapping[str, tuple[int, int]]
    """Role to (first column, number of columns)."""
    levels: Sequence[str]

    @property
    def width(self) -> float:
        return LEFT + STEP_X * sum(count for _, count in self.lanes.values()) + RIGHT

    @property
    def height(self) -> float:
        return HEAD + 2 * (BAR + GAP) + STEP_Y * (len(self.levels) - 1) + NODE_HEIGHT

    @property
    def output(self) -> float:
        """Lower edge of the output bar."""
        return HEAD + BAR

    @property
    def input(self) -> float:
        """Upper edge of the input bar."""
        return self.height - BAR

    def corner(self, name: str) -> tuple[float, float]:
        """Top left corner of a member."""
        x = LEFT + STEP_X * self.columns[name] + (STEP_X - NODE_WIDTH) / 2
        return round(x, 1), round(self.input - GAP - NODE_HEIGHT - STEP_Y * self.rows[name], 1)


def draw(circuit: Mapping[str, Any], unit: str = "") -> Drawing:
    """Geometry of summary.circuit; effects are in `unit`. Deterministic: the same circuit looks the same."""
    inner = [member for member in circuit["members"] if member["kind"] != "embed"]
    members = sorted(inner, key=lambda member: -abs(member["effect"]["estimate"] or 0.0))[:MOST_NODES]
    layout = _layout(members)
    drawn = {member["component"] for member in members} | {"embed", "logits"}
    known = [edge for edge in circuit["edges"] if {edge["source"], edge["target"]} <= drawn]
    edges = sorted(known, key=lambda edge: -abs(edge["weight"]))[:MOST_EDGES]
    strongest = max((abs(edge["weight"]) for edge in edges), default=1.0) or 1.0
    colours = role_colours(circuit["members"])
    return Drawing(
        max(layout.width, NARROWEST),
        layout.height,
        tuple(_node(member, layout, colours, unit) for member in members),
        tuple(_edge(edge, layout, strongest) for edge in reversed(edges)),
        tuple(_lane(role, place, colours) for role, place in layout.lanes.items()),
        _levels(members, layout),
        ((layout.input, _input_words(circuit["members"], unit)), (layout.output - BAR, "output: the answer's logits")),
        len(circuit["edges"]) - len(edges),
        len(inner) - len(members),
        _words(circuit, colours),
    )


def role_colours(members: Sequence[Member]) -> dict[str, int | None]:
    """Colour number per role, in order of first appearance up the layers; "no role fits" and too many roles: None."""
    named = [role for role in dict.fromkeys(m["role"] for m in sorted(members, key=_forward)) if role != NO_ROLE]
    return {NO_ROLE: None} | {role: index if index < COLOURS else None for index, role in enumerate(named)}


def _forward(member: Member) -> tuple[int, bool, int]:
    # A layer's MLP comes after its heads.
    return -1 if member["layer"] is None else member["layer"], member["kind"] == "mlp", member["head"] or 0


def _layout(members: Sequence[Member]) -> _Layout:
    ordered = sorted(members, key=_forward)
    levels = list(dict.fromkeys(_forward(member)[:2] for member in ordered))
    rows = {member["component"]: levels.index(_forward(member)[:2]) for member in ordered}
    columns: dict[str, int] = {}
    lanes: dict[str, tuple[int, int]] = {}
    start = 0
    # Lanes in the order of the forward pass: the drawing then runs from the lower left to the upper right.
    for alike in sorted(_by_role(ordered), key=lambda found: sum(rows[m["component"]] for m in found) / len(found)):
        wide = _columns_needed([rows[member["component"]] for member in alike])
        columns |= {member["component"]: start + index % wide for index, member in enumerate(alike)}
        lanes[alike[0]["role"]] = (start, wide)
        start += wide
    return _Layout(columns, rows, lanes, [f"layer {layer}" for layer, _ in levels])


def _by_role(members: Sequence[Member]) -> list[list[Member]]:
    roles = dict.fromkeys(member["role"] for member in members)
    return [[member for member in members if member["role"] == role] for role in roles]


def _columns_needed(rows: Sequence[int]) -> int:
    """Enough that no two members of one row share a place, and no lane is a tall tower."""
    return max(math.ceil(len(rows) / PER_COLUMN), max(rows.count(row) for row in rows))


def _node(member: Member, layout: _Layout, colours: Mapping[str, int | None], unit: str) -> Node:
    x, y = layout.corner(member["component"])
    said, effect = component(member["component"]), number(member["effect"]["estimate"], unit)
    title = f"{said}: {member['role']}. Effect {effect}. {member['description']}"
    return Node(
        x, y, said.removeprefix("head "), effect.replace(" ", ""), colours[member["role"]], member["suppresses"], title
    )


def _lane(role: str, place: tuple[int, int], colours: Mapping[str, int | None]) -> Lane:
    first, count = place
    return Lane(LEFT + STEP_X * first, STEP_X * count, _two_lines(role, 16 * count), colours[role])


def _two_lines(text: str, room: int) -> tuple[str, ...]:
    if len(text) <= room:
        return (text,)
    cut = text.rfind(" ", 0, room + 1)
    first, second = (text[:cut], text[cut + 1 :]) if cut > 0 else (text[:room], text[room:])
    return first, second if len(second) <= room else second[: room - 1] + "…"


def _levels(members: Sequence[Member], layout: _Layout) -> tuple[Level, ...]:
    tops = {layout.rows[member["component"]]: layout.corner(member["component"])[1] for member in members}
    shown = [row for row, text in enumerate(layout.levels) if row == 0 or layout.levels[row - 1] != text]
    return tuple(Level(tops[row] + NODE_HEIGHT / 2, layout.levels[row]) for row in shown)


def _edge(edge: Mapping[str, Any], layout: _Layout, strongest: float) -> Edge:
    weight = edge["weight"]
    title = f"{component(edge['source'])} → {component(edge['target'])}: {number(weight)}"
    return Edge(_path(edge, layout), round(0.7 + 5.3 * abs(weight) / strongest, 2), weight < 0, title)


def _path(edge: Mapping[str, Any], layout: _Layout) -> str:
    """From input and to output through the gutters beside the columns, so that no other node lies on the way."""
    source, target = edge["source"], edge["target"]
    if source == "embed" and target == "logits":
        return f"M{LEFT} {layout.input}V{layout.output}"
    if source == "embed":
        x, y = layout.corner(target)
        gutter, middle = x - 4 - 2.5 * (layout.rows[target] % 4), y + NODE_HEIGHT / 2
        return f"M{gutter} {layout.input}V{middle + 9}Q{gutter} {middle} {x} {middle}"
    if target == "logits":
        x, y = layout.corner(source)
        right, middle = x + NODE_WIDTH, y + NODE_HEIGHT / 2
        gutter = right + 4 + 2.5 * (layout.rows[source] % 4)
        return f"M{right} {middle}Q{gutter} {middle} {gutter} {middle - 9}V{layout.output}"
    return _between(layout.corner(source), layout.corner(target))


def _between(source: tuple[float, float], target: tuple[float, float]) -> str:
    x0, y0 = source[0] + NODE_WIDTH / 2, source[1]
    x1, y1 = target[0] + NODE_WIDTH / 2, target[1] + NODE_HEIGHT
    bend = round(max(abs(y0 - y1) * 0.4, 12.0), 1)
    # Edges within a column bow out into the gutter; straight ones would run behind the nodes between.
    bow = 78.0 if x0 == x1 and y0 - y1 > STEP_Y else 0.0
    return f"M{x0} {y0}C{x0 - bow} {round(y0 - bend, 1)} {x1 - bow} {round(y1 + bend, 1)} {x1} {y1}"


def _input_words(members: Sequence[Member], unit: str) -> str:
    found = next((member for member in members if member["kind"] == "embed"), None)
    if found is None:
        return "input: the embedding"
    return f"input: the embedding (member, {number(found['effect']['estimate'], unit)})"


def _words(circuit: Mapping[str, Any], roles: Mapping[str, int | None]) -> str:
    tally = {role: sum(member["role"] == role for member in circuit["members"]) for role in roles}
    counts = ", ".join(f"{count} {role}" for role, count in tally.items() if count)
    return f"Circuit of {len(circuit['members'])} parts and {len(circuit['edges'])} edges, layers upward: {counts}."
