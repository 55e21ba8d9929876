"""Unexplained: what a dictionary leaves over of a tensor, as a Part beside its latents (an error node)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from vesalius.dictionaries.coder import SparseCoder
from vesalius.dictionaries.unknown_sites import known_site
from vesalius.errors import InputError
from vesalius.parts import At, Ref, Unit, remember
from vesalius.site import Site


@dataclass(frozen=True, repr=False)
class Unexplained:
    """The activations that a dictionary reconstructs, less the reconstruction: [example, pos, d_out].

    Giving it a value leaves all latents as they are (Marks et al. 2025, section 2, "error terms"). Raises InputError
    for a dictionary that writes at several sites.
    """

    coder: SparseCoder

    def __post_init__(self) -> None:
        if len(self.coder.out_sites) != 1:
            raise InputError(
                f"what is left over is of one site; this dictionary writes at {len(self.coder.out_sites)}: "
                f"{', '.join(map(str, self.coder.out_sites))}"
            )

    @property
    def site(self) -> Site:
        """The site that is reconstructed."""
        return known_site(self.coder.out_sites[0])

    @property
    def reads(self) -> tuple[Site, ...]:
        """What the dictionary reads, and the site that it reconstructs."""
        return tuple(dict.fromkeys((*map(known_site, self.coder.in_sites), self.site)))

    @property
    def writes(self) -> tuple[Site, ...]:
        """The site that is reconstructed."""
        return (self.site,)

    def value(self, at: At) -> Float[Tensor, "example pos d_out"]:
        """What is there, less the reconstruction."""
        given = [Unit(known_site(site)).read(at[site.whole]) for site in self.coder.in_sites]
        made = self.coder.reconstruct(given[0] if len(given) == 1 else given)
        assert isinstance(made, Tensor)
        there = Unit(self.site).read(at[self.site.whole])
        return (there.reshape(*there.shape[:2], -1) - made.to(there)).reshape(there.shape)

    def written(self, at: At, value: Tensor) -> dict[Site, Tensor]:
        """A copy of the tensor with this left over."""
        unit, whole = Unit(self.site), at[self.site.whole]
        return {self.site.whole: unit.write(whole, unit.read(whole) + (value - self.value(at)).to(whole))}

    @property
    def ref(self) -> Ref:
        """Reference by the dictionary's content hash."""
        remember(self.coder.content_hash, self.coder)
        return {"kind": "unexplained", "site": str(self.site), "dictionary": self.coder.content_hash}

    def __str__(self) -> str:
        return f"{self.site} unexplained"

    def __repr__(self) -> str:
        return f"Unexplained({self})"
