"""Layer x head heatmap of effects, with a row for the MLPs and a column for the embedding; one per condition."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vesalius.report.scales import LEVELS, diverging, nice
from vesalius.report.words import component, estimate, number
from vesalius.site import Site

WIDTH, LEFT, TOP, GAP = 1080.0, 64.0, 26.0, 7.0
RANKED = 12


@dataclass(frozen=True)
class Cell:
    """One component: place, colour class, what the pointer shows, and the marks drawn on it."""

    x: float
    y: float
    colour: str
    title: str
    suppresses: bool
    conflict: bool
    member: bool


@dataclass(frozen=True)
class Label:
    """Text at a place."""

    x: float
    y: float
    text: str


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
    """Geometry of one condition's heatmap, and its ranking by size of effect."""

    corruption: str
    direction: str
    width: float
    height: float
    cell_width: float
    cell_height: float
    limit: float
    unit: str
    cells: tuple[Cell, ...]
    layers: tuple[Label, ...]
    rows: tuple[Label, ...]
    ranking: tuple[Row, ...]
    description: str

    @property
    def legend(self) -> list[str]:
        """Colour classes from the strongest suppression (-limit) over 0 to the strongest help (limit)."""
        return [diverging(step / LEVELS * self.limit, self.limit) for step in range(-LEVELS, LEVELS + 1)]


@dataclass(frozen=True)
class _Grid:
    columns: int
    heads: int
    names: tuple[str, ...]
    """Rows under the heads: MLP, then whatever else occurs."""
    cell_width: float
    cell_height: float

    def place(self, site: Site) -> tuple[float, float]:
        column = 0 if site.layer is None else site.layer + 1
        x = LEFT + column * self.cell_width + (GAP if column else 0)
        if site.kind == "z" and site.index is not None:
            return x, TOP + site.index * self.cell_height
        return x, TOP + (GAP if self.heads else 0) + (self.heads + self.names.index(_row(site))) * self.cell_height

    @property
    def height(self) -> float:
        return TOP + GAP + (self.heads + len(self.names)) * self.cell_height + 26


def heatmaps(effects: Mapping[str, Any], members: Collection[str]) -> list[Heatmap]:
    """One heatmap per condition, all on one colour scale, so that switching between them compares."""
    sites = [Site.parse(name) for name in effects["components"]]
    grid, limit = _grid(sites), _limit(effects["conditions"], sites)
    return [_heatmap(effects, condition, sites, grid, limit, members) for condition in effects["conditions"]]


def _limit(conditions: Sequence[Mapping[str, Any]], sites: Sequence[Site]) -> float:
    # The embedding and the first MLP carry nearly everything; on their scale no head could be seen.
    inner = [index for index, site in enumerate(sites) if site.layer is not None] or range(len(sites))
    means = (found["mean"][index] for found in conditions for index in inner)
    sizes = sorted(abs(value) for value in means if value is not None)
    return nice(sizes[int(0.985 * (len(sizes) - 1))]) if sizes and sizes[-1] > 0 else 1.0


def _grid(sites: Sequence[Site]) -> _Grid:
    columns = 2 + max((site.layer for site in sites if site.layer is not None), default=0)
    heads = 1 + max((site.index for site in sites if site.kind == "z" and site.index is not None), default=-1)
    names = dict.fromkeys(_row(site) for site in sorted(sites, key=_row_order) if not _is_head(site))
    width = min(36.0, (WIDTH - LEFT - GAP - 4) / columns)
    height = min(28.0, max(9.0, min(width * 0.8, 620 / max(heads, 1))))
    return _Grid(columns, heads, tuple(names), round(width, 2), round(height, 2))


def _is_head(site: Site) -> bool:
    return site.kind == "z" and site.index is not None


def _row(site: Site) -> str:
    return "MLP" if site.kind in ("mlp_out", "embed") else site.kind


def _row_order(site: Site) -> tuple[bool, str]:
    return _row(site) != "MLP", _row(site)


def _heatmap(
    effects: Mapping[str, Any],
    condition: Mapping[str, Any],
    sites: Sequence[Site],
    grid: _Grid,
    limit: float,
    members: Collection[str],
) -> Heatmap:
    rows = [_ranked(index, effects, condition, members) for index in range(len(sites))]
    cells = tuple(_cell(row, site, grid, limit, effects["unit"]) for row, site in zip(rows, sites, strict=True))
    ranking = sorted((row for row in rows if row.effect["estimate"] is not None), key=_size, reverse=True)[:RANKED]
    return Heatmap(
        condition["corruption"],
        condition["direction"],
        round(LEFT + GAP + grid.columns * grid.cell_width + 4, 1),
        round(grid.height, 1),
        grid.cell_width,
        grid.cell_height,
        limit,
        effects["unit"],
        cells,
        _layer_labels(grid),
        _row_labels(grid),
        tuple(ranking),
        _description(condition, ranking, effects["unit"]),
    )


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


def _cell(row: Row, site: Site, grid: _Grid, limit: float, unit: str) -> Cell:
    x, y = grid.place(site)
    mean = row.effect["estimate"]
    notes = ("in the circuit" if row.member else "", "sign differs between conditions" if row.conflict else "")
    title = "; ".join([f"{component(row.component)}: {estimate(row.effect, unit)}", *filter(None, notes)])
    suppresses = mean is not None and mean <= -0.15 * limit
    return Cell(round(x, 1), round(y, 1), diverging(mean, limit), title, suppresses, row.conflict, row.member)


def _layer_labels(grid: _Grid) -> tuple[Label, ...]:
    every = 1 if grid.cell_width >= 18 else 2 if grid.cell_width >= 11 else 5
    middle = LEFT + GAP + 1.5 * grid.cell_width
    shown = range(0, grid.columns - 1, every)
    outside = Label(round(LEFT + 0.5 * grid.cell_width, 1), TOP - 8, "emb")
    return (outside, *(Label(round(middle + layer * grid.cell_width, 1), TOP - 8, str(layer)) for layer in shown))


def _row_labels(grid: _Grid) -> tuple[Label, ...]:
    every = 1 if grid.cell_height >= 11 else 4
    middle = TOP + 0.5 * grid.cell_height + 4
    heads = [
        Label(LEFT - 8, round(middle + head * grid.cell_height, 1), f"head {head}")
        for head in range(0, grid.heads, every)
    ]
    start = middle + (GAP if grid.heads else 0) + grid.heads * grid.cell_height
    rest = [Label(LEFT - 8, round(start + i * grid.cell_height, 1), name) for i, name in enumerate(grid.names)]
    return (*heads, *rest)


def _description(condition: Mapping[str, Any], ranking: Sequence[Row], unit: str) -> str:
    top = ", ".join(f"{component(row.component)} {number(row.effect['estimate'], unit)}" for row in ranking[:5])
    return f"Effects under {condition['corruption']}, {condition['direction']}. Largest: {top}."
