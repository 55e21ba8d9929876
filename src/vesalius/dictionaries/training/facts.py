"""Facts: what a step measured, summed over rows, micro-batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vesalius.dictionaries.training.ranks import Ranks


@dataclass
class Facts:
    """Sums in float64. fired: per block [latent] rows in which it was active."""

    rows: Tensor
    squared: Tensor
    """Squared error of the full code."""
    loss: Tensor
    """Error as the loss counts it (mean over prefixes, with the gate's), and penalty per row."""
    outputs: Tensor
    """[d_out] sum of the outputs."""
    output_squares: Tensor
    fired: list[Tensor]

    @classmethod
    def total(cls, parts: Sequence[Facts]) -> Facts:
        """The sum, in the order given."""
        add = lambda name: torch.stack([getattr(part, name) for part in parts]).sum(0)  # noqa: E731
        fired = [torch.stack(list(block)).sum(0) for block in zip(*(part.fired for part in parts), strict=True)]
        return cls(add("rows"), add("squared"), add("loss"), add("outputs"), add("output_squares"), fired)

    def over(self, ranks: Ranks) -> Facts:
        """The sum over processes, sent as one message."""
        parts = [
            self.rows[None],
            self.squared[None],
            self.loss[None],
            self.outputs,
            self.output_squares[None],
            *self.fired,
        ]
        if ranks.size > 1:
            flat = ranks.sum(torch.cat(parts))
            parts = list(flat.split([len(part) for part in parts]))
        rows, squared, loss, outputs, output_squares, *fired = parts
        return Facts(rows[0], squared[0], loss[0], outputs, output_squares[0], fired)

    @property
    def variance(self) -> float:
        """Squared deviation of the outputs from their mean, summed over rows."""
        return float(self.output_squares - self.outputs.square().sum() / self.rows)

    @property
    def fvu(self) -> float:
        """Fraction of the variance that the error is; 0 / 0 counts as 0."""
        variance = self.variance
        return float(self.squared) / variance if variance > 0 else float(self.squared > 0)

    @property
    def l0(self) -> float:
        """Active latents per row, of all blocks."""
        return float(sum(block.sum() for block in self.fired) / self.rows)
