"""Layer x head heatmap of effects, with a row for the MLPs and a column for the embedding; one per condition.

It is a table and not a drawing: every cell has its row's and its column's header, for screen readers and for the
arrow keys, and its number as text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vesalius.errors import InputError
from vesalius.report.scales import LEVELS, Scale, diverging
from vesalius.report.words import SHARE, component, estimate, number
from vesalius.site import Site

RANKED = 12
MOST_NUMBERED = 36
"""Layers up to which a cell is wide enough for its number."""
STEP_WIDTH = 16.0
INPUT = "input"


@dataclass(frozen=True)
class Cell:
    """One component: its number, colour class, what the pointer shows, and the marks drawn on it.

    silent: its number rounds to zero and is there for screen readers only.
    """

    text: str
    colour: str
    silent: bool
    title: str
    conflict: bool
    member: bool


@dataclass(frozen=True)
class Line:
    """A row of the table: a head of every layer, or their MLPs. None where there is no such component."""

    name: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Row:
    """One component in the ranking: effect with interval, spread over prompts, share of flipped signs."""

    component: str
    effect: Mapping[str, Any]
    sd: float | None
    sign_flips: float | None
    q: float | None
    conflict: bool
    member: bool


@dataclass(frozen=True)
class Heatmap:
    """One condition's heatmap, and its ranking by size of effect. columns: "input", then the layers."""

    corruption: str
    direction: str
    limit: float
    unit: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    ranking: tuple[Row, ...]
    description: str

    @property
    def numbered(self) -> bool:
        """Whether there is room for numbers in the cells."""
        return len(self.columns) <= MOST_NUMBERED

    @property
    def legend(self) -> list[str]:
        """Colour classes from the strongest suppression (-limit) over 0 to the strongest help (limit)."""
        return [diverging(sign * _middle(step) * self.limit, self.limit) for sign, step in _STEPS]

    @property
    def legend_ticks(self) -> list[tuple[float, float]]:
        """(pixel, value) under the legend, each class of which is `STEP_WIDTH` wide."""
        width = STEP_WIDTH * len(_STEPS)
        return Scale(-self.limit, self.limit, STEP_WIDTH / 2, width - STEP_WIDTH / 2, root=True).ticks(5)


_STEPS = [(-1, step) for step in range(LEVELS, 0, -1)] + [(1, step) for step in range(LEVELS + 1)]


def _middle(step: int) -> float:
    return (step / LEVELS) ** 2


def heatmaps(effects: Mapping[str, Any], members: Collection[str]) -> list[Heatmap]:
    """One heatmap per condition, all on one colour scale, so that switching between them compares.

    Components that are no head, MLP or other site of a layer stand in the ranking only.
    """
    sites = [_site(name) for name in effects["components"]]
    # The largest effect of all has the deepest colour: a scale that stopped earlier would hide how much larger it is.
    means = [abs(value) for condition in effects["conditions"] for value in condition["mean"] if value is not None]
    limit = max(means, default=0.0) or 1.0
    return [_heatmap(effects, condition, sites, limit, members) for condition in effects["conditions"]]


def _site(name: str) -> Site | None:
    try:
        return Site.parse(name)
    except InputError:
        return None


@dataclass(frozen=True, order=True)
class _Line:
    """Where a row stands: heads by number, then the MLPs, then whatever else occurs; a second stack under the first."""

    stack: str
    group: int
    head: int
    kind: str

    @property
    def name(self) -> str:
        """What stands at its left."""
        return f"{self.stack} {(f'head {self.head}', 'MLP', self.kind)[self.group]}".strip()


def _place(site: Site | None) -> tuple[_Line, str] | None:
    """Row and column of the table."""
    if site is not None and site.kind == "embed":
        return _Line(site.stack, 1, 0, "mlp_out"), INPUT
    if site is None or site.layer is None:
        return None
    if site.kind == "z" and site.index is not None:
        return _Line(site.stack, 0, site.index, "z"), str(site.layer)
    return _Line(site.stack, 1 if site.kind == "mlp_out" else 2, 0, site.kind), str(site.layer)


def _heatmap(
    effects: Mapping[str, Any],
    condition: Mapping[str, Any],
    sites: Sequence[Site | None],
    limit: float,
    members: Collection[str],
) -> Heatmap:
    rows = [_ranked(index, effects, condition, members) for index in range(len(sites))]
    columns = _columns(sites)
    cells = {
        place: _cell(row, limit, effects["unit"])
        for row, site in zip(rows, sites, strict=True)
        if (place := _place(site)) is not None
    }
    lines = [
        Line(line.name, tuple(cells.get((line, column)) for column in columns))
        for line in sorted({line for line, _ in cells})
    ]
    ranking = sorted((row for row in rows if row.effect["estimate"] is not None), key=_size, reverse=True)[:RANKED]
    return Heatmap(
        condition["corruption"],
        condition["direction"],
        limit,
        effects["unit"],
        columns,
        tuple(lines),
        tuple(ranking),
        _description(condition, ranking, effects["unit"]),
    )


def _columns(sites: Sequence[Site | None]) -> tuple[str, ...]:
    # Every layer has a column, also one of which nothing was patched: gaps are seen as gaps.
    layers = 1 + max((site.layer for site in sites if site is not None and site.layer is not None), default=-1)
    outside = [INPUT] if any(site is not None and site.kind == "embed" for site in sites) else []
    return (*outside, *map(str, range(layers)))


def _size(row: Row) -> float:
    return abs(row.effect["estimate"])


def _ranked(index: int, effects: Mapping[str, Any], condition: Mapping[str, Any], members: Collection[str]) -> Row:
    name = effects["components"][index]
    found = {"estimate": condition["mean"][index], "low": condition["low"][index], "high": condition["high"][index]}
    return Row(
        name,
        found,
        condition["sd"][index],
        condition["sign_flips"][index],
        condition["q"][index],
        name in effects["sign_conflicts"],
        name in members,
    )


def _cell(row: Row, limit: float, unit: str) -> Cell:
    mean = row.effect["estimate"]
    notes = ("in the circuit" if row.member else "", "sign differs between conditions" if row.conflict else "")
    title = "; ".join([f"{component(row.component)}: {estimate(row.effect, unit)}", *filter(None, notes)])
    text = _short(mean, unit)
    return Cell(text, diverging(mean, limit), text == "0", title, row.conflict, row.member)


def _short(value: float | None, unit: str) -> str:
    """Two digits at most, for a narrow cell; shares in per cent without the sign for it."""
    if value is None:
        return number(None)
    shown = 100 * value if unit.startswith(SHARE) else value
    text = f"{shown:.0f}" if unit.startswith(SHARE) or abs(shown) >= 10 else f"{shown:.1f}"
    return ("0" if float(text) == 0 else text).replace("-", "−")


def _description(condition: Mapping[str, Any], ranking: Sequence[Row], unit: str) -> str:
    top = ", ".join(f"{component(row.component)} {number(row.effect['estimate'], unit)}" for row in ranking[:5])
    return f"Effects under {condition['corruption']}, {condition['direction']}. Largest: {top}."
