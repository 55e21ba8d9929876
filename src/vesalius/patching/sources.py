"""Sources: where the values of an edit come from, and from which position on they can differ from the base run's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Raw, Tokens
from vesalius.intervention import derangement, long_enough
from vesalius.parts import Part, Unit
from vesalius.patching.record import Recording
from vesalius.patching.targets import EDITS, normal, writes_at
from vesalius.site import Site


@dataclass(frozen=True, eq=False)
class Source:
    """Values for edits.

    example: [n], the example that gives each its value. first: [n], the first position that can differ.
    """

    name: str
    tensor: Callable[[Site], Tensor]
    """Values of a whole site: [example or 1, pos or 1, ...]."""
    value: Callable[[Part], Tensor]
    """Values of a part that is not a Unit: [example or 1, pos or 1, ...]."""
    example: Int[Tensor, " example"]
    first: Int[Tensor, " example"]
    adds: bool = False
    """The values are added to what is there (steer)."""

    def of(self, part: Part) -> Tensor:
        """[example or 1, pos or 1, ...]: of a Unit the whole site (its index is not taken yet), or of another part."""
        return self.tensor(normal(part.site)[0]) if isinstance(part, Unit) else self.value(part)


def patch_source(base: Recording, other: Recording) -> Source:
    """Values of an aligned run (clean into corrupted, or back).

    Nothing differs before the first differing token, in a causal model.
    """
    _same_count(base, other)
    everyone = torch.arange(len(base))
    value = lambda part: part.value(other)  # noqa: E731
    if not base.causal:
        return Source("patch", other.__getitem__, value, everyone, torch.zeros_like(everyone))
    differs = base.tokens.ids != other.tokens.ids
    width = differs.shape[1]
    first = torch.where(differs.any(1), differs.long().argmax(1), torch.full((len(differs),), width))
    return Source("patch", other.__getitem__, value, everyone, first)


def zero_source(base: Recording) -> Source:
    """Zeros at every position: of a latent or direction, its value is zero, which need not be what zeros give it."""
    nothing = torch.zeros(len(base), dtype=torch.long)
    return Source(
        "zero",
        lambda site: torch.zeros_like(base[site][:1, :1]),
        lambda part: _one_number(base, part, 0.0),
        nothing,
        nothing,
    )


def mean_source(base: Recording, reference: Recording) -> Source:
    """Means over the reference's real positions. The first position has a mean of its own: attention sinks live there.

    At a module's tensor that counts no tokens they are over the examples alone, one for each of its numbers.
    When every prompt begins with the same token the first position is left alone: its value is the same in all of them.
    """

    def tensor(site: Site) -> Tensor:
        if site.kind == "module" and not isinstance(base.inputs, Tokens):
            return reference[site].mean(0, keepdim=True)
        return _means(reference[site], reference.real_at(site), base.real_at(site).shape[1])

    def value(part: Part) -> Tensor:
        site = writes_at(part)[0]
        return _means(part.value(reference), reference.real_at(site), base.real_at(site).shape[1])

    return Source("mean", cache(tensor), value, torch.zeros(len(base), dtype=torch.long), _first(base, reference))


def _means(values: Tensor, real: Bool[Tensor, "example pos"], width: int) -> Tensor:
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


def _first(base: Recording, reference: Recording) -> Int[Tensor, " example"]:
    """First position where another prompt's value can differ: 1 when all begin with one token, else 0."""
    if not base.causal:
        return torch.zeros(len(base), dtype=torch.long)
    begins = torch.cat([base.tokens.ids[:, 0], reference.tokens.ids[:, 0]])
    shared = bool((begins == begins[0]).all())
    return torch.full((len(base),), int(shared))


def resample_source(base: Recording, reference: Recording, seed: int) -> Source:
    """Another example's values, position by position, drawn without fixed points among those that are long enough.

    Raises InputError for an example that is longer than every other.
    """
    _same_count(base, reference)
    order = long_enough(derangement(len(reference), seed), reference.lengths, base.lengths, seed)
    value = lambda part: part.value(reference)  # noqa: E731
    return Source("resample", reference.__getitem__, value, order, _first(base, reference))


def steer_source(base: Recording, scale: float) -> Source:
    """`scale` added to every position. Raises InputError for a scale of zero, which edits nothing."""
    if not scale or not torch.isfinite(torch.tensor(scale)):
        raise InputError(f'edit="steer" needs a finite scale other than 0; got scale={scale}')
    nothing = torch.zeros(len(base), dtype=torch.long)
    return Source(
        "steer",
        lambda site: torch.full_like(base[site][:1, :1], scale),
        lambda part: _one_number(base, part, scale),
        nothing,
        nothing,
        adds=True,
    )


def _one_number(base: Recording, part: Part, number: float) -> Tensor:
    """A part's value where it is one number everywhere."""
    return torch.full_like(part.value(base)[:1, :1], number)


def _same_count(base: Recording, other: Recording) -> None:
    if isinstance(base.inputs, Raw):
        return  # Pairs have equal shapes
    if base.tokens.ids.shape != other.tokens.ids.shape:
        raise InputError(
            f"the base run has prompts {tuple(base.tokens.ids.shape)} and the source {tuple(other.tokens.ids.shape)}: "
            "they must be aligned example by example and position by position"
        )


def source_for(edit: str, base: Recording, reference: Recording, seed: int, scale: float = 0.0) -> Source:
    """The source of a named edit. Raises UnknownNameError for another name."""
    if edit == "patch":
        return patch_source(base, reference)
    if edit == "zero":
        return zero_source(base)
    if edit == "mean":
        return mean_source(base, reference)
    if edit == "resample":
        return resample_source(base, reference, seed)
    if edit == "steer":
        return steer_source(base, scale)
    raise UnknownNameError("edit", edit, EDITS)
