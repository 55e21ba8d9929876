"""What a kind of dictionary is: how latents come from pre-activations, and what its loss asks of them.

Both are values with functions in them, and most functions have a default: a kind's file says only where it differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from vesalius.dictionaries.config import TrainConfig
from vesalius.dictionaries.rows import check_shape
from vesalius.errors import InputError, UnknownNameError

Vectors = Mapping[str, Tensor]
"""Per-latent vectors by name: `b_enc` always, and those the activation needs (`threshold`, `r_mag`, `b_mag`)."""


def strongest(
    latents: Float[Tensor, "row latent"],
) -> tuple[Int[Tensor, "row active"], Float[Tensor, "row active"]]:
    """(indices, values) of dense latents, strongest first; as many as are active in the row with most."""
    count = int((latents > 0).sum(1).max()) if latents.numel() else 0
    values, indices = latents.topk(count, dim=1)
    return indices, values


@dataclass(frozen=True)
class Activation:
    """From pre-activations (input times encoder plus b_enc) to latents, in a fitted dictionary.

    dense: (pre, vectors, k) -> [..., latent], zero where inactive, never negative. extras: names of the vectors it
    needs beside b_enc, each [latent], or [] for one number for all. independent: whether a latent depends on its own
    pre-activation only. sparse: (pre, vectors, k) -> (indices, values) [rows, most active in a row] of [rows, latent],
    strongest first, filled with zeros; default the nonzero entries of `dense`.
    """

    name: str
    dense: Callable[[Tensor, Vectors, int], Tensor]
    extras: tuple[str, ...] = ()
    independent: bool = True
    own_sparse: Callable[[Tensor, Vectors, int], tuple[Tensor, Tensor]] | None = None

    def check(self, extras: Mapping[str, Tensor], n_latents: int, k: int | None) -> None:
        """Raises InputError for extras that are missing or of another shape and for a k out of range, UnknownNameError
        for extras that it does not need.
        """
        for name, tensor in extras.items():
            if name not in self.extras:
                raise UnknownNameError(f"vector of a {self.name} dictionary", name, self.extras)
            if tensor.ndim:
                check_shape(name, tensor, (n_latents,))
        missing = [name for name in self.extras if name not in extras]
        if missing:
            raise InputError(f"a {self.name} dictionary needs extras with {', '.join(missing)}")
        if self.name == "topk" and not (k and 1 <= k <= n_latents):
            raise InputError(f"a topk dictionary with {n_latents} latents needs k between 1 and that; got {k}")

    def sparse(self, pre: Tensor, vectors: Vectors, k: int) -> tuple[Tensor, Tensor]:
        """(indices, values), as above."""
        if self.own_sparse is not None:
            return self.own_sparse(pre, vectors, k)
        return strongest(self.dense(pre, vectors, k))


@dataclass(frozen=True)
class Entries:
    """The latents that take part in a training step, as a kind's loss sees them: values of one shape, dense or sparse.

    An *entry* is one latent of one row.
    """

    pre: Tensor
    """Pre-activations."""
    per_entry: Callable[[Tensor], Tensor]
    """Spreads a vector [latent] over the entries."""
    vectors: Vectors
    """The trained vectors: b_enc and what `initial_vectors` of the kind gave."""
    config: TrainConfig
    sparsity: float
    """Coefficient of the sparsity penalty, divided by the rows of the batch."""
    norms: Tensor | None = None
    """[latent] sum over sites of the norms of decoder rows; None when they are all 1."""

    def times_norms(self, values: Tensor) -> Tensor:
        """The values times their decoder norms."""
        return values if self.norms is None else values * self.per_entry(self.norms)

    @property
    def penalty_gradient(self) -> float | Tensor:
        """Gradient of an L1 penalty (weighted with decoder norms) with respect to an active entry."""
        return self.sparsity if self.norms is None else self.sparsity * self.per_entry(self.norms)


@dataclass(frozen=True)
class Gradients:
    """Gradients of the loss, per entry."""

    pre: Tensor
    """With respect to the pre-activation, for the encoder (and b_enc, unless `vectors` says otherwise)."""
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    """Per trained vector, what an entry adds to its gradient."""
    norm: Tensor | None = None
    """With respect to the norm of the decoder row."""
    penalty: Tensor | float = 0.0
    """Not a gradient: the penalty itself, summed over the entries."""


def no_vectors(_config: TrainConfig, _pre: Tensor) -> dict[str, Tensor]:
    """Nothing is trained beside encoder, decoder and biases."""
    return {}


def floor_zero(_vectors: Vectors, _config: TrainConfig) -> Tensor | None:
    """Every positive pre-activation has a part in the loss."""
    return None


def positive_part(entries: Entries) -> Tensor:
    """Latents are the positive parts of their pre-activations."""
    return entries.pre.relu()


def no_gate(_entries: Entries) -> Tensor | None:
    """There is no second code."""
    return None


def where_positive(entries: Entries, dvalues: Tensor, _dgate: Tensor | None) -> Gradients:
    """The error's gradient, where the latent is positive."""
    return Gradients(dvalues * (entries.pre > 0))


def no_extras(_vectors: Vectors, _threshold: Tensor) -> dict[str, Tensor]:
    """The fitted activation needs b_enc only."""
    return {}


@dataclass(frozen=True)
class Kind:
    """How one kind is trained. Stateless; the numbers are in the fitter.

    activation: name of the fitted dictionary's activation. selection: which latents take part: the k largest of each
    `row`, the k per row largest of a `batch`, or all that pass a `threshold` (`floor`).
    """

    name: str
    activation: str
    selection: Literal["row", "batch", "threshold"]
    initial_vectors: Callable[[TrainConfig, Tensor], dict[str, Tensor]] = no_vectors
    """(config, pre) -> trained vectors beside b_enc at step 0. pre: [rows, latent] of a sample at that step."""
    floor: Callable[[Vectors, TrainConfig], Tensor | None] = floor_zero
    """[latent] pre-activation above which a latent has any part in loss or gradient; None is zero."""
    values: Callable[[Entries], Tensor] = positive_part
    """Latents of the entries."""
    gate: Callable[[Entries], Tensor | None] = no_gate
    """Values of a second code that is decoded with the decoder held fixed (gated), or None."""
    gradients: Callable[[Entries, Tensor, Tensor | None], Gradients] = where_positive
    """(entries, dvalues, dgate) -> gradients of error and penalty, from those of the error with respect to values and
    gate."""
    fitted_extras: Callable[[Vectors, Tensor], dict[str, Tensor]] = no_extras
    """(vectors, threshold) -> extras of the fitted dictionary. threshold: [] running mean of the smallest
    pre-activation that was chosen in a batch."""
