"""Patch, Freeze, Interchange, Ablate and Steer: give a part a value, take its information away, or add to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from vesalius.activations import Activations
from vesalius.directions import Direction, Subspace
from vesalius.errors import InputError, InterventionError, UnknownNameError
from vesalius.inputs import Tokens
from vesalius.intervention.apply import Intervention, apply
from vesalius.intervention.form import Recorded, Source
from vesalius.intervention.place import Place, Positions, place_of, token_axis
from vesalius.parts import Group, Part, Together, Unit, as_part
from vesalius.site import Site

KEPT_OUT = {"kept_out": True}


@dataclass(frozen=True, eq=False, repr=False)
class Edit(Recorded):
    """Where: a Part, Site or site name, and the positions (default all)."""

    at: Part | Site | str = field(metadata=KEPT_OUT)
    part: Part = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "part", as_part(self.at))

    @property
    def target(self) -> Part:
        return as_part(self.at)

    def by_part(self) -> list[Intervention]:
        """One edit for each of the parts of `Together`; of another part itself."""
        if not isinstance(self.part, Together):
            return [self]  # type: ignore[list-item]
        made: list[Intervention] = []
        for number, part in enumerate(self.part.parts):
            own = getattr(self, "source", None)
            changes: dict[str, Any] = {"source": own[..., number]} if isinstance(own, Tensor) and own.ndim else {}
            made += replace(self, at=part, **changes).by_part()
        return made

    @property
    def place(self) -> Site:
        """Where it is written, first if at several sites."""
        return self.part.writes[0]


def values_of(source: Source, part: Part) -> Tensor:
    """A part's value in another run, or the tensor itself."""
    return part.value(source) if isinstance(source, Activations) else source


def tokens_of(source: Source | None) -> Tokens | None:
    """The tokens that values are of, when that is known."""
    return source.tokens if isinstance(source, Activations) else None


@dataclass(frozen=True, eq=False, repr=False)
class Patch(Edit):
    """Give a part the value it had in another run (Activations that captured the site) or a tensor.

    A token gets the value of the token with the same number in the same example of the other run, the last one, edited
    as "last", that of the last one there. Raises InterventionError when there is none: padding has no values.
    """

    source: Source = field(kw_only=True)
    positions: Positions = None

    def value(self, present: Tensor, place: Place) -> Tensor:
        return place.here(values_of(self.source, self.part), self.place, present, tokens_of(self.source)).to(present)


@dataclass(frozen=True, eq=False, repr=False)
class Freeze(Edit):
    """Hold a part at the value of a recorded run of the same prompts, while something else is edited.

    source: Activations. Token by token, whatever the padding. Raises UnknownNameError when they did not capture the
    site, InterventionError in a run of prompts of other lengths: nothing is stretched to fit.
    """

    source: Activations = field(kw_only=True)
    positions: Positions = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for site in self.part.reads:
            _ = self.source[site.whole]

    def value(self, present: Tensor, place: Place) -> Tensor:
        recorded, tokens = self.part.value(self.source), self.source.tokens
        # The same prompts may be padded otherwise.
        same = tokens is not None and torch.equal(tokens.real_at(self.place).sum(1), place.real.sum(1))
        if place.ends is None and recorded.shape != present.shape and not (same and recorded.ndim == present.ndim):
            raise InterventionError(
                f"Freeze at {self.place}: recorded {tuple(recorded.shape)}, this run has {tuple(present.shape)}; "
                "record the same prompts, or use Patch"
            )
        return place.here(recorded, self.place, present, tokens).to(present)


@dataclass(frozen=True, eq=False, repr=False)
class Interchange(Edit):
    """Give a part of each base example the value it has in a source example (Geiger et al. 2023, section 2).

    source: Activations, or the part's values [source, pos, ...]. examples: [batch], the source example of each base
    example; default the one with the same number. source_positions: the source position that is read, one number or
    [batch], written at every edited position; default the same position as in the base ("last": the source's own last).
    With a Subspace or Direction
    only its coordinates are interchanged (DAS), and gradients reach its basis.

    Raises InputError for a source example or position that is not there, InterventionError when the numbers do not fit
    the run, or a source example has no token with a number that is edited.
    """

    source: Source = field(kw_only=True)
    examples: Int[Tensor, " batch"] | None = None
    source_positions: int | Int[Tensor, " batch"] | None = None
    positions: Positions = None

    def value(self, present: Tensor, place: Place) -> Tensor:
        values = values_of(self.source, self.part)
        row, tokens = self._rows(len(present), len(values)), tokens_of(self.source)
        if self.source_positions is None:
            return place.here(values, self.place, present, tokens, row).to(present)
        axis = token_axis(self.place)
        at = torch.as_tensor(self.source_positions).cpu().expand(len(present))
        real = None if tokens is None else tokens.real_at(self.place)[row]
        if real is None or real.shape[1] != values.shape[axis]:
            real = torch.ones(len(row), values.shape[axis], dtype=torch.bool)
        lengths = real.sum(1)
        outside = (at >= lengths) | (at < 0)
        if bool(outside.any()):
            first = int(outside.nonzero()[0])
            raise InputError(
                f"Interchange at {self.place}: source position {int(at[first])} in source example {int(row[first])}, "
                f"which has {int(lengths[first])} tokens; they count from 0"
            )
        column = (~real).long().argsort(dim=1, stable=True)[torch.arange(len(at)), at]
        row, column = row.to(values.device), column.to(values.device)
        return values.movedim(axis, 1)[row, column].unsqueeze(1).movedim(1, axis).to(present)

    def _rows(self, batch: int, known: int) -> Tensor:
        rows = torch.arange(batch) if self.examples is None else torch.as_tensor(self.examples).cpu()
        if rows.shape != (batch,):
            raise InterventionError(
                f"Interchange at {self.place}: examples= has shape {tuple(rows.shape)}; this run has {batch} "
                "examples, and each needs one source example"
            )
        if int(rows.max()) >= known or int(rows.min()) < 0:
            raise InputError(
                f"Interchange at {self.place}: source examples {int(rows.min())} to {int(rows.max())} of {known}; "
                "they count from 0"
            )
        return rows


@dataclass(frozen=True, eq=False, repr=False)
class Ablate(Edit):
    """Remove a part's information.

    mode "zero": zeros. "mean": the mean over the real positions of a reference (Activations), or a tensor given.
    "resample": the value of another example of the reference, drawn without fixed points by `seed`, among those that
    have every token that is edited ("last" is each prompt's own last).
    """

    mode: Literal["zero", "mean", "resample"] = "zero"
    reference: Source | None = None
    positions: Positions = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("zero", "mean", "resample"):
            raise UnknownNameError("ablation mode", self.mode, ["zero", "mean", "resample"])
        if self.mode != "zero" and self.reference is None:
            raise InputError(f"{self.mode} ablation of {self.place} needs reference= (activations of other prompts)")

    def value(self, present: Tensor, place: Place) -> Tensor:
        if self.mode == "zero":
            return torch.zeros_like(present)
        assert self.reference is not None
        values = values_of(self.reference, self.part)
        if self.mode == "mean" and isinstance(self.reference, Activations):
            return mean_of(values, self.reference.tokens, self.place).to(present)
        tokens = tokens_of(self.reference)
        rows = self._donors(len(values), place, tokens) if self.mode == "resample" else None
        return place.here(values, self.place, present, tokens, rows).to(present)

    def _donors(self, n: int, place: Place, tokens: Tokens | None) -> Int[Tensor, " n"]:
        drawn = derangement(n, self.seed)
        # While a model writes, a donor is the same for every token, so that the text cannot change who it is.
        if tokens is None or place.ends is not None or n != len(place.real):
            return drawn
        edited = place.edited if place.last is None else place.edited & ~place.last
        needs = torch.where(edited, place.numbers + 1, 1).amax(1)
        return long_enough(drawn, tokens.real_at(self.place).sum(1), needs, self.seed)


def mean_of(values: Tensor, tokens: Tokens | None, site: Site) -> Tensor:
    """Mean over the real positions: [batch, pos, ...] -> [...]."""
    if tokens is None:
        return values.mean((0, 1))
    return values[tokens.real_at(site).to(values.device)].mean(0)


def derangement(n: int, seed: int) -> Int[Tensor, " n"]:
    """A permutation of n without fixed points: each gets the one before it in a random order, the first gets the last.

    Raises InputError for n < 2.
    """
    if n < 2:
        raise InputError("resample ablation needs at least 2 reference examples")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    result = torch.empty_like(order)
    result[order] = order.roll(1)
    return result


def long_enough(
    drawn: Int[Tensor, " n"], lengths: Int[Tensor, " n"], needs: Int[Tensor, " n"], seed: int
) -> Int[Tensor, " n"]:
    """The examples drawn as donors; when one is too short, all are drawn again, among the others that are long enough.

    lengths: tokens of each example. needs: how many its donor must have. Raises InputError when there is no such donor.
    """
    if bool((lengths[drawn] >= needs).all()):
        return drawn
    found, unused, generator = drawn.clone(), set(range(len(drawn))), torch.Generator().manual_seed(seed)
    # Those that need the longest choose first, so that as few donors as possible serve twice.
    for row in needs.argsort(descending=True, stable=True).tolist():
        fitting = [one for one in range(len(drawn)) if one != row and lengths[one] >= needs[row]]
        if not fitting:
            raise InputError(
                f"no other prompt of the reference has the {int(needs[row])} tokens resampled in prompt {row}; "
                'give positions= that another one has ("last" is each prompt\'s own last), leave that prompt out, or '
                "take the mean"
            )
        free = [one for one in fitting if one in unused] or fitting
        found[row] = free[int(torch.randint(len(free), (), generator=generator))]
        unused.discard(int(found[row]))
    return found


@dataclass(frozen=True, eq=False, repr=False)
class Steer(Edit):
    """Add `scale` times a vector at a site, or `scale` to the value of a part.

    vector: added at the site. Without one the part is a Direction, whose own unit vector is added, or another part with
    one number per position (a latent, a neuron), whose value rises by `scale`.

    Raises InputError for a whole site or a head without vector.
    """

    scale: float = field(kw_only=True)
    vector: Tensor | None = None
    positions: Positions = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vector is None and isinstance(self.part, Direction):
            object.__setattr__(self, "vector", self.part.vector)
        if self.vector is not None:
            object.__setattr__(self, "part", Unit(self.place))
        elif not is_number(self.part):
            raise InputError(
                f"Steer at {self.place} needs vector=, or a part with one number per position, such as a Direction"
            )

    def value(self, present: Tensor, _place: Place) -> Tensor:
        if self.vector is None:
            return present + self.scale
        return present + self.scale * self.vector.to(present)


def is_number(part: Part) -> bool:
    """Whether a part has one number per position: a direction, a latent, one neuron or dimension."""
    if isinstance(part, Unit):
        full = part.site.whole.axes
        return part.site.index is not None and len(full) == 3
    return not isinstance(part, Group | Subspace | Together)


def as_patches(edits: Sequence[Intervention], at: Mapping[Site, Tensor], tokens: Tokens | None) -> list[Patch]:
    """Edits of parts that write several sites, as patches of those sites: in order, each on what the ones before made.

    at: whole tensors at all the sites that the parts read and write, of the run without these edits.
    """
    made, chosen = dict(at), dict[Site, Tensor | None]()
    for edit in edits:
        place = place_of(tokens, edit.part.writes[0], made[edit.part.writes[0].whole])
        mask = place.choosing(edit.positions).chosen
        for site, tensor in apply(edit, made, place).items():
            before = chosen.get(site, torch.zeros_like(place.real))
            chosen[site] = None if mask is None or before is None else before | mask
            made[site] = tensor
    return [Patch(site, source=made[site], positions=mask) for site, mask in chosen.items()]
