"""Latent: one unit of a dictionary as a Part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from vesalius.dictionaries.coder import SparseCoder
from vesalius.dictionaries.rows import normalised
from vesalius.dictionaries.unknown_sites import known_site
from vesalius.errors import InputError, InterventionError
from vesalius.parts import Unit
from vesalius.site import Site


@dataclass(frozen=True, eq=False)
class Latent:
    """Latent `index` of a dictionary that reads one site.

    read: its value from the activations at that site. write: the activations moved along its decoder row until it would
    have the value, with other latents and the error left as they are; only where the dictionary rebuilds what it reads.

    read raises InputError for a dictionary that reads several sites (use `encode`); write raises InterventionError for
    a transcoder, whose latents are read at one site and written at another: `intervention.Replace` goes between sites.
    """

    coder: SparseCoder
    index: int

    @property
    def site(self) -> Site:
        """The site that is read. Raises InputError when the dictionary's file did not say which."""
        if len(self.coder.in_sites) != 1:
            raise InputError(
                f"latent {self.index} reads {len(self.coder.in_sites)} sites, so it is no part of one; "
                "encode(activations, latents=[...]) gives its values"
            )
        return known_site(self.coder.in_sites[0])

    def read(self, whole: Tensor) -> Tensor:
        """[batch, pos] value, zero where inactive."""
        return self.coder.encode(Unit(self.site).read(whole), latents=[self.index])[..., 0]

    def write(self, whole: Tensor, value: Tensor) -> Tensor:
        """A copy of the whole tensor in which the latent's contribution is `value` times its decoder row."""
        if self.coder.out_sites != self.coder.in_sites:
            raise InterventionError(
                f"latent {self.index} is read at {self.site} and written at "
                f"{', '.join(map(str, self.coder.out_sites))}; it cannot be edited in one tensor"
            )
        inside = Unit(self.site).read(whole)
        change = value - self.read(whole)
        wide = inside.reshape(*change.shape, -1)  # heads [..., head, d_head] count as one width
        _, units = normalised(wide, self.coder.row_norm)
        moved = inside + (change[..., None] * units.size * self.row.to(inside)).reshape(inside.shape)
        return Unit(self.site).write(whole, moved)

    @property
    def row(self) -> Float[Tensor, " d_out"]:
        """What one unit of it adds to the activations at the (first) output site."""
        return self.coder.written(self.index)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "latent", "site": str(self.site), "index": self.index, "dictionary": self.coder.content_hash,
        }  # fmt: skip

    def __str__(self) -> str:
        return f"{self.site} latent {self.index}"
