"""Edits of a replay: which rows, positions and heads of a site get which values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vesalius.parts import Part
from vesalius.site import Site


@runtime_checkable
class Source(Protocol):
    """Where new values come from: a whole site's tensor [example or 1, pos or 1, ...]."""

    def at(self, site: Site) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Table:
    """Edits of one site. row, index (-1: the whole site), donor (example that gives the value), first, stop: [edit].

    part: what writes the values, which are then its own; None: they are the site's. adds: they are added to what is
    there.
    """

    site: Site
    source: Source
    row: Int[Tensor, " edit"]
    index: Int[Tensor, " edit"]
    donor: Int[Tensor, " edit"]
    first: Int[Tensor, " edit"]
    stop: Int[Tensor, " edit"]
    part: Part | None = None
    adds: bool = False

    def take(self, new_row: Int[Tensor, " row"]) -> Table:
        """The edits of some rows, renumbered: new_row[old] is the new number or -1."""
        row = new_row[self.row]
        keep = row >= 0
        return replace(
            self, row=row[keep], index=self.index[keep], donor=self.donor[keep], first=self.first[keep],
            stop=self.stop[keep],
        )  # fmt: skip


@runtime_checkable
class Place(Protocol):
    """Where rows lie in a flattened batch."""

    offset: Tensor

    @property
    def rows(self) -> Span: ...


@runtime_checkable
class Span(Protocol):
    """Live positions of each row: start <= p < end."""

    @property
    def start(self) -> Tensor: ...

    @property
    def end(self) -> Tensor: ...


class Edits:
    """Tables by site, applied in the order given."""

    def __init__(self, tables: Iterable[Table]) -> None:
        self._tables: dict[Site, list[Table]] = {}
        for table in tables:
            if len(table.row):
                self._tables.setdefault(table.site, []).append(table)

    @property
    def sites(self) -> list[Site]:
        return list(self._tables)

    def take(self, new_row: Int[Tensor, " row"]) -> Edits:
        return Edits(table.take(new_row) for tables in self._tables.values() for table in tables)

    def overwritten(self, site: Site, rows: Span, units: int) -> Bool[Tensor, " row"]:
        """Rows whose tensor at a site is overwritten at every live position: as a whole, or all its `units`."""
        count = len(rows.start)
        whole, pieces = torch.zeros(count, dtype=torch.bool), [torch.zeros(0, dtype=torch.long)]
        for table in self._tables.get(site, ()):
            full = (table.first <= rows.start[table.row]) & (table.stop >= rows.end[table.row])
            if table.part is None and not table.adds:
                whole[table.row[full & (table.index < 0)]] = True
                unit = full & (table.index >= 0)
                pieces.append(table.row[unit] * units + table.index[unit])
        distinct = torch.cat(pieces).unique() // units
        return whole | (distinct.bincount(minlength=count) >= units)

    def apply(self, site: Site, tensor: Tensor, place: Place) -> Tensor:
        """The flattened tensor [1, token, ...] with this site's edits; the same object when there are none."""
        tables = self._tables.get(site)
        if not tables:
            return tensor
        tensor = tensor.clone()
        for table in tables:
            _write(table, tensor, place)
        return tensor


def _write(table: Table, tensor: Tensor, place: Place) -> None:
    rows = place.rows
    first = torch.maximum(table.first, rows.start[table.row])
    count = (torch.minimum(table.stop, rows.end[table.row]) - first).clamp_min(0)
    edit = torch.repeat_interleave(torch.arange(len(count)), count)
    pos = torch.arange(len(edit)) - (count.cumsum(0) - count)[edit] + first[edit]
    row, index, donor = table.row[edit], table.index[edit], table.donor[edit]
    token = place.offset[row] + pos - rows.start[row]
    values = table.source.at(table.site)
    example = donor if values.shape[0] > 1 else torch.zeros_like(donor)
    at = pos if values.shape[1] > 1 else torch.zeros_like(pos)
    if table.part is not None:
        present = tensor[:, token]
        value = values[example, at][None]
        tensor[:, token] = table.part.write(present, table.part.read(present) + value if table.adds else value)
        return
    whole = index < 0
    if bool(whole.any()):
        _put(tensor, (token[whole],), values[example[whole], at[whole]], table.adds)
    if not bool(whole.all()):
        part = ~whole
        _put(tensor, (token[part], index[part]), values[example[part], at[part], index[part]], table.adds)


def _put(tensor: Tensor, where: tuple[Tensor, ...], values: Tensor, adds: bool) -> None:
    """Write or add; no place is named twice in one table."""
    whole = tensor[0]
    whole[where] = (whole[where] + values if adds else values).to(tensor)


def sources(tensors: Mapping[Site, Tensor]) -> Source:
    """A Source from tensors by site."""
    return _Held(dict(tensors))


@dataclass(frozen=True, eq=False)
class _Held:
    tensors: Mapping[Site, Tensor]

    def at(self, site: Site) -> Tensor:
        return self.tensors[site]
