"""What an intervention is, and how one is applied to a tensor."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from vesalius.errors import InterventionError
from vesalius.intervention.place import Place, Positions, mask_of, spread
from vesalius.parts import Part


@runtime_checkable
class Intervention(Protocol):
    """Something that changes one tensor of a run."""

    @property
    def part(self) -> Part: ...

    @property
    def positions(self) -> Positions: ...

    def value(self, whole: Tensor, place: Place) -> Tensor:
        """The part's new value, broadcastable to its present one. whole: the site's tensor, tokens as in `place`."""
        ...

    def to_json(self) -> dict[str, Any]: ...


@runtime_checkable
class Reader(Protocol):
    """An intervention that needs other sites of the same run; `given` makes the edit once they are read."""

    @property
    def reads(self) -> tuple[Part, ...]: ...

    def given(self, *read: Tensor) -> Intervention:
        """The edit, now that the sites of `reads` have these whole tensors."""
        ...


def apply(intervention: Intervention, whole: Tensor, place: Place) -> Tensor:
    """The whole tensor after one intervention; positions outside the choice keep their value bit for bit.

    An edit is computed in the tensor's own precision, also under autocast.
    """
    part = intervention.part
    chosen = place.chosen
    if chosen is None:
        chosen = mask_of(intervention.positions, place.real, place.named_positions)
    with _own_precision(whole):
        present = part.read(whole)
        new = intervention.value(whole, replace(place, chosen=chosen))
        try:
            new = new.to(present).expand_as(present)
        except RuntimeError:
            raise InterventionError(
                f"{type(intervention).__name__} at {part.site}: the new value has shape {tuple(new.shape)}, "
                f"the present one {tuple(present.shape)}"
            ) from None
        edited = part.write(whole, new)
    return edited if chosen is None else torch.where(spread(chosen.to(whole.device), whole, part.site), edited, whole)


def _own_precision(whole: Tensor) -> AbstractContextManager[Any]:
    kind = whole.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
