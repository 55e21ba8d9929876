"""Norm outliers: rows so long that hardly anything else would count in a squared error.

Language models hold such rows at the first position, and here and there at a delimiter soon after it (Sun et al. 2024,
"Massive Activations in Large Language Models", arXiv:2402.17762). In SmolLM2, layer 15, one row in 2,000 past the first
position is 120 times as long as the others, and these few hold six times the squares of all the rest.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vesalius.errors import InputError

MAX_NORM = 10.0
"""Default bound, in medians: between the longest ordinary rows of SmolLM2 (6 medians) and its outliers (120)."""


def check_max_norm(max_norm: float | None) -> None:
    """Raise InputError unless it is None or a bound above the median itself."""
    if max_norm is not None and not max_norm > 1:
        raise InputError(f"max_norm is a multiple of the median norm and must be above 1 (or None); got {max_norm}")


def outliers(
    rows: tuple[Float[Tensor, "row _"], ...], exempt: Bool[Tensor, " row"], max_norm: float | None
) -> Bool[Tensor, " row"]:
    """Rows whose norm at any site is above max_norm times the site's median over the rows that are not exempt.

    Exempt rows are no outliers, and None stands for no bound.
    """
    found = torch.zeros_like(exempt)
    if max_norm is None or bool(exempt.all()):
        return found
    for tensor in rows:
        norms = torch.linalg.vector_norm(tensor, dim=1, dtype=torch.float32)
        typical = norms[~exempt].median()
        # Where most rows are zero, as in a sparse code, there is no typical length.
        if typical > 0:
            found |= norms > max_norm * typical
    return found & ~exempt
