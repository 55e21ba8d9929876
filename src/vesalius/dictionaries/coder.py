"""SparseCoder: what every fitted dictionary of this room offers.

`Dictionary` (one set of latents), `CrossLayerTranscoder` (one set per layer) and `StoredLayer` (one layer of such, on
disk) are the three there are.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from vesalius.coder import Coder, SiteTensors
from vesalius.directions import Direction
from vesalius.site import Site

Reconstruction = Tensor | tuple[Tensor, ...]
"""One tensor [..., d_out] for a coder that reconstructs one site, else a tuple in the order of `out_sites`."""


@runtime_checkable
class SparseCoder(Coder, Protocol):
    """A Coder that also decodes: activations of some sites to latents, latents to activations of some sites."""

    @property
    def row_norm(self) -> str:
        """How each row is normalised before encoding: `none`, `layer_norm`, `constant_norm` or `centred`."""
        ...

    @property
    def decodes_alone(self) -> bool:
        """Whether reconstruct(x) is decode(encode(x)): there is no skip, and no row is normalised."""
        ...

    def encode_sparse(self, x: SiteTensors) -> tuple[Tensor, Tensor]:
        """(indices, values), both [..., active], strongest first; rows with fewer are filled with value 0."""
        ...

    def decode(self, latents: Tensor) -> Reconstruction:
        """Activations from latents [..., latent]."""
        ...

    def decode_sparse(self, indices: Tensor, values: Tensor) -> Reconstruction:
        """Activations from what `encode_sparse` gives."""
        ...

    def reconstruct(self, x: SiteTensors) -> Reconstruction:
        """decode(encode(x)), plus the linear skip where there is one."""
        ...

    def direction(self, index: int, site: Site | str | None = None) -> Direction:
        """What one latent writes at an output site, as a unit vector."""
        ...

    def written(self, index: int, site: Site | str | None = None) -> Tensor:
        """[d_out] what one unit of a latent adds to the activations at an output site."""
        ...
