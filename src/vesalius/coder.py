"""Coder: what a sparse dictionary offers to whoever studies its latents, and how activations are given to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from vesalius.parts import Part
from vesalius.site import Site

SiteTensors = Tensor | Sequence[Tensor] | Mapping[Any, Tensor]
"""Activations for a coder: one tensor [..., width] when it reads one site; for several a sequence in the order of
`in_sites`, or a mapping from Site (or its name) to tensor, such as `Activations`."""


@runtime_checkable
class Coder(Protocol):
    """From activations at some sites to latents, and from a latent to what it adds at some sites."""

    @property
    def in_sites(self) -> tuple[Site, ...]:
        """Sites that are read."""
        ...

    @property
    def out_sites(self) -> tuple[Site, ...]:
        """Sites that are reconstructed; the same as `in_sites` for an autoencoder."""
        ...

    @property
    def n_latents(self) -> int:
        """Number of latents, of all layers together."""
        ...

    @property
    def content_hash(self) -> str:
        """Of the weights and everything else that decides what it computes."""
        ...

    def encode(self, x: SiteTensors, latents: Sequence[int] | None = None) -> Tensor:
        """[..., latent], zero where inactive; only the latents with these numbers when given."""
        ...

    def decoder_rows(self, site: Site | str | None = None) -> Tensor:
        """[latent, d_out] what one unit of each latent adds to the activations at an output site (default: the one)."""
        ...

    def latent(self, index: int) -> Part:
        """One latent as a Part."""
        ...
