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
from vesalius.site import ATTENTION, RESULTS, Site
from vesalius.sweeps.edits import Edits, Source, Table
from vesalius.sweeps.record import Record
from vesalius.sweeps.replay import Rows

_UNSWEPT = (*ATTENTION, *RESULTS, "resid_mid", "resid_mid_cross")


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
    example: Int[Tensor, " example"]
    first: Int[Tensor, " example"]


@dataclass(frozen=True, eq=False)
class _Constant:
    """One vector per site, the same for every example and position: [1, 1, ...]."""

    tensors: Mapping[Site, Tensor]

    def at(self, site: Site) -> Tensor:
        return self.tensors[site]


def patch_donor(base: Record, other: Record) -> Donor:
    """Values of an aligned run (clean into corrupted, or back).

    Nothing differs before the first differing token, in a causal model.
    """
    _same_count(base, other)
    if not base.causal:
        everyone = torch.arange(len(base))
        return Donor("patch", other, everyone, torch.zeros_like(everyone))
    differs = base.tokens.ids != other.tokens.ids
    width = differs.shape[1]
    first = torch.where(differs.any(1), differs.long().argmax(1), torch.full((len(differs),), width))
    return Donor("patch", other, torch.arange(len(base)), first)


def zero_donor(base: Record, sites: Sequence[Site]) -> Donor:
    """Zeros at every position."""
    zeros = {site: torch.zeros_like(base.at(site)[:1, :1]) for site in sites}
    nothing = torch.zeros(len(base), dtype=torch.long)
    return Donor("zero", _Constant(zeros), nothing, nothing)


def mean_donor(base: Record, reference: Record, sites: Sequence[Site]) -> Donor:
    """Means over the reference's real positions. The first position has a mean of its own: attention sinks live there.

    When every prompt begins with the same token the first position is left alone: its value is the same in all of them.
    """
    means = {
        site: _means(reference.at(site), reference.tokens.real_at(site), base.tokens.real_at(site).shape[1])
        for site in sites
    }
    return Donor("mean", _Constant(means), torch.zeros(len(base), dtype=torch.long), _first(base, reference))


def _means(values: Tensor, real: Tensor, width: int) -> Tensor:
    """[1, width, ...]: the mean of the first position there, and the mean of the other real ones everywhere else.

    A module's tensor without token axis has one mean over the examples.
    """
    if values.shape[:2] != real.shape:
        return values.mean(0, keepdim=True)
    real = real.clone()
    real[:, 0] = False
    later = values[real].mean(0) if bool(real.any()) else values[:, 0].mean(0)
    table = later.expand(1, width, *later.shape).clone()
    table[0, 0] = values[:, 0].mean(0)
    return table


def _first(base: Record, reference: Record) -> Int[Tensor, " example"]:
    """First position where another prompt's value can differ: 1 when all begin with one token, else 0."""
    begins = torch.cat([base.tokens.ids[:, 0], reference.tokens.ids[:, 0]])
    shared = base.causal and bool((begins == begins[0]).all())
    return torch.full((len(base),), int(shared))


def resample_donor(base: Record, reference: Record, seed: int) -> Donor:
    """Another example's values, position by position, drawn without fixed points among neighbours in length.

    A donor that is shorter gives its last real position's value beyond its end.
    """
    _same_count(base, reference)
    order = derangement(len(reference), seed, reference.lengths)
    return Donor("resample", _Stretched(reference), order, _first(base, reference))


def _same_count(base: Record, other: Record) -> None:
    if base.tokens.ids.shape != other.tokens.ids.shape:
        raise InputError(
            f"the base run has prompts {tuple(base.tokens.ids.shape)} and the donors {tuple(other.tokens.ids.shape)}: "
            "they must be aligned example by example and position by position"
        )


@dataclass(frozen=True, eq=False)
class _Stretched:
    """A record whose padding repeats the last real position."""

    reference: Record

    def at(self, site: Site) -> Tensor:
        values = self.reference.at(site)
        real = self.reference.tokens.real_at(site)
        if values.shape[:2] != real.shape:
            return values
        last = (real.sum(1) - 1)[:, None].expand(-1, values.shape[1])
        pos = torch.minimum(torch.arange(values.shape[1])[None].expand_as(last), last)
        return values[torch.arange(len(values))[:, None], pos]


def normal(part: Site) -> tuple[Site, int]:
    """The site an edit is written at and the index there: a layer's output is the next layer's input.

    `embed` is the first layer's input: with learned positions it holds token and position embedding.
    """
    index = -1 if part.index is None else part.index
    whole = part.whole
    if whole.kind in _UNSWEPT or (whole.layer is None and whole.kind not in ("embed", "module")):
        raise InputError(
            f"{part} cannot be swept; sweep embed, resid_pre, resid_post, attn_out, mlp_out, mlp_post, router, "
            "expert_out, q, k, v, z (and cross_q, cross_k, cross_v, cross_z, cross_attn_out) or module:<path>|in, |out"
        )
    if whole.kind == "resid_post" and whole.layer is not None and not whole.stack:
        return Site("resid_pre", whole.layer + 1), index
    if whole.kind == "embed" and not whole.stack:
        return Site("resid_pre", 0), index
    return whole, index


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one replay, with the (variant, example) cell each fills."""

    rows: Rows
    edits: Edits
    cell: Int[Tensor, "row 2"]


def batches(variants: Sequence[Variant], donor: Donor, ends: Int[Tensor, " example"], budget: int) -> Iterator[Batch]:
    """Rows of all variants, packed into batches of at most `budget` live tokens, early layers first.

    Rows also carry the keys of their whole prompt, so those are bounded too (16 times the budget). A cell whose edit
    can change nothing (all of it before the first difference, or past the end) gets no row.
    """
    order = sorted(range(len(variants)), key=lambda number: _layer(variants[number]))
    pieces = [(number, rows) for number in order for rows in rows_of(variants[number], donor, ends)]
    held: list[tuple[int, Rows]] = []
    size, reach = 0, 0
    for number, row in pieces:
        tokens, keys = int(row.sizes.sum()), int(row.end.sum())
        if held and (size + tokens > budget or reach + keys > _KEYS_PER_TOKEN * budget):
            yield _batch(variants, donor, held)
            held, size, reach = [], 0, 0
        held.append((number, row))
        size, reach = size + tokens, reach + keys
    if held:
        yield _batch(variants, donor, held)


def _layer(variant: Variant) -> int:
    layers = [normal(part)[0].layer for part in variant.parts]
    if not layers:
        raise InputError("a variant without parts edits nothing")
    # A module's place is not known; its edits are run whole.
    return min(layer or 0 for layer in layers)


EDITS = ("patch", "zero", "mean", "resample")
_ROWS_TOGETHER = 64
_KEYS_PER_TOKEN = 16


def rows_of(variant: Variant, donor: Donor, ends: Int[Tensor, " example"]) -> list[Rows]:
    """The rows a variant needs: one per example in which it can change something at the read position."""
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
    one = torch.tensor([variants[n].position is not None for n in number.tolist()])
    for site, (row_list, index_list) in collected.items():
        row, index = torch.cat(row_list), torch.cat(index_list)
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
    raise UnknownNameError("edit", mode, EDITS)
