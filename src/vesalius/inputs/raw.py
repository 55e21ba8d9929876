"""Raw: inputs that are not tokens, such as images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vesalius.errors import InputError
from vesalius.inputs.tokens import Tokens

PATCH = 3 * 16 * 16
"""Values of an input that count as one token when a batch is limited in size: an image patch of 16 by 16 pixels."""


@dataclass(frozen=True, eq=False)
class Raw:
    """A batch of a module's own input: images [example, channel, height, width], features [example, ...], floats.

    Raises InputError for another dtype or no examples.
    """

    values: Float[Tensor, "example ..."]

    def __post_init__(self) -> None:
        if not self.values.is_floating_point() or self.values.ndim < 2 or self.values.numel() == 0:
            raise InputError(
                f"inputs that are not tokens must be floats [example, ...]; got {self.values.dtype} "
                f"{tuple(self.values.shape)}"
            )

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return f"Raw({len(self)} inputs of {list(self.values.shape[1:])})"

    @property
    def lengths(self) -> Int[Tensor, " example"]:
        """1 for each: an input counts as a single position."""
        return torch.ones(len(self), dtype=torch.long)

    @property
    def weight(self) -> int:
        """How many tokens one input counts as when a batch is limited in size."""
        return max(1, self.values[0].numel() // PATCH)

    def take(self, rows: Int[Tensor, " row"]) -> Raw:
        """Some of the inputs."""
        return Raw(self.values[rows.to(self.values.device)])

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """One hash for each input."""
        # As bytes, because NumPy has no bfloat16.
        rows = self.values.detach().cpu().contiguous().flatten(1).view(torch.uint8)
        return tuple(hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in rows)


Inputs = Tokens | Raw
