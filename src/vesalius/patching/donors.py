"""Donors: where the values of an edit come from, and the first position at which they can differ from the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Raw, Tokens
from vesalius.intervention import derangement
from vesalius.parts import Part
from vesalius.patching.edits import Source
from vesalius.patching.record import Record
from vesalius.patching.what import What, place_of
from vesalius.site import Site

EDITS = ("patch", "zero", "mean", "resample", "steer")


def _as_it_is(source: Source, part: Part, site: Site) -> Tensor:
    return part.read(source.at(site))


@dataclass(frozen=True, eq=False)
class Donor:
    """Values for edits. example: [n] donor of each example. first: [n] first position where the value can differ."""

    name: str
    source: Source
    example: Int[Tensor, " example"]
    first: Int[Tensor, " example"]
    adds: bool = False
    """The values are added to what is there (steer)."""
    read: Callable[[Source, Part, Site], Tensor] = field(default=_as_it_is, repr=False)
    """A Part's values from the source's tensor."""

    def values(self, what: What) -> Tensor:
        """[example or 1, pos or 1, ...]: of a whole site (an index is not taken yet), or of a Part."""
        site, _ = place_of(what)
        return self.source.at(site) if isinstance(what, Site) else self.read(self.source, what, site)


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
    return Donor("zero", _Constant(zeros), nothing, nothing, read=_zero_of)


def _zero_of(source: Source, part: Part, site: Site) -> Tensor:
    # Not what the part reads off zeros: a latent's value there need not be zero.
    return torch.zeros_like(part.read(source.at(site)))


def mean_donor(base: Record, reference: Record, sites: Sequence[Site]) -> Donor:
    """Means over the reference's real positions. The first position has a mean of its own: attention sinks live there.

    At a module's tensor that counts no tokens they are over the examples alone, one for each of its numbers.
    When every prompt begins with the same token the first position is left alone: its value is the same in all of them.
    """
    means = {
        site: _means(reference.at(site), reference.real_at(site), base.real_at(site).shape[1])
        if site.kind != "module" or isinstance(base.inputs, Tokens)
        else reference.at(site).mean(0, keepdim=True)
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
    if not base.causal:
        return torch.zeros(len(base), dtype=torch.long)
    begins = torch.cat([base.tokens.ids[:, 0], reference.tokens.ids[:, 0]])
    shared = bool((begins == begins[0]).all())
    return torch.full((len(base),), int(shared))


def resample_donor(base: Record, reference: Record, seed: int) -> Donor:
    """Another example's values, position by position, drawn without fixed points among neighbours in length.

    A donor that is shorter gives its last real position's value beyond its end.
    """
    _same_count(base, reference)
    order = derangement(len(reference), seed, reference.lengths)
    return Donor("resample", _Stretched(reference), order, _first(base, reference))


def steer_donor(base: Record, sites: Sequence[Site], scale: float) -> Donor:
    """`scale` added to every position. Raises InputError for a scale of zero, which edits nothing."""
    if not scale or not torch.isfinite(torch.tensor(scale)):
        raise InputError(f'edit="steer" needs a finite scale other than 0; got scale={scale}')
    zero = zero_donor(base, sites)
    amounts = {site: torch.full_like(zero.source.at(site), scale) for site in sites}

    def of_part(_: Source, part: Part, site: Site) -> Tensor:
        return torch.full_like(part.read(zero.source.at(site)), scale)

    return Donor("steer", _Constant(amounts), zero.example, zero.first, adds=True, read=of_part)


def _same_count(base: Record, other: Record) -> None:
    if isinstance(base.inputs, Raw):
        return  # Pairs have equal shapes
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
        real = self.reference.real_at(site)
        if values.shape[:2] != real.shape:
            return values
        last = (real.sum(1) - 1)[:, None].expand(-1, values.shape[1])
        pos = torch.minimum(torch.arange(values.shape[1])[None].expand_as(last), last)
        return values[torch.arange(len(values))[:, None], pos]


def donor_for(
    mode: str, base: Record, reference: Record, sites: Sequence[What], seed: int, scale: float = 0.0
) -> Donor:
    """The donor of a named edit. Raises UnknownNameError for another name."""
    written = sorted({place_of(what)[0] for what in sites}, key=lambda site: site.order)
    if mode == "patch":
        return patch_donor(base, reference)
    if mode == "zero":
        return zero_donor(base, written)
    if mode == "mean":
        return mean_donor(base, reference, written)
    if mode == "resample":
        return resample_donor(base, reference, seed)
    if mode == "steer":
        return steer_donor(base, written, scale)
    raise UnknownNameError("edit", mode, EDITS)
