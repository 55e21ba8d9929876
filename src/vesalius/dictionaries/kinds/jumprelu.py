"""JumpReLU dictionaries: a latent is its pre-activation where that passes the latent's own threshold.

Thresholds are trained with straight-through estimates: the step's derivative is a box of width `bandwidth` around it
(Rajamanoharan et al. 2024, "Jumping ahead", eq. 11 and 12). The penalty counts active latents (`l0`) or sums tanh of
latent times decoder norm (`tanh`; Anthropic, January 2025). Thresholds begin where about twice k latents per row are
active: from near zero, as published, they take tens of thousands of steps of nearly dense codes to rise so far.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vesalius.dictionaries.config import TrainConfig
from vesalius.dictionaries.kinds.base import Entries, Gradients, Vectors, strongest

ACTIVE_AT_START = 2
"""Times k."""
LEAST = 0.01


class JumpRelu:
    """pre where pre > threshold (never negative). threshold: [latent], or [] for one number."""

    name = "jumprelu"
    extras: tuple[str, ...] = ("threshold",)
    local = True
    activation = "jumprelu"
    selection: Literal["row", "batch", "local"] = "local"

    def latents(self, pre: Tensor, vectors: Vectors, _k: int, /) -> Tensor:
        """The positive part above the threshold."""
        return pre.relu() * (pre > vectors["threshold"])

    def sparse(self, pre: Tensor, vectors: Vectors, k: int, /) -> tuple[Tensor, Tensor]:
        """Those that are not zero."""
        return strongest(self.latents(pre, vectors, k))

    def start(self, config: TrainConfig, pre: Tensor, /) -> dict[str, Tensor]:
        """The thresholds' logarithms, so that they stay positive; all the same."""
        active = min(pre.numel(), len(pre) * config.k * ACTIVE_AT_START)
        level = pre.flatten().kthvalue(pre.numel() - active + 1).values.clamp(min=LEAST)
        return {"log_threshold": level.log().expand(config.n_latents).clone()}

    def floor(self, vectors: Vectors, config: TrainConfig, /) -> Tensor | None:
        """The threshold, less half the kernel's width."""
        return vectors["log_threshold"].exp() - config.bandwidth / 2

    def values(self, entries: Entries, /) -> Tensor:
        """The positive part above the threshold."""
        return entries.pre.relu() * (entries.pre > entries.at(entries.vectors["log_threshold"].exp()))

    def gate(self, _entries: Entries, /) -> Tensor | None:
        """None."""
        return None

    def gradients(self, entries: Entries, dvalues: Tensor, _dgate: Tensor | None, /) -> Gradients:
        """Active entries carry the error; entries near their threshold move it."""
        threshold = entries.at(entries.vectors["log_threshold"].exp())
        active = entries.pre > threshold
        near = (entries.pre - threshold).abs() < entries.config.bandwidth / 2
        if entries.config.penalty == "tanh":
            return _with_tanh(entries, dvalues, threshold, active, near)
        lost = threshold * dvalues + entries.pressure
        moved = near * lost * (-threshold / entries.config.bandwidth)
        return Gradients(dvalues * active, {"log_threshold": moved}, penalty=entries.pressure * active.sum())

    def fitted(self, vectors: Vectors, _threshold: Tensor, /) -> dict[str, Tensor]:
        """The thresholds."""
        return {"threshold": vectors["log_threshold"].exp()}


def _with_tanh(entries: Entries, dvalues: Tensor, threshold: Tensor, active: Tensor, near: Tensor) -> Gradients:
    scale, values = entries.config.tanh_scale, entries.pre.relu() * active
    soft = (scale * entries.weighted(values)).tanh()
    slope = entries.pressure * scale * (1 - soft.square())
    total = dvalues + entries.weighted(slope)
    moved = near * total * (-threshold.square() / entries.config.bandwidth)
    return Gradients(
        total * active, {"log_threshold": moved}, norm=slope * values, penalty=entries.pressure * soft.sum()
    )
