"""Variants: sets of parts edited together, evaluated on every example by replay.

A variant names parts (heads `layers.5.z[3]`, whole sites `layers.5.mlp_out`, `embed`) and optionally one position. The
values come from a `Donor`: another run aligned position by position, zeros, means, or other examples' values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from vesalius.errors import InputError, UnknownNameError
from vesalius.intervention import derangement
from vesalius.site import Site
from vesalius.sweeps.edits import Edits, Source, Table
from vesalius.sweeps.record import Record
from vesalius.sweeps.replay import Rows


@dataclass(frozen=True)
class Variant:
    """Parts edited together; position None is every position that can differ."""

    parts: tuple[Site, ...]
    position: int | None = None


@dataclass(frozen=True, eq=False)
class Donor:
    """Values for edits. example: [n] donor of each example. first: [n] first position where the value can differ."""

    name: str
    source: Source
    example: Int[Tensor, "example"]
    first: Int[Tensor, "example"]


@dataclass(frozen=True, eq=False)
class _Constant:
    """One vector per site, the same for every example and position: [1, 1, ...]."""

    tensors: Mapping[Site, Tensor]

    def at(self, site: Site) -> Tensor:
        return self.tensors[site]


def patch_donor(base: Record, other: Record) -> Donor:
    """Values of an aligned run (clean into corrupted, or back). Nothing differs before the first differing token."""
    differs = base.tokens.ids != other.tokens.ids
    width = differs.shape[1]
    first = torch.where(differs.any(1), differs.long().argmax(1), torch.full((len(differs),), width))
    return Donor("patch", other, torch.arange(len(base)), first)


def zero_donor(base: Record, sites: Sequence[Site]) -> Donor:
    """Zeros at every position."""
    zeros = {site: torch.zeros_like(base.at(site)[:1, :1]) for site in sites}
    return Donor("zero", _Constant(zeros), torch.zeros(len(base), dtype=torch.long), torch.zeros(len(base), dtype=torch.long))


def mean_donor(base: Record, reference: Record, sites: Sequence[Site]) -> Donor:
    """Mean over the reference's real positions after the first.

    The first position is left out and left alone: it sees only itself, so it is the same in every prompt.
    """
    real = reference.tokens.real.clone()
    real[:, 0] = False
    means = {site: reference.at(site)[real].mean(0)[None, None] for site in sites}
    return Donor("mean", _Constant(means), torch.zeros(len(base), dtype=torch.long), torch.ones(len(base), dtype=torch.long))


def resample_donor(base: Record, reference: Record, seed: int) -> Donor:
    """Another example's values, position by position, drawn without fixed points.

    Examples of equal length are paired first; a donor that is shorter gives its last real position's value beyond its end.
    """
    order = derangement(len(reference), seed)
    return Donor("resample", _Stretched(reference), order, torch.ones(len(base), dtype=torch.long))


@dataclass(frozen=True, eq=False)
class _Stretched:
    """A record whose padding repeats the last real position."""

    reference: Record

    def at(self, site: Site) -> Tensor:
        values = self.reference.at(site)
        last = (self.reference.lengths - 1)[:, None].expand(-1, values.shape[1])
        pos = torch.minimum(torch.arange(values.shape[1])[None].expand_as(last), last)
        return values[torch.arange(len(values))[:, None], pos]


def normal(part: Site) -> tuple[Site, int]:
    """The site an edit is written at and the index there: a layer's output is the next layer's input."""
    index = -1 if part.index is None else part.index
    whole = part.whole
    if whole.kind == "resid_post" and whole.layer is not None:
        return Site("resid_pre", whole.layer + 1), index
    if whole.kind == "embed":
        return Site("resid_pre", 0), index
    if whole.layer is None or whole.kind in ("pattern", "scores", "result", "resid_mid"):
        raise InputError(f"{part} cannot be swept; sweep embed, resid_pre, resid_post, attn_out, mlp_out, mlp_post, q, k, v or z")
    return whole, index


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one replay, with the (variant, example) cell each fills."""

    rows: Rows
    edits: Edits
    cell: Int[Tensor, "row 2"]


def batches(variants: Sequence[Variant], donor: Donor, ends: Int[Tensor, "example"], budget: int) -> Iterator[Batch]:
    """Rows of all variants, packed into batches of at most `budget` live tokens, early layers first.

    A cell whose edit can change nothing (all of it before the first difference, or past the end) gets no row.
    """
    order = sorted(range(len(variants)), key=lambda number: _layer(variants[number]))
    pieces = [(number, rows) for number in order for rows in _rows(variants[number], donor, ends)]
    held: list[tuple[int, Rows]] = []
    size = 0
    for number, row in pieces:
        tokens = int(row.sizes.sum())
        if held and size + tokens > budget:
            yield _batch(variants, donor, held)
            held, size = [], 0
        held.append((number, row))
        size += tokens
    if held:
        yield _batch(variants, donor, held)


def _layer(variant: Variant) -> int:
    layers = [normal(part)[0].layer for part in variant.parts]
    if not layers:
        raise InputError("a variant without parts edits nothing")
    return min(layer for layer in layers if layer is not None)


_ROWS_TOGETHER = 64


def _rows(variant: Variant, donor: Donor, ends: Int[Tensor, "example"]) -> list[Rows]:
    start = donor.first.clone()
    live = start < ends
    if variant.position is not None:
        live &= (start <= variant.position) & (ends > variant.position)
        start = torch.full_like(start, variant.position)
    example = live.nonzero()[:, 0]
    layer = torch.full_like(example, _layer(variant))
    return [Rows(e, layer[: len(e)], start[e], ends[e]) for e in example.split(_ROWS_TOGETHER) if len(e)]


def _batch(variants: Sequence[Variant], donor: Donor, held: Sequence[tuple[int, Rows]]) -> Batch:
    """Pieces come sorted by layer, so rows are too."""
    rows = Rows(*(torch.cat([getattr(r, name) for _, r in held]) for name in ("example", "layer", "start", "end")))
    number = torch.cat([torch.full((len(r),), n) for n, r in held])
    return Batch(rows, _edits(variants, donor, rows, number, held), torch.stack([number, rows.example], 1))


def _edits(
    variants: Sequence[Variant], donor: Donor, rows: Rows, number: Tensor, held: Sequence[tuple[int, Rows]]
) -> Edits:
    collected: dict[Site, tuple[list[Tensor], list[Tensor]]] = {}
    for variant_number in dict.fromkeys(n for n, _ in held):
        here = (number == variant_number).nonzero()[:, 0]
        for site, indices in _by_site(variants[variant_number]).items():
            row_list, index_list = collected.setdefault(site, ([], []))
            row_list.append(here.repeat_interleave(len(indices)))
            index_list.append(indices.repeat(len(here)))
    tables = []
    for site, (row_list, index_list) in collected.items():
        row, index = torch.cat(row_list), torch.cat(index_list)
        one = torch.tensor([variants[int(n)].position is not None for n in number])
        stop = torch.where(one[row], rows.start[row] + 1, rows.end[row])
        tables.append(Table(site, donor.source, row, index, donor.example[rows.example[row]], rows.start[row], stop))
    return Edits(tables)


def _by_site(variant: Variant) -> dict[Site, Tensor]:
    grouped: dict[Site, list[int]] = {}
    for part in variant.parts:
        site, index = normal(part)
        grouped.setdefault(site, []).append(index)
    return {site: torch.tensor(indices) for site, indices in grouped.items()}


def donor_for(mode: str, base: Record, reference: Record, sites: Sequence[Site], seed: int) -> Donor:
    """The donor of a named edit. Raises UnknownNameError for another name."""
    written = sorted({normal(site)[0] for site in sites}, key=lambda site: site.order)
    if mode == "patch":
        return patch_donor(base, reference)
    if mode == "zero":
        return zero_donor(base, written)
    if mode == "mean":
        return mean_donor(base, reference, written)
    if mode == "resample":
        return resample_donor(base, reference, seed)
    raise UnknownNameError("edit", mode, ["patch", "zero", "mean", "resample"])
