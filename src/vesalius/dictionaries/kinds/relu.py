"""ReLU dictionaries: a latent is the positive part of its pre-activation; an L1 penalty keeps them few.

The penalty weighs each latent with the norm of its decoder row, summed over sites (Anthropic, April 2024; for
crosscoders Lindsey et al. 2024), so that it cannot be evaded by small latents and large rows.
"""

from __future__ import annotations

from torch import Tensor

from vesalius.dictionaries.kinds.base import Activation, Entries, Gradients, Kind, Vectors


def _dense(pre: Tensor, _vectors: Vectors, _k: int) -> Tensor:
    return pre.relu()


def _gradients(entries: Entries, dvalues: Tensor, _dgate: Tensor | None) -> Gradients:
    """The error's gradient, plus the penalty's constant one times the decoder norm."""
    weighted = entries.sparsity * entries.pre.relu()
    return Gradients(
        (dvalues + entries.penalty_gradient) * (entries.pre > 0),
        norm=weighted,
        penalty=entries.times_norms(weighted).sum(),
    )


RELU_ACTIVATION = Activation("relu", _dense)
RELU = Kind("relu", "relu", "threshold", gradients=_gradients)
