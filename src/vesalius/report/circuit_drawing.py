"""The circuit as a graph: parts coloured by their effect, under the names of their roles, with their edges."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vesalius.report.circuit_edges import Edge, Hub, find_hubs, lay_edges
from vesalius.report.circuit_layout import (
    BAR,
    EMBED,
    LOGITS,
    NODE_HEIGHT,
    NODE_WIDTH,
    Lane,
    Layout,
    Member,
    arrange,
    forward,
)
from vesalius.report.scales import diverging
from vesalius.report.words import NO_ROLE, component, number, short_component

MOST_NODES = 140
COLOURS = 8
"""Role colours in the style sheet (role-0 ... role-7); further roles share the grey of "no role fits"."""
KINDS = {"head": "heads", "mlp": "MLPs"}


@dataclass(frozen=True)
class Node:
    """One member: its number in the table of parts, top left corner, words, and how it is drawn.

    fill: colour class of its effect. colour: number of its role's colour (None: no role). letters: hubs that act on it.
    """

    number: int
    x: float
    y: float
    name: str
    effect: str
    fill: str
    colour: int | None
    suppresses: bool
    uncertain: bool
    title: str


@dataclass(frozen=True)
class Heading:
    """The name over a lane, in lines."""

    lane: Lane
    lines: tuple[str, ...]
    colour: int | None


@dataclass(frozen=True)
class Drawing:
    """All geometry of the drawing. levels: (y, text) of the layers. bars: (y, text) of input and output.

    total: absolute weight of all edges. `edges_left_out` were weaker, and `members_left_out` had smaller effects, than
    what can be shown.
    """

    width: float
    height: float
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    hubs: tuple[Hub, ...]
    headings: tuple[Heading, ...]
    levels: tuple[tuple[float, str], ...]
    bars: tuple[tuple[float, str], ...]
    total: float
    edges_left_out: int
    members_left_out: int
    description: str
    node_width: float = NODE_WIDTH
    node_height: float = NODE_HEIGHT
    bar_height: float = BAR

    @property
    def shown(self) -> list[Edge]:
        """The edges shown at first."""
        return [edge for edge in self.edges if not edge.weak]


def draw(circuit: Mapping[str, Any], numbers: Mapping[str, int], unit: str = "", limit: float = 1.0) -> Drawing:
    """Geometry of summary.circuit. Deterministic: the same circuit looks the same.

    numbers: of every member in the table of parts. Effects are in `unit`; `limit` is the largest that has a colour.
    """
    # The embedding is the bar at the bottom, whether it is a member or not.
    inner = [member for member in circuit["members"] if member["component"] != EMBED]
    members = sorted(inner, key=lambda member: -abs(member["effect"]["estimate"] or 0.0))[:MOST_NODES]
    layout, colours = arrange(members), role_colours(circuit["members"])
    known = [edge for edge in circuit["edges"] if {edge["source"], edge["target"]} <= {*layout.rows, EMBED, LOGITS}]
    edges = lay_edges(known, layout, numbers)
    levels = [
        (layout.row_top(row) + NODE_HEIGHT / 2, "" if layer is None else f"layer {layer}")
        for row, layer in enumerate(layout.layers)
    ]
    return Drawing(
        layout.width,
        layout.height,
        tuple(_node(member, layout, numbers, colours, unit, limit) for member in members),
        # The strongest last, so that they are drawn over the others.
        tuple(reversed(edges)),
        tuple(find_hubs(edges, layout, numbers)),
        tuple(_heading(lane, colours) for lane in layout.lanes),
        tuple(levels),
        ((layout.input, _input_words(circuit["members"], unit)), (layout.output - BAR, "output: the answer's logits")),
        sum(abs(edge["weight"]) for edge in known),
        len(circuit["edges"]) - len(edges),
        len(inner) - len(members),
        _words(circuit, colours),
    )


def role_colours(members: Sequence[Member]) -> dict[str, int | None]:
    """Colour number per role, in order of first appearance up the layers; "no role fits" and too many roles: None."""
    named = [role for role in dict.fromkeys(m["role"] for m in sorted(members, key=forward)) if role != NO_ROLE]
    return {NO_ROLE: None} | {role: index if index < COLOURS else None for index, role in enumerate(named)}


def _node(
    member: Member,
    layout: Layout,
    numbers: Mapping[str, int],
    colours: Mapping[str, int | None],
    unit: str,
    limit: float,
) -> Node:
    x, y = layout.corner(member["component"])
    value = member["effect"]["estimate"]
    effect = number(value, unit)
    doubt = ", which may be zero" if member["uncertain"] else ""
    return Node(
        numbers[member["component"]],
        x,
        y,
        short_component(member["component"]),
        # A box is narrow: "27%", while text elsewhere has the space.
        effect.replace(" ", ""),
        diverging(value, limit),
        colours[member["role"]],
        member["suppresses"],
        member["uncertain"],
        f"{component(member['component'])}: {member['role']}; effect {effect}{doubt}",
    )


def _heading(lane: Lane, colours: Mapping[str, int | None]) -> Heading:
    name = f"no role: {KINDS.get(lane.kind, lane.kind)}" if lane.role == NO_ROLE else lane.role
    # About what fits into one column: a long name may come closer to its neighbours, or it would not fit at all.
    room = (9 if len(name) <= 20 else 11) * lane.count
    return Heading(lane, _in_lines(name, room), colours[lane.role])


def _in_lines(text: str, room: int, most: int = 4) -> tuple[str, ...]:
    """At most `most` lines of about `room` characters, broken between words; the last is cut when that is too few."""
    lines: list[str] = []
    # Long words may break at a hyphen.
    for word in re.sub(r"-(?=\w)", "- ", text).split() if max(map(len, text.split())) > room else text.split():
        if lines and len(lines[-1]) + 1 + len(word) <= room:
            lines[-1] += word if lines[-1].endswith("-") else " " + word
        else:
            lines.append(word)
    kept = [line if len(line) <= room + 2 else line[: room + 1] + "…" for line in lines[:most]]
    return (*kept[:-1], kept[-1] + "…") if len(lines) > most else tuple(kept)


def _input_words(members: Sequence[Member], unit: str) -> str:
    found = next((member for member in members if member["component"] == EMBED), None)
    if found is None:
        return "input: the embedding"
    return f"input: the embedding (member, {number(found['effect']['estimate'], unit)})"


def _words(circuit: Mapping[str, Any], roles: Mapping[str, int | None]) -> str:
    tally = {role: sum(member["role"] == role for member in circuit["members"]) for role in roles}
    counts = ", ".join(f"{count} {role}" for role, count in tally.items() if count)
    return f"Circuit of {len(circuit['members'])} parts and {len(circuit['edges'])} edges, layers upward: {counts}."
