"""Held: edits that all runs of a sweep have in common, such as "with head A ablated, patch head B".

The base run is recorded with them. In a replay a held part is written with the base run's value, whatever the variant
did before it. That is the same as the edit itself, as long as its value does not depend on the run it is made in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from vesalius.errors import InputError
from vesalius.inputs import Tokens
from vesalius.intervention import Ablate, Freeze, Interchange, Intervention, Patch, mask_of
from vesalius.model.products import COMPUTE
from vesalius.patching.edits import Table, sources
from vesalius.patching.flat import Rows
from vesalius.patching.record import Record
from vesalius.patching.what import What, place_of, what_of
from vesalius.site import Site

FIXED = (Ablate, Freeze, Interchange, Patch)
"""Interventions whose value is the same whatever else is edited."""


@dataclass(frozen=True, eq=False)
class Held:
    """A part that keeps the base run's value at some positions. where: [example, pos]."""

    what: What
    where: Bool[Tensor, "example pos"]

    def values(self, base: Record) -> Tensor:
        """The base run's value: of the whole site, or of the Part."""
        whole = base.at(place_of(self.what)[0])
        return whole if isinstance(self.what, Site) else self.what.read(whole)

    def table(self, base: Record, rows: Rows) -> Table | None:
        """Its edits in a batch: for every row that begins early enough, one per stretch of positions."""
        site, index = place_of(self.what)
        assert site.layer is not None
        found = [
            (row, first, stop)
            for row in (rows.layer <= site.layer).nonzero()[:, 0].tolist()
            for first, stop in _stretches(self.where[rows.example[row]])
        ]
        if not found:
            return None
        row, first, stop = torch.tensor(found).T
        part = None if isinstance(self.what, Site) else self.what
        example = rows.example[row]
        return Table(
            site, sources({site: self.values(base)}), row, torch.full_like(row, index), example, first, stop, part
        )

    def patch(self, base: Record, example: Tensor, width: int | None) -> Patch:
        """The same as a hook, for some examples' run of this width."""
        site, index = place_of(self.what)
        values, where = self.values(base)[example, :width], self.where[example, :width]
        if not isinstance(self.what, Site):
            return Patch(self.what, source=values, positions=where)
        return Patch(
            site if index < 0 else site[index], source=values if index < 0 else values.select(2, index), positions=where
        )


def _stretches(where: Bool[Tensor, " pos"]) -> list[tuple[int, int]]:
    """[first, stop) of every unbroken stretch of True."""
    edge = torch.nn.functional.pad(where.int(), (1, 1)).diff()
    return list(zip((edge > 0).nonzero()[:, 0].tolist(), (edge < 0).nonzero()[:, 0].tolist(), strict=True))


@dataclass(frozen=True, eq=False)
class Under:
    """What all edited runs of a sweep have in common.

    held: parts that keep the base run's value. patterns: attention patterns are the base run's, so that edits act
    through values alone. compute: "float32", or "bfloat16" for products with rounded factors.
    """

    held: tuple[Held, ...] = ()
    patterns: bool = False
    compute: str = "float32"

    def __post_init__(self) -> None:
        if self.compute not in COMPUTE:
            raise InputError(f"compute must be one of {', '.join(COMPUTE)}; got {self.compute!r}")


PLAINLY = Under()


def held_of(given: Sequence[Intervention], tokens: Tokens) -> tuple[Held, ...]:
    """What interventions hold still. Raises InputError for one whose value depends on the run it is made in."""
    found = []
    for edit in given:
        if not isinstance(edit, FIXED):
            names = ", ".join(kind.__name__ for kind in FIXED)
            raise InputError(
                f"given= takes edits whose value does not depend on the run ({names}); {type(edit).__name__} at "
                f"{edit.part.site} does. Use Model.run for it"
            )
        what = what_of(edit.part)
        place_of(what)
        mask = mask_of(edit.positions, tokens.real, tokens.named_positions)
        found.append(Held(what, tokens.real if mask is None else mask & tokens.real))
    return tuple(found)
