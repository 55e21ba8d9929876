"""JumpReLU dictionaries: a latent is its pre-activation where that passes the latent's own threshold.

Thresholds are trained with straight-through estimates: the step's derivative is a box of width `bandwidth` around it
(Rajamanoharan et al. 2024, "Jumping ahead", eq. 11 and 12). The penalty counts active latents (`l0`) or sums tanh of
latent times decoder norm (`tanh`; Anthropic, January 2025). Thresholds begin where about twice k latents per row are
active: from near zero, as published, they take tens of thousands of steps of nearly dense codes to rise so far.
"""

from __future__ import annotations

from torch import Tensor

from vesalius.dictionaries.config import TrainConfig
from vesalius.dictionaries.kinds.base import Activation, Entries, Gradients, Kind, Vectors
from vesalius.dictionaries.kinds.topk import above_threshold

ACTIVE_AT_START = 2
"""Times k: latents per row that are active at step 0."""
SMALLEST_START = 0.01
"""Smallest threshold at step 0."""


def _initial(config: TrainConfig, pre: Tensor) -> dict[str, Tensor]:
    """The thresholds, all the same; as logarithms, so that they stay positive."""
    active = min(pre.numel(), len(pre) * config.k * ACTIVE_AT_START)
    level = pre.flatten().kthvalue(pre.numel() - active + 1).values.clamp(min=SMALLEST_START)
    return {"log_threshold": level.log().expand(config.n_latents).clone()}


def _floor(vectors: Vectors, config: TrainConfig) -> Tensor | None:
    """The threshold, less half the kernel's width."""
    return vectors["log_threshold"].exp() - config.bandwidth / 2


def _values(entries: Entries) -> Tensor:
    return entries.pre.relu() * (entries.pre > entries.per_entry(entries.vectors["log_threshold"].exp()))


def _gradients(entries: Entries, dvalues: Tensor, _dgate: Tensor | None) -> Gradients:
    """Active entries carry the error; entries near their threshold move it."""
    threshold = entries.per_entry(entries.vectors["log_threshold"].exp())
    active = entries.pre > threshold
    near = (entries.pre - threshold).abs() < entries.config.bandwidth / 2
    if entries.config.penalty == "tanh":
        return _with_tanh(entries, dvalues, threshold, active, near)
    # The derivative of the step times what the latent is worth at its threshold, in error and in penalty.
    worth = threshold * dvalues + entries.sparsity
    moved = near * worth * (-threshold / entries.config.bandwidth)
    return Gradients(dvalues * active, {"log_threshold": moved}, penalty=entries.sparsity * active.sum())


def _with_tanh(entries: Entries, dvalues: Tensor, threshold: Tensor, active: Tensor, near: Tensor) -> Gradients:
    scale, values = entries.config.tanh_scale, entries.pre.relu() * active
    soft = (scale * entries.times_norms(values)).tanh()
    slope = entries.sparsity * scale * (1 - soft.square())
    total = dvalues + entries.times_norms(slope)
    moved = near * total * (-threshold.square() / entries.config.bandwidth)
    return Gradients(
        total * active, {"log_threshold": moved}, norm=slope * values, penalty=entries.sparsity * soft.sum()
    )


def _extras(vectors: Vectors, _threshold: Tensor) -> dict[str, Tensor]:
    return {"threshold": vectors["log_threshold"].exp()}


JUMPRELU_ACTIVATION = Activation("jumprelu", above_threshold, extras=("threshold",))
JUMPRELU = Kind(
    "jumprelu",
    "jumprelu",
    "threshold",
    initial_vectors=_initial,
    floor=_floor,
    values=_values,
    gradients=_gradients,
    fitted_extras=_extras,
)
