"""Changes: where an edit's values differ from what the base run has there. Elsewhere it provably changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vesalius.patching.donors import Donor
from vesalius.patching.record import Record
from vesalius.patching.what import What, place_of
from vesalius.site import Site


class Changes:
    """Compares a donor's values with the base run's, bit for bit, once per site."""

    def __init__(self, base: Record, donor: Donor) -> None:
        self.base, self.donor = base, donor
        self._sites: dict[Site, Tensor] = {}

    def first(self, whats: Sequence[What]) -> Int[Tensor, " example"]:
        """First position where any of them changes something; past the end where none does."""
        width = self.base.tokens.ids.shape[1]
        found = torch.full((len(self.base),), width)
        for what in whats:
            changed = self._of(what)
            found = torch.minimum(found, torch.where(changed.any(1), changed.long().argmax(1), width))
        return found

    def live(self, whats: Sequence[What], position: int | None) -> Bool[Tensor, " example"]:
        """Whether any of them changes something, at this position or anywhere."""
        found = torch.zeros(len(self.base), dtype=torch.bool)
        for what in whats:
            changed = self._of(what)
            if position is None:
                found |= changed.any(1)
            elif position < changed.shape[1]:
                found |= changed[:, position]
        return found

    def _of(self, what: What) -> Bool[Tensor, "example pos"]:
        """Real positions, from the donor's first on, at which the values differ."""
        site, index = place_of(what)
        real = self.base.real_at(site)
        reach = real & (torch.arange(real.shape[1]) >= self.donor.first[:, None])
        if self.donor.adds:
            return reach
        if not isinstance(what, Site):
            return reach & self._differs(what.read(self.base.at(site)), self.donor.values(what), real, 2)
        if site not in self._sites:
            self._sites[site] = self._differs(self.base.at(site), self.donor.values(site), real, 3)
        differs = self._sites[site]
        if differs.ndim == 3:
            differs = differs.any(-1) if index < 0 else differs[:, :, index]
        return reach & differs

    def _differs(self, base: Tensor, values: Tensor, real: Tensor, axes: int) -> Tensor:
        """True where any number behind the first `axes` axes differs; everywhere, when these are not the tokens'."""
        if base.shape[:2] != real.shape or values.ndim != base.ndim:
            return torch.ones_like(real)
        differs = base != (values[self.donor.example] if values.shape[0] > 1 else values)
        return differs if differs.ndim <= axes else differs.flatten(axes).any(-1)
