"""The edges of a circuit's drawing: which are shown at first, where they run, and what stands for a hub's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vesalius.report.circuit_layout import EMBED, LOGITS, NODE_HEIGHT, NODE_WIDTH, OUTER, Layout, Point
from vesalius.report.words import component, number

MOST_EDGES = 800
SHOWN = 0.8
"""Share of the total absolute weight that the edges carry which are shown at first."""
HUB, HUB_LEAST, HUB_SURE = 0.6, 8, 24
"""A hub has edges shown to this share of the parts, but to at least (and at most need have) this many."""
HUB_LETTERS = "abc"


@dataclass(frozen=True)
class Edge:
    """A curve from source to target. ends: their numbers in the table of parts ("in" and "out": input and output).

    tip: an arrowhead, or a bar across when the source works against the target. width in pixels follows |weight|.
    rank: 1 for the strongest. weak: not shown at first. hub: drawn only when one of its ends is selected.
    """

    path: str
    tip: str
    width: float
    ends: tuple[str, str]
    weight: float
    rank: int
    weak: bool
    hub: bool
    title: str

    @property
    def negative(self) -> bool:
        """Whether the source works against the target."""
        return self.weight < 0


@dataclass(frozen=True)
class Letter:
    """A hub's letter at a part that it acts on, in place of the edge."""

    x: float
    y: float
    rank: int
    weak: bool


@dataclass(frozen=True)
class Hub:
    """A part that acts on most others."""

    letter: str
    name: str
    places: tuple[Letter, ...]


def lay_edges(edges: Sequence[Mapping[str, Any]], layout: Layout, numbers: Mapping[str, int]) -> list[Edge]:
    """Geometry of as many edges as can be drawn, strongest first; numbers: of every member in the table of parts."""
    found = sorted(edges, key=lambda edge: -abs(edge["weight"]))
    weights = [abs(edge["weight"]) for edge in found]
    few, weak = found[:MOST_EDGES], _first_weak(weights)
    hubs = hub_names(few[:weak], len(layout.rows))
    starts, ends = _ports(few, "source", "target", layout), _ports(few, "target", "source", layout)
    drawn = []
    for index, edge in enumerate(few):
        first, last = _ends(edge, starts[index], ends[index], layout)
        drawn.append(
            Edge(
                layout.curve(edge["source"], edge["target"], first, last),
                _tip(edge, last, layout),
                round(0.8 + 3.2 * weights[index] / (weights[0] or 1.0), 2),
                (_end(edge["source"], numbers), _end(edge["target"], numbers)),
                edge["weight"],
                index + 1,
                index >= weak,
                edge["source"] in hubs,
                f"{component(edge['source'])} → {component(edge['target'])}: {number(edge['weight'])}",
            )
        )
    return drawn


def _first_weak(weights: Sequence[float]) -> int:
    """How many of the strongest edges it takes to carry the share that is shown."""
    # Rounding must not add an edge where a sum is that share exactly.
    carried, wanted = 0.0, SHOWN * sum(weights) * (1 - 1e-9)
    for index, weight in enumerate(weights):
        if carried >= wanted:
            return index
        carried += weight
    return len(weights)


def hub_names(edges: Sequence[Mapping[str, Any]], members: int) -> list[str]:
    """Parts that act on most others, by number of edges. Their lines would hide everything else."""
    sources = [edge["source"] for edge in edges if edge["source"] != EMBED]
    counts = {name: sources.count(name) for name in dict.fromkeys(sources)}
    least = min(max(HUB_LEAST, HUB * members), HUB_SURE)
    found = [name for name, count in counts.items() if count >= least]
    return sorted(found, key=lambda name: -counts[name])[: len(HUB_LETTERS)]


def find_hubs(edges: Sequence[Edge], layout: Layout, numbers: Mapping[str, int]) -> list[Hub]:
    """The hubs among the sources of the edges, with the places of their letters."""
    by_number = {str(number): name for name, number in numbers.items()}
    hubs = []
    for index, source in enumerate(dict.fromkeys(edge.ends[0] for edge in edges if edge.hub)):
        places = []
        for edge in edges:
            if edge.ends[0] == source and edge.ends[1] in by_number:
                # At the lower left corner, where lines come in least; a second hub's letter beside the first's.
                x, y = layout.corner(by_number[edge.ends[1]])
                places.append(Letter(x + 1 + 13 * index, y + NODE_HEIGHT, edge.rank, edge.weak))
        hubs.append(Hub(HUB_LETTERS[index], component(by_number[source]), tuple(places)))
    return hubs


def _end(name: str, numbers: Mapping[str, int]) -> str:
    return {EMBED: "in", LOGITS: "out"}.get(name) or str(numbers[name])


def _ports(edges: Sequence[Mapping[str, Any]], side: str, other: str, layout: Layout) -> dict[int, float]:
    """Horizontal place per edge where it leaves (or enters) its node: side by side."""
    places: dict[int, float] = {}
    for name in dict.fromkeys(edge[side] for edge in edges):
        mine = [index for index, edge in enumerate(edges) if edge[side] == name]
        # In the order of the far ends, so that lines of one node do not cross right where they leave it.
        mine.sort(key=lambda index: (layout.middle(edges[index][other]), index))
        room = NODE_WIDTH - 2 * OUTER
        for place, index in enumerate(mine):
            places[index] = round(layout.middle(name) + room * ((place + 0.5) / len(mine) - 0.5), 1)
    return places


def _ends(edge: Mapping[str, Any], start: float, end: float, layout: Layout) -> tuple[Point, Point]:
    """Where an edge begins and ends; at input and output, which are bars, right below or above its other end."""
    source, target = edge["source"], edge["target"]
    first = (end if target in layout.rows else start, layout.input)
    if source in layout.rows:
        first = (start, layout.corner(source)[1])
    if target not in layout.rows:
        return first, (first[0], layout.output + 1)
    top = layout.corner(target)[1]
    return first, (end, top - 1 if layout.beside(source, target) else top + NODE_HEIGHT + 1)


def _tip(edge: Mapping[str, Any], last: Point, layout: Layout) -> str:
    x, y = last
    size = round(3.2 + 1.2 * min(abs(edge["weight"]), 1.0), 1)
    if edge["weight"] < 0:
        return f"M{x - size:g} {y:g}h{2 * size:g}"
    # Within a layer an edge comes from above.
    long = -1.7 * size if layout.beside(edge["source"], edge["target"]) else 1.7 * size
    return f"M{x:g} {y:g}l{-size:g} {long:.1f}h{2 * size:g}z"
