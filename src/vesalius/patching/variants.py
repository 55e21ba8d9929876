"""Variants: sets of parts edited together, evaluated on every example by replay.

A variant names what is edited (heads `layers.5.z[3]`, whole sites `layers.5.mlp_out`, `embed`, a Direction or another
Part) and optionally one position. The values come from a `Donor`. What is held, is held in every variant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from vesalius.errors import InputError
from vesalius.patching.changes import Changes
from vesalius.patching.donors import Donor
from vesalius.patching.edits import Edits, Table, sources
from vesalius.patching.flat import Rows
from vesalius.patching.held import Held
from vesalius.patching.what import What, place_of
from vesalius.site import Site

_ROWS_TOGETHER = 64
KEYS_PER_TOKEN = 16


@dataclass(frozen=True)
class Variant:
    """Parts edited together; position None is every position that can differ."""

    parts: tuple[What, ...]
    position: int | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one replay, with the (variant, example) cell each fills."""

    rows: Rows
    edits: Edits
    cell: Int[Tensor, "row 2"]


def batches(
    variants: Sequence[Variant], changes: Changes, ends: Int[Tensor, " example"], budget: int, held: Sequence[Held] = ()
) -> Iterator[Batch]:
    """Rows of all variants, packed into batches of at most `budget` live tokens, early layers first.

    Rows also carry the keys of their whole prompt, so those are bounded too (16 times the budget). A cell whose edit
    can change nothing (equal values, all of it before the first difference, or past the end) gets no row.
    """
    order = sorted(range(len(variants)), key=lambda number: _layer(variants[number]))
    pieces = [(number, rows) for number in order for rows in rows_of(variants[number], changes, ends)]
    together: list[tuple[int, Rows]] = []
    size, reach = 0, 0
    for number, row in pieces:
        tokens, keys = int(row.sizes.sum()), int(row.end.sum())
        if together and (size + tokens > budget or reach + keys > KEYS_PER_TOKEN * budget):
            yield _batch(variants, changes, together, held)
            together, size, reach = [], 0, 0
        together.append((number, row))
        size, reach = size + tokens, reach + keys
    if together:
        yield _batch(variants, changes, together, held)


def _layer(variant: Variant) -> int:
    layers = [place_of(part)[0].layer for part in variant.parts]
    if not layers:
        raise InputError("a variant without parts edits nothing")
    # A module's place is not known; its edits are run whole.
    return min(layer or 0 for layer in layers)


def rows_of(variant: Variant, changes: Changes, ends: Int[Tensor, " example"]) -> list[Rows]:
    """The rows a variant needs: one per example in which it can change something at the read position."""
    if variant.position is None:
        start = changes.first(variant.parts)
        live = start < ends
    else:
        start = torch.full_like(ends, variant.position)
        live = changes.live(variant.parts, variant.position) & (ends > variant.position)
    example = live.nonzero()[:, 0]
    layer = torch.full_like(example, _layer(variant))
    return [Rows(e, layer[: len(e)], start[e], ends[e]) for e in example.split(_ROWS_TOGETHER) if len(e)]


def _batch(
    variants: Sequence[Variant], changes: Changes, together: Sequence[tuple[int, Rows]], held: Sequence[Held]
) -> Batch:
    """Pieces come sorted by layer, so rows are too."""
    rows = Rows(*(torch.cat([getattr(r, name) for _, r in together]) for name in ("example", "layer", "start", "end")))
    number = torch.cat([torch.full((len(r),), n) for n, r in together])
    still = [table for one in held if (table := one.table(changes.base, rows)) is not None]
    tables = _tables(variants, changes.donor, rows, number)
    return Batch(rows, Edits([*still, *tables]), torch.stack([number, rows.example], 1))


def _tables(variants: Sequence[Variant], donor: Donor, rows: Rows, number: Tensor) -> list[Table]:
    """The variants' edits, site by site; every Part has a table of its own."""
    collected: dict[Site, tuple[list[Tensor], list[Tensor]]] = {}
    parts: dict[What, list[Tensor]] = {}
    for variant_number in number.unique_consecutive().tolist():
        here = (number == variant_number).nonzero()[:, 0]
        variant = variants[variant_number]
        for site, indices in _by_site(variant).items():
            row_list, index_list = collected.setdefault(site, ([], []))
            row_list.append(here.repeat_interleave(len(indices)))
            index_list.append(indices.repeat(len(here)))
        for part in variant.parts:
            if not isinstance(part, Site):
                parts.setdefault(part, []).append(here)
    one = torch.tensor([variants[n].position is not None for n in number.tolist()])
    stop = torch.where(one, rows.start + 1, rows.end)
    tables = [
        _table(site, donor, rows, torch.cat(row_list), torch.cat(index_list), stop)
        for site, (row_list, index_list) in collected.items()
    ]
    return [*tables, *(_part_table(part, donor, rows, torch.cat(here), stop) for part, here in parts.items())]


def _table(site: Site, donor: Donor, rows: Rows, row: Tensor, index: Tensor, stop: Tensor) -> Table:
    example = donor.example[rows.example[row]]
    return Table(site, donor.source, row, index, example, rows.start[row], stop[row], adds=donor.adds)


def _part_table(part: What, donor: Donor, rows: Rows, row: Tensor, stop: Tensor) -> Table:
    assert not isinstance(part, Site)
    site, values = place_of(part)[0], donor.values(part)
    example = donor.example[rows.example[row]]
    return Table(
        site, sources({site: values}), row, torch.full_like(row, -1), example, rows.start[row], stop[row], part,
        donor.adds,
    )  # fmt: skip


def _by_site(variant: Variant) -> Mapping[Site, Tensor]:
    grouped: dict[Site, list[int]] = {}
    for part in variant.parts:
        if isinstance(part, Site):
            site, index = place_of(part)
            grouped.setdefault(site, []).append(index)
    return {site: torch.tensor(indices) for site, indices in grouped.items()}
