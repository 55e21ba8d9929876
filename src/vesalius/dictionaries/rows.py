"""Rows: activations as a dictionary takes them, one row per token and site, checked, aligned and normalised.

Dictionaries with `row_norm` normalise each row before encoding and undo it after decoding. `layer_norm` subtracts the
row's mean and divides by its standard deviation (Gao et al. 2024, A.1; OpenAI's and some SAELens dictionaries).
`constant_norm` gives each row the norm sqrt(width) (SAELens). `centred` only subtracts the row's mean, as
TransformerLens does by centring the weights that write to the stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.coder import SiteTensors
from vesalius.dictionaries.coder import Reconstruction
from vesalius.dictionaries.unknown_sites import known_site
from vesalius.errors import InputError, NotFiniteError, UnknownNameError
from vesalius.site import Site

CHUNK = 1024
"""Rows that are encoded together, so that dense latents of all rows are never there at once."""
ROW_NORMS = ("none", "layer_norm", "constant_norm", "centred")
# What both libraries add to the standard deviation. It is not added back when the norm is undone; nor is it here.
_EPS = 1e-5
_TINY = 1e-30


def tensors_at(x: SiteTensors, sites: Sequence[Site]) -> list[Tensor]:
    """The tensors of these sites, in order. Raises InputError when they are not the right number."""
    if isinstance(x, Tensor):
        tensors = [x]
    elif isinstance(x, Mapping):
        tensors = [_tensor_at(x, site) for site in sites]
    else:
        tensors = list(x)
    if len(tensors) != len(sites):
        raise InputError(
            f"{len(tensors)} tensor(s) given for {len(sites)} site(s) ({', '.join(map(str, sites))}); give one each"
        )
    return tensors


def _tensor_at(x: Mapping[Any, Tensor], site: Site) -> Tensor:
    if site in x:
        return x[site]
    if str(site) in x:
        return x[str(site)]
    known_site(site)
    raise InputError(f"no activations at {site}; given: {', '.join(map(str, x)) or 'none'}")


def as_rows(tensor: Tensor, width: int, site: Site) -> tuple[Float[Tensor, "n width"], torch.Size]:
    """([n, width], shape before the width). Heads [..., head, d_head] count as one width.

    Raises InputError naming both widths, NotFiniteError for NaN and infinity.
    """
    # A site with heads is [..., head, d_head]; whoever trained on it saw them side by side.
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
    x: SiteTensors, sites: Sequence[Site], widths: Sequence[int], like: Tensor
) -> tuple[list[Tensor], torch.Size]:
    """Rows [n, width] per site with dtype and device of `like`, and the shape before the width.

    Raises InputError naming both shapes when the sites don't have the same rows; and as `tensors_at` and `as_rows`.
    """
    # Checked one by one first, so that an error names the site that does not fit.
    found = [as_rows(t, width, site) for t, width, site in zip(tensors_at(x, sites), widths, sites, strict=True)]
    for (_, lead), site in zip(found, sites, strict=True):
        if lead != found[0][1]:
            raise InputError(
                f"the activations at {sites[0]} have rows {tuple(found[0][1])} and those at {site} {tuple(lead)}: "
                "row i of each must be the same token"
            )
    return [rows.to(like) for rows, _ in found], found[0][1]


def shaped(rows: Tensor, lead: Sequence[int]) -> Tensor:
    """Rows [n, width] in the shape they had before; of none the width is known too, where -1 would leave it open."""
    return rows.reshape(*lead, rows.shape[-1])


def chunks_of(rows: Sequence[Tensor]) -> list[list[Tensor]]:
    """The rows of every site in chunks of at most CHUNK rows."""
    starts = range(0, max(len(rows[0]), 1), CHUNK)
    return [[tensor[start : start + CHUNK] for tensor in rows] for start in starts]


def joined_sparse(chunks: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Sparse latents of chunks of rows as one, filled to the width of the widest with index 0 and value 0."""
    width = max(indices.shape[1] for indices, _ in chunks)
    filled = [
        tuple(torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in (indices, values))
        for indices, values in chunks
    ]
    return torch.cat([indices for indices, _ in filled]), torch.cat([values for _, values in filled])


def site_number(site: Site | str, sites: Sequence[Site]) -> int:
    """Position of a site in a list. Raises InputError listing what is there."""
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


def check_one_per_site(sites: Sequence[Site], **given: Sequence[object]) -> None:
    """Raises InputError naming what does not have one item for each site."""
    for name, items in given.items():
        if len(items) != len(sites) or not sites:
            raise InputError(f"{len(items)} of {name} for {len(sites)} site(s); give one each, at least one")


def check_row_norm(name: str) -> None:
    """Raises UnknownNameError listing the known ways to normalise rows."""
    if name not in ROW_NORMS:
        raise UnknownNameError("way to normalise rows", name, ROW_NORMS)


def check_shape(name: str, tensor: Tensor, wanted: tuple[int | None, ...]) -> None:
    """Raises InputError naming the tensor and both shapes. None in `wanted` stands for any size."""
    fits = tensor.ndim == len(wanted) and all(w in (None, size) for w, size in zip(wanted, tensor.shape, strict=True))
    if not fits:
        words = ", ".join("any" if size is None else str(size) for size in wanted)
        raise InputError(f"{name} must have shape [{words}]; got {tuple(tensor.shape)}")


@dataclass(frozen=True)
class Units:
    """What undoes the normalising of rows: times size, plus centre. Both are [..., 1], one number per row."""

    size: Tensor | float = 1.0
    centre: Tensor | float = 0.0

    def restored(self, rows: Tensor) -> Tensor:
        """Rows in the units of the activations."""
        return rows if isinstance(self.size, float) else rows * self.size + self.centre

    def reshaped(self, lead: Sequence[int]) -> Units:
        """The same for rows of another leading shape."""
        if isinstance(self.size, float):
            return self
        centre = self.centre.reshape(*lead, 1) if isinstance(self.centre, Tensor) else self.centre
        return Units(self.size.reshape(*lead, 1), centre)


def normalised(rows: Float[Tensor, "*lead width"], row_norm: str) -> tuple[Float[Tensor, "*lead width"], Units]:
    """Rows normalised, and what undoes it."""
    if row_norm == "none":
        return rows, Units()
    if row_norm == "constant_norm":
        size = rows.norm(dim=-1, keepdim=True).clamp(min=_TINY) / rows.shape[-1] ** 0.5
        return rows / size, Units(size)
    centre = rows.mean(-1, keepdim=True)
    centred = rows - centre
    if row_norm == "centred":
        return centred, Units(torch.ones_like(centre), centre)
    size = centred.std(-1, keepdim=True)
    return centred / (size + _EPS), Units(size, centre)


def unscaled(outputs: Sequence[Tensor], scales: Sequence[float], units: Sequence[Units]) -> Reconstruction:
    """What decoders gave, in the units of the activations: one tensor per site, or the tensor of the only site."""
    restored = tuple(
        unit.restored(rows if scale == 1.0 else rows / scale)
        for rows, scale, unit in zip(outputs, scales, units, strict=True)
    )
    return restored[0] if len(restored) == 1 else restored


def only_one(name: str, plural: str, tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) != 1:
        raise InputError(f"{name} is for dictionaries with one site there; this one has {len(tensors)}: see {plural}")
    return tensors[0]
