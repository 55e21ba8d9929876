"""Edits of a replay: which rows, positions and heads of a site get which values, and what all runs have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vesalius.errors import InputError
from vesalius.inputs import Tokens
from vesalius.intervention import Ablate, Freeze, Interchange, Intervention, Patch, joint, mask_of
from vesalius.model.products import COMPUTE
from vesalius.parts import Part, Unit
from vesalius.patching.record import Recording
from vesalius.patching.sources import Source
from vesalius.patching.targets import Variant, as_written, normal, normal_read, writes_at
from vesalius.site import Site

CONSTANT = (Ablate, Freeze, Interchange, Patch)
"""Interventions whose value is the same whatever else is edited."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Edited runs. example, layer, start, end: [row]; live positions are start <= p < end; end - 1 is read.

    What is planned (rows, masks, edits' places) is on the CPU, whatever the model's device, and is moved where it meets
    the model's tensors: sizes are read there without waiting for the device.
    """

    example: Int[Tensor, " row"]
    layer: Int[Tensor, " row"]
    start: Int[Tensor, " row"]
    end: Int[Tensor, " row"]

    def __len__(self) -> int:
        return len(self.example)

    @property
    def sizes(self) -> Int[Tensor, " row"]:
        return self.end - self.start

    def to(self, device: torch.device) -> Rows:
        """The same rows on a device."""
        return Rows(*(one.to(device) for one in (self.example, self.layer, self.start, self.end)))

    def take(self, index: Tensor) -> Rows:
        return Rows(self.example[index], self.layer[index], self.start[index], self.end[index])


@dataclass(eq=False)
class Flat:
    """Where each row's tokens lie in the flattened batch; rows are sorted by layer, so active rows are a prefix."""

    rows: Rows
    offset: Tensor = field(init=False)
    row_of: Tensor = field(init=False)
    pos_of: Tensor = field(init=False)

    def __post_init__(self) -> None:
        sizes = self.rows.sizes
        ends = sizes.cumsum(0)
        self.offset = ends - sizes
        self.row_of = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        self.pos_of = torch.arange(int(ends[-1])) - self.offset[self.row_of] + self.rows.start[self.row_of]

    def active(self, layer: int) -> tuple[int, int]:
        """Rows and tokens that have joined by this layer."""
        count = int((self.rows.layer <= layer).sum())
        return count, int(self.rows.sizes[:count].sum())


@dataclass(frozen=True, eq=False)
class Table:
    """Edits of one site. row, index (-1: the whole site), example (that gives the value), first, stop: [edit].

    values: of the whole site [example or 1, pos or 1, ...], or of `parts` in their order. parts: what writes the
    values; () is the site itself. adds: they are added to what is there. base: for parts that write several sites, the
    run whose tensors they are written onto.
    """

    site: Site
    values: tuple[Tensor, ...]
    row: Int[Tensor, " edit"]
    index: Int[Tensor, " edit"]
    example: Int[Tensor, " edit"]
    first: Int[Tensor, " edit"]
    stop: Int[Tensor, " edit"]
    parts: tuple[Part, ...] = ()
    adds: bool = False
    base: Recording | None = None


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

    @cached_property
    def reads(self) -> tuple[Site, ...]:
        """Sites that have to be read in the replay, because parts are read there and written elsewhere."""
        parts = [part for tables in self._tables.values() for table in tables for part in table.parts]
        return tuple(dict.fromkeys(site for part in parts for site in read_again(part)))

    def overwritten(self, site: Site, rows: Rows, units: int) -> Bool[Tensor, " row"]:
        """Rows whose tensor at a site is overwritten at every live position: as a whole, or all its `units`."""
        count = len(rows.start)
        whole, pieces = torch.zeros(count, dtype=torch.bool), [torch.zeros(0, dtype=torch.long)]
        for table in self._tables.get(site, ()):
            full = (table.first <= rows.start[table.row]) & (table.stop >= rows.end[table.row])
            if not table.parts and not table.adds:
                whole[table.row[full & (table.index < 0)]] = True
                unit = full & (table.index >= 0)
                pieces.append(table.row[unit] * units + table.index[unit])
        # Distinct, because the same head may be edited twice: by the variant and by what all runs have in common.
        distinct = torch.cat(pieces).unique() // units
        return whole | (distinct.bincount(minlength=count) >= units)

    def apply(self, site: Site, tensor: Tensor, flat: Flat, read: Mapping[Site, Tensor]) -> Tensor:
        """The flattened tensor [1, token, ...] with this site's edits; the same object when there are none.

        read: flattened tensors at the sites of `reads`.
        """
        tables = self._tables.get(site)
        if not tables:
            return tensor
        tensor = tensor.clone()
        for table in tables:
            _write(table, tensor, flat, read)
        return tensor


def _write(table: Table, tensor: Tensor, flat: Flat, read: Mapping[Site, Tensor]) -> None:
    rows = flat.rows
    first = torch.maximum(table.first, rows.start[table.row])
    count = (torch.minimum(table.stop, rows.end[table.row]) - first).clamp_min(0)
    # Every edit's positions, one edit after the other: which edit, then how far into it.
    edit = torch.repeat_interleave(torch.arange(len(count)), count)
    pos = torch.arange(len(edit)) - (count.cumsum(0) - count)[edit] + first[edit]
    row, index, example = table.row[edit], table.index[edit], table.example[edit]
    token = flat.offset[row] + pos - rows.start[row]
    values = [_picked(values, example.to(values.device), pos.to(values.device)) for values in table.values]
    if table.parts:
        wanted = [] if table.base is not None else [site for part in table.parts for site in read_again(part)]
        token = token.to(tensor.device)
        here = {site: read[site][:, token] for site in wanted}
        tensor[:, token] = _given(table, tensor[:, token], here, rows.example[row], pos, values)
        return
    whole = index < 0
    if bool(whole.any()):
        _put(tensor, (token[whole],), values[0][whole], table.adds)
    if not bool(whole.all()):
        one = ~whole
        _put(tensor, (token[one], index[one]), values[0][one, index[one]], table.adds)


def _picked(values: Tensor, example: Tensor, pos: Tensor) -> Tensor:
    """[edit, ...] from values [example or 1, pos or 1, ...]."""
    row = example if values.shape[0] > 1 else torch.zeros_like(example)
    return values[row, pos if values.shape[1] > 1 else torch.zeros_like(pos)]


def _given(
    table: Table, present: Tensor, read: Mapping[Site, Tensor], example: Tensor, pos: Tensor, values: Sequence[Tensor]
) -> Tensor:
    """[1, token, ...] the site's tensor after the parts were given their values, one after the other.

    A part that writes several sites is written onto the base run, so that the same change reaches all of them.
    """
    base, named = table.base, _named(table)
    at = {named: present, **read}
    if base is not None:
        sites = {site.whole for part in table.parts for site in (*part.reads, *part.writes)}
        at = {site: base[site][example, pos][None] for site in sites}
    for part, value in zip(table.parts, values, strict=True):
        new = part.value(at) + value[None] if table.adds else value[None]
        at |= part.written(at, new)
    return at[named].to(present)


def _named(table: Table) -> Site:
    """The site as the parts name it: a layer's output is written as the next one's input."""
    return next(site.whole for site in table.parts[0].writes if normal(site)[0] == table.site)


def _put(tensor: Tensor, where: tuple[Tensor, ...], values: Tensor, adds: bool) -> None:
    """Write or add; no place is named twice in one table."""
    whole, where = tensor[0], tuple(index.to(tensor.device) for index in where)
    whole[where] = (whole[where] + values if adds else values).to(tensor)


def read_again(part: Part) -> list[Site]:
    """Whole sites that a replay has to read for a part, beside the one that it writes.

    A part of several sites is written onto the base run and needs no reading.
    """
    if joint(part):
        return []
    own = writes_at(part)
    return [site.whole for site in part.reads if normal_read(site) not in own]


def tables_of(
    base: Recording, variants: Sequence[Variant], source: Source, rows: Rows, number: Int[Tensor, " row"]
) -> list[Table]:
    """The edits of a batch, whose row i is of variant number[i]: one table per site for units, one per other part."""
    units: dict[Site, tuple[list[Tensor], list[Tensor]]] = {}
    parts: dict[tuple[Part, ...], list[Tensor]] = {}
    for variant_number in number.unique_consecutive().tolist():
        here = (number == variant_number).nonzero()[:, 0]
        together = variants[variant_number].parts
        for site, indices in _units_by_site(together).items():
            row_list, index_list = units.setdefault(site, ([], []))
            row_list.append(here.repeat_interleave(len(indices)))
            index_list.append(indices.repeat(len(here)))
        for group in _groups([part for part in together if not isinstance(part, Unit)]):
            parts.setdefault(group, []).append(here)
    # An edit at one position ends there, although everything after it is recomputed.
    one = torch.tensor([variants[n].position is not None for n in number.tolist()])
    stop = torch.where(one, rows.start + 1, rows.end)

    def table(
        site: Site, values: tuple[Tensor, ...], row: Tensor, index: Tensor, group: tuple[Part, ...] = ()
    ) -> Table:
        example = source.example[rows.example[row]]
        onto = base if any(map(joint, group)) else None
        return Table(site, values, row, index, example, rows.start[row], stop[row], group, source.adds, onto)

    found = [table(s, (source.tensor(s),), torch.cat(row), torch.cat(index)) for s, (row, index) in units.items()]
    for group, listed in parts.items():
        row, values = torch.cat(listed), tuple(source.of(part) for part in group)
        sites = dict.fromkeys(site for part in group for site in writes_at(part))
        found += [table(site, values, row, torch.full_like(row, -1), group) for site in sites]
    return found


def _groups(parts: Sequence[Part]) -> list[tuple[Part, ...]]:
    """Parts that are written one by one; those of several sites together, since they start from the same base run."""
    several = tuple(part for part in parts if joint(part))
    return [*((part,) for part in parts if not joint(part)), *([several] if several else [])]


def _units_by_site(parts: Sequence[Part]) -> dict[Site, Tensor]:
    grouped: dict[Site, list[int]] = {}
    for part in parts:
        if isinstance(part, Unit):
            site, index = normal(part.site)
            grouped.setdefault(site, []).append(index)
    return {site: torch.tensor(indices) for site, indices in grouped.items()}


@dataclass(frozen=True, eq=False)
class Fixed:
    """A part that keeps the base run's value at some positions in all edited runs. where: [example, pos]."""

    part: Part
    where: Bool[Tensor, "example pos"]

    def patch(self, base: Recording, example: Tensor, width: int | None) -> Patch:
        """The same as a hook, for some examples' run of this width."""
        part = as_written(self.part)
        return Patch(part, source=part.value(base)[example, :width], positions=self.where[example, :width])


@dataclass(frozen=True, eq=False)
class Setting:
    """What all edited runs of a sweep have in common.

    fixed: parts that keep the base run's value. patterns: attention patterns are the base run's, so that edits act
    through values alone. compute: "float32", or "bfloat16" for products with rounded factors.
    """

    fixed: tuple[Fixed, ...] = ()
    patterns: bool = False
    compute: str = "float32"

    def __post_init__(self) -> None:
        if self.compute not in COMPUTE:
            raise InputError(f"compute must be one of {', '.join(COMPUTE)}; got {self.compute!r}")


PLAIN = Setting()


def fixed_parts(given: Sequence[Intervention], tokens: Tokens) -> tuple[Fixed, ...]:
    """What interventions keep fixed. Raises InputError for one whose value depends on the run it is made in.

    The base run is recorded with them, and in a replay such a part is written with the base run's value, whatever the
    variant did before it: the same as the edit itself, as long as its value does not depend on the run.
    """
    found = []
    for edit in given:
        if not isinstance(edit, CONSTANT) or joint(edit.part):
            names = ", ".join(kind.__name__ for kind in CONSTANT)
            raise InputError(
                f"given= takes edits whose value does not depend on the run ({names}); {type(edit).__name__} of "
                f"{edit.part} does. Use Model.run for it"
            )
        writes_at(edit.part)
        mask = mask_of(edit.positions, tokens.real, tokens.named_positions)
        found.append(Fixed(edit.part, tokens.real if mask is None else mask & tokens.real))
    return tuple(found)


def fixed_tables(base: Recording, fixed: Sequence[Fixed], rows: Rows) -> list[Table]:
    """The fixed parts' edits in a batch: for every row that begins early enough, one per stretch of positions."""
    found = []
    for one in fixed:
        site = writes_at(one.part)[0]
        assert site.layer is not None
        places = [
            (row, first, stop)
            for row in (rows.layer <= site.layer).nonzero()[:, 0].tolist()
            for first, stop in _stretches(one.where[rows.example[row]])
        ]
        if places:
            row, first, stop = torch.tensor(places).T
            unit = isinstance(one.part, Unit)
            index = torch.full_like(row, normal(one.part.site)[1] if isinstance(one.part, Unit) else -1)
            values = base[site] if unit else one.part.value(base)
            parts = () if unit else (one.part,)
            found.append(Table(site, (values,), row, index, rows.example[row], first, stop, parts))
    return found


def _stretches(where: Bool[Tensor, " pos"]) -> list[tuple[int, int]]:
    """[first, stop) of every unbroken stretch of True."""
    edge = torch.nn.functional.pad(where.int(), (1, 1)).diff()
    return list(zip((edge > 0).nonzero()[:, 0].tolist(), (edge < 0).nonzero()[:, 0].tolist(), strict=True))
