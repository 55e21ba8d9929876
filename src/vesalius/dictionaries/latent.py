"""Latent: one unit of a dictionary as a Part."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from vesalius.dictionaries.coder import SparseCoder
from vesalius.dictionaries.rows import normalised
from vesalius.dictionaries.unknown_sites import known_site
from vesalius.parts import At, HasLatents, Ref, Unit, remember
from vesalius.site import Site


@dataclass(frozen=True, repr=False)
class Latent:
    """Latent `index` of a dictionary: of an SAE, a transcoder, a crosscoder or a layer of a cross-layer transcoder.

    It is read where the dictionary reads and written where it writes. Giving it a value moves the activations at every
    output site along its decoder row there; the other latents, and what the dictionary leaves unexplained, stay as
    they are. Where it writes at several sites, that is: as in the run without the edit. What the edit at the first site
    does to the later ones is not added on top (constrained patching, Ameisen et al. 2025, "Steering").

    owner: the coder that counts this latent among its own, under another number, and that number (the layers of a
    cross-layer transcoder). Raises InputError, when it is used, for a dictionary whose file did not say where it reads
    or writes.
    """

    coder: SparseCoder
    index: int
    owner: tuple[HasLatents, int] | None = None

    @property
    def dictionary(self) -> HasLatents:
        """The dictionary that counts it."""
        return self.coder if self.owner is None else self.owner[0]

    @property
    def number(self) -> int:
        """Its number in `dictionary`."""
        return self.index if self.owner is None else self.owner[1]

    @property
    def site(self) -> Site:
        """The (first) site that is read."""
        return self.reads[0]

    @property
    def reads(self) -> tuple[Site, ...]:
        """The sites that the dictionary reads."""
        return tuple(map(known_site, self.coder.in_sites))

    @property
    def writes(self) -> tuple[Site, ...]:
        """The sites that the dictionary writes, in the order of the forward pass."""
        return tuple(sorted(map(known_site, self.coder.out_sites), key=lambda site: site.order))

    def value(self, at: At) -> Float[Tensor, "*example_pos"]:
        """[example, pos], zero where inactive."""
        read = [Unit(site).read(at[site.whole]) for site in self.reads]
        found = self.coder.encode(read[0] if len(read) == 1 else read, latents=[self.index])[..., 0]
        # The dictionary may lie elsewhere than the model.
        return found.to(read[0].device)

    def written(self, at: At, value: Tensor) -> dict[Site, Tensor]:
        """Copies of the whole tensors in which its contribution is `value` times its decoder row, site by site."""
        change = value - self.value(at)
        return {site.whole: self._moved(site, at[site.whole], change) for site in self.writes}

    def _moved(self, site: Site, whole: Tensor, change: Tensor) -> Tensor:
        unit = Unit(site)
        inside = unit.read(whole)
        wide = inside.reshape(*change.shape, -1)  # heads [..., head, d_head] count as one width
        # A dictionary that normalises rows reads and writes one site: the row's own size is the unit of its latents.
        _, units = normalised(wide, self.coder.row_norm)
        moved = wide + change[..., None].to(wide.device) * units.size * self.rows[site].to(inside)
        return unit.write(whole, moved.reshape(inside.shape))

    @cached_property
    def rows(self) -> dict[Site, Float[Tensor, " d_out"]]:
        """What one unit of it adds to the activations, by output site."""
        return {site: self.coder.written(self.index, site) for site in self.writes}

    @property
    def row(self) -> Float[Tensor, " d_out"]:
        """What one unit of it adds at the first output site."""
        return self.coder.written(self.index)

    @property
    def ref(self) -> Ref:
        """Reference by the dictionary's content hash and the number of the latent."""
        remember(self.dictionary.content_hash, self.dictionary)
        sites = {"reads": [str(site) for site in self.reads], "writes": [str(site) for site in self.writes]}
        return {"kind": "latent", **sites, "index": self.number, "dictionary": self.dictionary.content_hash}

    def __str__(self) -> str:
        return f"{self.site} latent {self.number}"

    def __repr__(self) -> str:
        return f"Latent({self})"
