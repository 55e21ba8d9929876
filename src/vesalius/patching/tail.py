"""Tail: the rest of a forward pass, run again from other values at one place of each prompt, with gradients if wanted.

What lies below the place, and before it in the prompt, is recorded once: a replay runs only the later layers, of the
later positions. So training what is written there (a rotation, a direction) costs what that little takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vesalius.errors import InputError
from vesalius.inputs import Inputs, Tokens
from vesalius.intervention import Patch, Positions, mask_of
from vesalius.model import Model
from vesalius.parts import Unit
from vesalius.patching.edits import Edits, Rows, Table
from vesalius.patching.record import Recording, record, taken
from vesalius.patching.replay import Replay
from vesalius.patching.scoring import final_norm, logits_of
from vesalius.patching.targets import normal
from vesalius.site import Site

_REPLAYED = ("resid_pre", "resid_post", "embed")


@dataclass(frozen=True, eq=False)
class Tail:
    """A recorded run of prompts (or other inputs), and the place [example] in each where other values go in."""

    base: Recording
    site: Site
    position: Int[Tensor, " example"]

    @classmethod
    def of(cls, model: Model, inputs: Inputs, site: Site | str, positions: Positions = "last") -> Tail:
        """Record a run. positions: one of each prompt, as interventions name them.

        Raises InputError for a site of several numbers per unit (a whole tensor of heads), or for several positions.
        """
        where = Site.parse(site)
        model.check_site(where)
        base = record(model, inputs, [where.whole])
        return cls(base, where, _one_each(base, inputs, where, positions))

    def __len__(self) -> int:
        return len(self.base)

    @property
    def values(self) -> Float[Tensor, "example width"]:
        """What the recorded run has there."""
        whole = Unit(self.site).read(self.base[self.site.whole])
        found = whole if whole.ndim == 2 else whole[torch.arange(len(self)), self.position.to(whole.device)]
        return found.flatten(1)

    @property
    def replayed(self) -> bool:
        """Whether only the rest is run; where not, whole forwards are."""
        return not self.base.reason and self.site.kind in _REPLAYED and self.site.index is None

    def logits(
        self, values: Float[Tensor, "row width"], rows: Int[Tensor, " row"] | None = None, *, grad: bool = False
    ) -> Float[Tensor, "row vocab"]:
        """Logits at each prompt's last token with these values at the place. rows: of which examples, default all."""
        some = torch.arange(len(self)) if rows is None else rows.cpu()
        if self.replayed:
            return self._replayed(values, some, grad)
        return self._whole(values, some, grad)

    def _replayed(self, values: Tensor, rows: Tensor, grad: bool) -> Tensor:
        site = normal(self.site)[0]
        assert site.layer is not None
        start, end = self.position[rows], self.base.lengths[rows].cpu()
        number, unit = torch.arange(len(rows)), torch.full((len(rows),), -1)
        table = Table(site, (values[:, None],), number, unit, number, start, start + 1)
        run = Rows(rows, torch.full_like(rows, site.layer), start, end)
        hidden, _ = Replay(self.base, run, Edits([table]), grad=grad).run()
        return logits_of(self.base, final_norm(self.base, hidden, grad), None, grad)

    def _whole(self, values: Tensor, rows: Tensor, grad: bool) -> Tensor:
        model, inputs = self.base.model, taken(self.base.model, self.base.inputs, rows)
        present = Unit(self.site).read(self.base[self.site.whole])[rows]
        positions: Positions = None
        given = values.reshape(len(rows), *present.shape[2:]) if present.ndim > 2 else values
        if present.ndim > 2:
            given = given[:, None].expand_as(present)
            positions = self.position[rows]
        logits = model.run(
            inputs, interventions=[Patch(self.site, source=given, positions=positions)], grad=grad
        ).logits
        return logits if logits.ndim == 2 else logits[torch.arange(len(rows)), self.base.lengths[rows].cpu() - 1]


def _one_each(base: Recording, inputs: Inputs, site: Site, positions: Positions) -> Int[Tensor, " example"]:
    if not isinstance(inputs, Tokens):
        return torch.zeros(len(base), dtype=torch.long)
    mask = mask_of(positions, base.tokens.real, base.tokens.named_positions)
    if mask is None or not bool((mask.sum(1) == 1).all()):
        raise InputError(f"one position of each prompt is edited at {site}; got {positions!r}")
    return mask.int().argmax(1)


def in_batches(count: int, size: int = 64) -> Sequence[Int[Tensor, " row"]]:
    """The numbers under count, a few at a time."""
    return torch.arange(count).split(size)
