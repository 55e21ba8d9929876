"""Coder: what every fitted sparse dictionary offers, and how activations are handed to one.

`Dictionary` (one set of latents) and `CrossLayerTranscoder` (one set per layer) are the two coders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from vesalius.dictionaries.places import known_site
from vesalius.errors import InputError, NotFiniteError
from vesalius.parts import Direction, Part
from vesalius.site import Site

CHUNK = 1024
Values = Tensor | Sequence[Tensor] | Mapping[Any, Tensor]
"""Activations: one tensor [..., width] for a coder that reads one site; for several a sequence in the order of
`in_sites`, or a mapping from Site (or its name) to tensor, such as `Activations`."""
Rebuilt = Tensor | tuple[Tensor, ...]
"""One tensor for a coder that rebuilds one site, else a tuple in the order of `out_sites`."""


@runtime_checkable
class Coder(Protocol):
    """A fitted sparse coder: activations of some sites to latents, latents to activations of some sites."""

    @property
    def in_sites(self) -> tuple[Site, ...]: ...

    @property
    def out_sites(self) -> tuple[Site, ...]: ...

    @property
    def n_latents(self) -> int:
        """Of all layers together."""
        ...

    @property
    def row_norm(self) -> str:
        """How each row is normalised before encoding: `none`, `layer_norm` or `constant_norm`."""
        ...

    @property
    def decodes_alone(self) -> bool:
        """Whether reconstruct(x) is decode(encode(x)): there is no skip, and no row is normalised."""
        ...

    @property
    def content_hash(self) -> str:
        """Of the weights and everything else that decides what it computes."""
        ...

    def encode(self, x: Values, latents: Sequence[int] | None = None) -> Tensor:
        """[..., latent], zero where inactive; only the latents with these numbers when given."""
        ...

    def encode_sparse(self, x: Values) -> tuple[Tensor, Tensor]:
        """(indices, values), both [..., active], strongest first; rows with fewer are filled with value 0."""
        ...

    def decode(self, latents: Tensor) -> Rebuilt:
        """Activations from latents [..., latent]."""
        ...

    def decode_sparse(self, indices: Tensor, values: Tensor) -> Rebuilt:
        """Activations from what `encode_sparse` gives."""
        ...

    def reconstruct(self, x: Values) -> Rebuilt:
        """decode(encode(x)), plus the linear skip where there is one."""
        ...

    def latent(self, index: int) -> Part:
        """One latent as a Part."""
        ...

    def direction(self, index: int, site: Site | str | None = None) -> Direction:
        """What one latent writes at an output site, as a unit vector."""
        ...

    def written(self, index: int, site: Site | str | None = None) -> Tensor:
        """[d_out] what one unit of a latent adds to the activations at an output site."""
        ...


def listed(x: Values, sites: Sequence[Site]) -> list[Tensor]:
    """The tensors of these sites, in order. Raises InputError when they are not the right number."""
    if isinstance(x, Tensor):
        tensors = [x]
    elif isinstance(x, Mapping):
        tensors = [_at(x, site) for site in sites]
    else:
        tensors = list(x)
    if len(tensors) != len(sites):
        raise InputError(
            f"{len(tensors)} tensor(s) given for {len(sites)} site(s) ({', '.join(map(str, sites))}); give one each"
        )
    return tensors


def _at(x: Mapping[Any, Tensor], site: Site) -> Tensor:
    if site in x:
        return x[site]
    if str(site) in x:
        return x[str(site)]
    known_site(site)
    raise InputError(f"no activations at {site}; given: {', '.join(map(str, x)) or 'none'}")


def as_rows(tensor: Tensor, width: int, site: Site) -> tuple[Tensor, torch.Size]:
    """([n, width], shape before the width). Heads [..., head, d_head] count as one width.

    Raises InputError naming both widths, NotFiniteError for NaN and infinity.
    """
    for axes in (1, 2):
        if tensor.ndim >= axes and tensor.shape[-axes:].numel() == width:
            rows = tensor.reshape(-1, width)
            if not bool(torch.isfinite(rows).all()):
                raise NotFiniteError(f"the activations at {site} hold NaN or infinity")
            return rows, tensor.shape[:-axes]
    raise InputError(
        f"the activations at {site} have width {tensor.shape[-1] if tensor.ndim else 0} (shape {tuple(tensor.shape)}), "
        f"and the dictionary expects {width}"
    )


def aligned_rows(
    x: Values, sites: Sequence[Site], widths: Sequence[int], like: Tensor
) -> tuple[list[Tensor], torch.Size]:
    """Rows [n, width] per site with dtype and device of `like`, and the shape before the width.

    Raises InputError naming both shapes when the sites don't have the same rows; and as `listed` and `as_rows`.
    """
    found = [as_rows(t, width, site) for t, width, site in zip(listed(x, sites), widths, sites, strict=True)]
    for (_, lead), site in zip(found, sites, strict=True):
        if lead != found[0][1]:
            raise InputError(
                f"the activations at {sites[0]} have rows {tuple(found[0][1])} and those at {site} {tuple(lead)}: "
                "row i of each must be the same token"
            )
    return [rows.to(like) for rows, _ in found], found[0][1]


def chunks_of(rows: Sequence[Tensor]) -> list[list[Tensor]]:
    """The rows of every site in pieces of at most CHUNK, so that dense latents are never all there at once."""
    starts = range(0, max(len(rows[0]), 1), CHUNK)
    return [[tensor[start : start + CHUNK] for tensor in rows] for start in starts]


def site_number(site: Site | str, sites: Sequence[Site]) -> int:
    """Place of a site in a list. Raises InputError listing what is there."""
    wanted = Site.parse(site)
    if wanted not in sites:
        raise InputError(f"this dictionary does not write at {wanted}; it writes at {', '.join(map(str, sites))}")
    return list(sites).index(wanted)


def check_latents(indices: Sequence[int], n_latents: int) -> list[int]:
    """Latent numbers that exist. Raises InputError naming the first that does not."""
    for index in indices:
        if not 0 <= index < n_latents:
            raise InputError(f"there is no latent {index}: this dictionary has {n_latents}, numbered from 0")
    return [int(index) for index in indices]


def joined_sparse(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Chunks of rows as one, filled to the width of the widest with index 0 and value 0."""
    width = max(indices.shape[1] for indices, _ in parts)
    filled = [
        tuple(torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in (indices, values))
        for indices, values in parts
    ]
    return torch.cat([indices for indices, _ in filled]), torch.cat([values for _, values in filled])
