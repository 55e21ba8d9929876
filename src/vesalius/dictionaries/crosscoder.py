"""What a crosscoder says about sites or models: which latents are shared, which belong to one side only.

A latent's relative norm is the share of its decoder norm on side B: 0 for latents of A alone, 1 for latents of B alone,
.5 for shared ones (Lindsey et al. 2024). An L1 penalty fakes exclusive latents in two ways (Minder et al. 2025): it
shrinks a weak decoder side to zero and leaves the concept in that side's error ("complete shrinkage"), or two latents
take a side of a shared concept each ("latent decoupling"). Latent scaling catches both: it asks how much of the side's
error, and of its reconstruction, the latent would explain if its direction were scaled to fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vesalius.data import as_source
from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.rows import CHUNK, check_latents
from vesalius.errors import InputError
from vesalius.site import Site

EXCLUSIVE = 0.1
"""A latent counts as exclusive when its relative norm is within this of 0 or 1."""
ERROR_LIMIT, RECONSTRUCTION_LIMIT = 0.2, 0.5
"""Largest ratios of scaling factors at which an exclusive latent passes (Minder et al. 2025, section 4)."""
Sides = tuple[tuple[int, ...], tuple[int, ...]]


def relative_norms(
    coder: Dictionary, a: Sequence[Site | str] = (), b: Sequence[Site | str] = ()
) -> Float[Tensor, " latent"]:
    """Share of each latent's decoder norm that lies on side B: |d_B| / (|d_A| + |d_B|); .5 for rows that are zero.

    a, b: output sites of the two sides; default the two sites, or the sites of the two model tags. Norms are compared
    in the units of training, where each site has the same mean norm. Raises InputError when the sides are not clear.
    """
    norms = _norms(coder)
    left, right = (norms[:, list(side)].square().sum(1).sqrt() for side in _sides(coder, a, b))
    total = left + right
    return torch.where(total > 0, right / total.clamp(min=1e-30), 0.5)


def _norms(coder: Dictionary) -> Float[Tensor, "latent site"]:
    """Norms of decoder rows before scales were folded in."""
    scales = list(coder.metadata.get("trained_with", {}).get("out_scale", [])) if set(coder.out_scale) == {1.0} else []
    scales = scales if len(scales) == len(coder.decoders) else [1.0] * len(coder.decoders)
    return torch.stack([d.norm(dim=1) * scale for d, scale in zip(coder.decoders, scales, strict=True)], 1)


def _sides(coder: Dictionary, a: Sequence[Site | str], b: Sequence[Site | str]) -> Sides:
    sites = coder.out_sites
    if a and b:
        numbers = tuple(tuple(_number(site, sites) for site in side) for side in (a, b))
        return numbers[0], numbers[1]
    tags = sorted({site.tag for site in sites})
    if len(tags) == 2:
        groups = tuple(tuple(n for n, site in enumerate(sites) if site.tag == tag) for tag in tags)
        return groups[0], groups[1]
    if len(sites) == 2:
        return (0,), (1,)
    raise InputError(f"which sites are compared? Give a= and b=, out of {', '.join(map(str, sites))}")


def _number(site: Site | str, sites: Sequence[Site]) -> int:
    wanted = Site.parse(site)
    if wanted not in sites:
        raise InputError(f"{wanted} is none of the sites {', '.join(map(str, sites))}")
    return list(sites).index(wanted)


@dataclass(frozen=True, eq=False)
class Scaling:
    """Latent scaling of some latents, one number each. Ratios are of factors on the other side to those on its own.

    latents: [n] their numbers. norms: relative norms. error: how much of the other side's error the latent explains
    (near 1: shrunken away). reconstruction: how much of the other side's reconstruction (near 1: decoupled).
    """

    latents: Int[Tensor, " n"]
    norms: Float[Tensor, " n"]
    error: Float[Tensor, " n"]
    reconstruction: Float[Tensor, " n"]

    @property
    def exclusive(self) -> Bool[Tensor, " n"]:
        """True for latents that are exclusive by norm and by both ratios."""
        extreme = torch.minimum(self.norms, 1 - self.norms) < EXCLUSIVE
        return extreme & (self.error < ERROR_LIMIT) & (self.reconstruction < RECONSTRUCTION_LIMIT)


@torch.no_grad()
def latent_scaling(
    coder: Dictionary,
    data: Any,
    latents: Sequence[int] | None = None,
    *,
    n: int = 20_000,
    seed: int = 0,
    a: Sequence[Site | str] = (),
    b: Sequence[Site | str] = (),
) -> Scaling:
    """How far latents that look exclusive explain the side that they seem to be absent from (Minder et al. 2025).

    For latent values f and the unit direction d of the side a latent is strong on, the factor that best explains
    targets y is sum f (d . y) / sum f^2. Targets are the error, to which the latent's own part is added back on its own
    side, and the reconstruction. Both sides need sites of the same widths, since d is looked for in both.

    data: as for `train`. latents: which; default those whose relative norm is extreme. n: rows. Raises InputError for
    sides that are not clear or not equally wide.
    """
    source, sides = as_source(data), _sides(coder, a, b)
    widths = [[coder.out_widths[number] for number in side] for side in sides]
    if widths[0] != widths[1] or coder.in_sites != coder.out_sites:
        raise InputError(
            f"latent scaling needs sides of equal widths, read and reconstructed; got {widths[0]} and {widths[1]}"
        )
    norms = relative_norms(coder, a, b)
    extreme = (torch.minimum(norms, 1 - norms) < EXCLUSIVE).nonzero()[:, 0].tolist()
    which = torch.tensor(extreme if latents is None else check_latents(latents, coder.n_latents), dtype=torch.long)
    rows = [source.sample(n, seed=seed)[source.sites.index(site)] for site in coder.in_sites]
    own_is_b = norms[which] > 0.5
    directions = _directions(coder, sides, which, own_is_b)
    chunks = [
        _totals(coder, [part[at : at + CHUNK] for part in rows], sides, which, directions)
        for at in range(0, len(rows[0]), CHUNK)
    ]
    squares, error, reconstruction = (torch.stack(part).sum(0) for part in zip(*chunks, strict=True))
    # Side numbers of each latent: the one it is strong on, and the one it seems to be absent from.
    own, other = own_is_b.long(), 1 - own_is_b.long()
    columns = torch.arange(len(which))
    # The latent's own part belongs to what it has to explain on its own side: f times the norm of its row, along d.
    size = torch.where(own_is_b, _side_norm(coder, sides[1], which), _side_norm(coder, sides[0], which))
    own_error = error[own, columns] + size * squares
    ratio = lambda top, bottom: top / torch.where(bottom.abs() > 1e-12, bottom, torch.inf)  # noqa: E731
    return Scaling(
        which,
        norms[which],
        ratio(error[other, columns], own_error).float(),
        ratio(reconstruction[other, columns], reconstruction[own, columns]).float(),
    )


def _scaled(coder: Dictionary, tensors: Sequence[Tensor], side: Sequence[int]) -> Tensor:
    """A side's tensors beside each other in the units in which decoders are stored."""
    return torch.cat([tensors[number] * coder.out_scale[number] for number in side], -1).double()


def _side_norm(coder: Dictionary, side: Sequence[int], which: Tensor) -> Float[Tensor, " n"]:
    return torch.cat([coder.decoders[number][which] for number in side], 1).double().norm(dim=1)


def _directions(coder: Dictionary, sides: Sides, which: Tensor, own_is_b: Tensor) -> Float[Tensor, "n d"]:
    """Unit direction of each latent on its strong side."""
    both = [torch.cat([coder.decoders[number][which] for number in side], 1).double() for side in sides]
    rows = torch.where(own_is_b[:, None], both[1], both[0])
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)


def _totals(
    coder: Dictionary, rows: Sequence[Tensor], sides: Sides, which: Tensor, directions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Over rows, the sums of f^2 [n], and of f (d . y) [side, n] for errors and for reconstructions."""
    latents = coder.encode(rows)
    f = latents[:, which].double()
    reconstructions = coder.decode(latents)
    assert isinstance(reconstructions, tuple)
    along_error, along_guess = [], []
    for side in sides:
        target, guess = _scaled(coder, rows, side), _scaled(coder, reconstructions, side)
        bias = torch.cat([coder.b_dec[number] for number in side]).double()
        along_error.append((f * ((target - guess) @ directions.T)).sum(0))
        along_guess.append((f * ((guess - bias) @ directions.T)).sum(0))
    return f.square().sum(0), torch.stack(along_error), torch.stack(along_guess)
