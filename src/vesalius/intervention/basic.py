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
from vesalius.intervention.place import Place, Positions, mask_of, place_of, token_axis
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


@dataclass(frozen=True, eq=False, repr=False)
class Patch(Edit):
    """Give a part the value it had in another run (Activations that captured the site) or a tensor."""

    source: Source = field(kw_only=True)
    positions: Positions = None

    def value(self, present: Tensor, place: Place) -> Tensor:
        return place.here(values_of(self.source, self.part), self.place, present).to(present)


@dataclass(frozen=True, eq=False, repr=False)
class Freeze(Edit):
    """Hold a part at the value of a recorded run of the same prompts, while something else is edited.

    source: Activations. Raises UnknownNameError when they did not capture the site, InterventionError in a run whose
    tensor there has another shape: nothing is stretched to fit.
    """

    source: Activations = field(kw_only=True)
    positions: Positions = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for site in self.part.reads:
            _ = self.source[site.whole]

    def value(self, present: Tensor, place: Place) -> Tensor:
        recorded = self.part.value(self.source)
        if place.index is None and recorded.shape != present.shape:
            raise InterventionError(
                f"Freeze at {self.place}: recorded {tuple(recorded.shape)}, this run has {tuple(present.shape)}; "
                "record the same prompts, or use Patch"
            )
        return place.here(recorded, self.place, present).to(present)


@dataclass(frozen=True, eq=False, repr=False)
class Interchange(Edit):
    """Give a part of each base example the value it has in a source example (Geiger et al. 2023, section 2).

    source: Activations, or the part's values [source, pos, ...]. examples: [batch], the source example of each base
    example; default the one with the same number. source_positions: the source position that is read, one number or
    [batch], written at every edited position; default the same position as in the base. With a Subspace or Direction
    only its coordinates are interchanged (DAS), and gradients reach its basis.

    Raises InputError for a source example that is not there, InterventionError when the numbers do not fit the run.
    """

    source: Source = field(kw_only=True)
    examples: Int[Tensor, " batch"] | None = None
    source_positions: int | Int[Tensor, " batch"] | None = None
    positions: Positions = None

    def value(self, present: Tensor, place: Place) -> Tensor:
        values = values_of(self.source, self.part)
        row = self._rows(len(present), len(values)).to(values.device)
        if self.source_positions is None:
            return place.here(values[row], self.place, present).to(present)
        axis = token_axis(self.place)
        at = torch.as_tensor(self.source_positions, device=values.device).expand(len(present))
        if int(at.max()) >= values.shape[axis] or int(at.min()) < 0:
            raise InputError(
                f"Interchange at {self.place}: source positions {int(at.min())} to {int(at.max())} of "
                f"{values.shape[axis]} tokens; they count from 0"
            )
        return values.movedim(axis, 1)[row, at].unsqueeze(1).movedim(1, axis).to(present)

    def _rows(self, batch: int, known: int) -> Tensor:
        rows = torch.arange(batch) if self.examples is None else torch.as_tensor(self.examples)
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
    "resample": the value of another example of the reference, drawn without fixed points by `seed`.
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
        if self.mode == "resample":
            values = values[derangement(len(values), self.seed).to(values.device)]
        return place.here(values, self.place, present).to(present)


def mean_of(values: Tensor, tokens: Tokens | None, site: Site) -> Tensor:
    """Mean over the real positions: [batch, pos, ...] -> [...]."""
    if tokens is None:
        return values.mean((0, 1))
    return values[tokens.real_at(site).to(values.device)].mean(0)


def derangement(n: int, seed: int, lengths: Int[Tensor, " n"] | None = None) -> Int[Tensor, " n"]:
    """A permutation of n without fixed points: each gets the one before it in a random order, the first gets the last.

    lengths: order by length first and at random within a length, so that partners have (nearly) equal lengths.
    Raises InputError for n < 2.
    """
    if n < 2:
        raise InputError("resample ablation needs at least 2 reference examples")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    if lengths is not None:
        order = order[lengths.cpu()[order].argsort(stable=True)]
    result = torch.empty_like(order)
    result[order] = order.roll(1)
    return result


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
        mask = mask_of(edit.positions, place.real, place.named_positions)
        for site, tensor in apply(edit, made, place).items():
            before = chosen.get(site, torch.zeros_like(place.real))
            chosen[site] = None if mask is None or before is None else before | mask
            made[site] = tensor
    return [Patch(site, source=made[site], positions=mask) for site, mask in chosen.items()]
