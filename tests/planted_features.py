"""Rows that are sums of few known directions: what a dictionary should find is known."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(n: int, width: int, seed: int = 0) -> Tensor:
    """n random unit rows."""
    rows = torch.randn(n, width, generator=draw(seed))
    return rows / rows.norm(dim=1, keepdim=True)


def sparse_sums(features: Tensor, n: int, rate: float, seed: int = 0) -> Tensor:
    """[n, width] rows: each feature is there at this rate, with a size from 0.5 to 1.5."""
    generator = draw(seed)
    active = torch.rand(n, len(features), generator=generator) < rate
    return (active * (0.5 + torch.rand(n, len(features), generator=generator))) @ features
