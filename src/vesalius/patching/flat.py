"""Rows of a replay, and where their tokens lie in a flattened batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """Edited runs. example, layer, start, end: [row]; live positions are start <= p < end; end - 1 is read."""

    example: Int[Tensor, " row"]
    layer: Int[Tensor, " row"]
    start: Int[Tensor, " row"]
    end: Int[Tensor, " row"]

    def __len__(self) -> int:
        return len(self.example)

    @property
    def sizes(self) -> Int[Tensor, " row"]:
        return self.end - self.start

    def take(self, index: Tensor) -> Rows:
        return Rows(self.example[index], self.layer[index], self.start[index], self.end[index])


@dataclass(eq=False)
class Flat:
    """Where each row's tokens lie in the flattened batch; rows are sorted by layer, so active rows are a prefix."""

    rows: Rows
    offset: Tensor = field(init=False)
    row_of: Tensor = field(init=False)
    pos_of: Tensor = field(init=False)

    def __post_init__(self) -> None:
        sizes = self.rows.sizes
        ends = sizes.cumsum(0)
        self.offset = ends - sizes
        self.row_of = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        self.pos_of = torch.arange(int(ends[-1])) - self.offset[self.row_of] + self.rows.start[self.row_of]

    def active(self, layer: int) -> tuple[int, int]:
        """Rows and tokens that have joined by this layer."""
        count = int((self.rows.layer <= layer).sum())
        return count, int(self.rows.sizes[:count].sum())

    @property
    def last(self) -> Tensor:
        """Each row's last token."""
        return self.offset + self.rows.sizes - 1
