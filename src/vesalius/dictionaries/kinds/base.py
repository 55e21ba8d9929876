"""What a kind of dictionary is: how latents come from pre-activations, and what its loss asks of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from vesalius.dictionaries.config import TrainConfig

Vectors = Mapping[str, Tensor]
"""Per-latent vectors by name: `b_enc` always, and those the activation needs (`threshold`, `r_mag`, `b_mag`)."""


class Activation(Protocol):
    """From pre-activations (input times encoder plus b_enc) to latents, in a fitted dictionary."""

    name: str
    extras: tuple[str, ...]
    """Vectors it needs beside b_enc: [latent], or [] for one number for all."""
    local: bool
    """Whether a latent depends on its own pre-activation only."""

    def latents(self, pre: Tensor, vectors: Vectors, k: int, /) -> Tensor:
        """[..., latent], zero where inactive, never negative."""
        ...

    def sparse(self, pre: Tensor, vectors: Vectors, k: int, /) -> tuple[Tensor, Tensor]:
        """(indices, values) [rows, most active in a row] of [rows, latent], strongest first, filled with zeros."""
        ...


def strongest(latents: Tensor) -> tuple[Tensor, Tensor]:
    """(indices, values) [rows, most active in a row] of dense latents [rows, latent], strongest first."""
    count = int((latents > 0).sum(1).max()) if latents.numel() else 0
    values, indices = latents.topk(count, dim=1)
    return indices, values


@dataclass(frozen=True)
class Entries:
    """Latents that take part in a step, as a kind's loss sees them: values of one shape, dense or sparse."""

    pre: Tensor
    at: Callable[[Tensor], Tensor]
    """Spreads a vector [latent] over the entries."""
    vectors: Vectors
    """The trained vectors: b_enc and what `start` of the kind gave."""
    config: TrainConfig
    pressure: float
    """Coefficient of the sparsity penalty, divided by the rows of the batch."""
    norms: Tensor | None = None
    """[latent] sum over sites of the norms of decoder rows; None when they are all 1."""

    def weighted(self, values: Tensor) -> Tensor:
        """The values times their decoder norms."""
        return values if self.norms is None else values * self.at(self.norms)


@dataclass(frozen=True)
class Gradients:
    """Of the loss, per entry."""

    pre: Tensor
    """With respect to the pre-activation, for the encoder (and b_enc, unless `vectors` says otherwise)."""
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    """Per trained vector, what an entry adds to its gradient."""
    norm: Tensor | None = None
    """With respect to the norm of the decoder row."""
    penalty: Tensor | float = 0.0
    """Not a gradient: the penalty itself, summed over the entries."""


class Kind(Protocol):
    """How one kind is trained. Stateless; the numbers are in the fitter."""

    name: str
    activation: str
    """Name of the fitted dictionary's activation."""
    selection: Literal["row", "batch", "local"]
    """Who takes part: the k largest of a row, the k per row largest of a batch, or whatever passes `floor`."""

    def start(self, config: TrainConfig, pre: Tensor, /) -> dict[str, Tensor]:
        """Trained vectors beside b_enc at step 0. pre: [rows, latent] pre-activations of a sample at that step."""
        ...

    def floor(self, vectors: Vectors, config: TrainConfig, /) -> Tensor | None:
        """[latent] pre-activation above which a latent has any part in loss or gradient; None is zero."""
        ...

    def values(self, entries: Entries, /) -> Tensor:
        """Latents of the entries."""
        ...

    def gate(self, entries: Entries, /) -> Tensor | None:
        """Values of a second code that is rebuilt with the decoder held fixed (gated), or None."""
        ...

    def gradients(self, entries: Entries, dvalues: Tensor, dgate: Tensor | None, /) -> Gradients:
        """Gradients of rebuilding error and penalty, from those of the error with respect to values and gate."""
        ...

    def fitted(self, vectors: Vectors, threshold: Tensor, /) -> dict[str, Tensor]:
        """Extras of the fitted dictionary. threshold: [] running mean of what was needed to be among the chosen."""
        ...
