"""Rows that are sums of few known directions: what a dictionary should find in them is known beforehand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from vesalius.errors import InputError


@dataclass(frozen=True, eq=False)
class SparseRows:
    """x = strengths @ features. features: unit rows [feature, width]. strengths: [row, feature], 0 where absent."""

    x: Float[Tensor, "row width"]
    features: Float[Tensor, "feature width"]
    strengths: Float[Tensor, "row feature"]


def sparse_rows(
    n: int,
    width: int = 64,
    n_features: int = 128,
    *,
    active: float = 3.0,
    features: Tensor | None = None,
    seed: int = 0,
) -> SparseRows:
    """n rows in which each feature is present independently, `active` of them on average, with strength .5 to 1.5.

    features: unit rows; default random directions, by seed. The same seed and features give the same rows. Raises
    InputError for sizes under 1, and for more features active than there are.
    """
    known = unit_rows(n_features, width, seed) if features is None else features
    if n < 1 or not 0 < active <= len(known):
        raise InputError(f"at least one row, and between 0 and {len(known)} active features; got {n} and {active}")
    generator = torch.Generator().manual_seed(seed + 1)
    on = torch.rand(n, len(known), generator=generator) < active / len(known)
    strengths = on * (0.5 + torch.rand(on.shape, generator=generator))
    return SparseRows(strengths @ known, known, strengths)


def unit_rows(n: int, width: int, seed: int = 0) -> Float[Tensor, "n width"]:
    """n directions, uniform on the sphere."""
    if min(n, width) < 1:
        raise InputError(f"directions need a number and a width of at least 1; got {n} and {width}")
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


def recovered(directions: Float[Tensor, "latent width"], features: Float[Tensor, "feature width"]) -> Tensor:
    """Cosine [feature] of each feature with its direction, matched one to one so that the sum is largest.

    Each direction is matched to one feature only, so that these are at most the largest cosines of the features. They
    are not 0 for random directions: 128 of them in 64 dimensions have a mean largest cosine of .32. Raises InputError
    when there are fewer directions than features.
    """
    if len(directions) < len(features):
        raise InputError(f"{len(features)} features cannot be matched one to one to {len(directions)} directions")
    # A dead latent may have the zero direction, whose cosine is 0.
    norms = directions.norm(dim=1, keepdim=True).clamp(min=1e-12)
    cosines = features / features.norm(dim=1, keepdim=True) @ (directions / norms).T
    rows, columns = linear_sum_assignment(-cosines.cpu().numpy())
    return cosines[torch.from_numpy(rows), torch.from_numpy(columns)]
