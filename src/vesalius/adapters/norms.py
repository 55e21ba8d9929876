"""Norms, frozen: with its scale held at one run's value a norm is linear in what goes in."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from vesalius.adapters.base import Norm
from vesalius.adapters.weights import weight_of


def gain(kind: Norm, norm: nn.Module) -> Float[Tensor, " d_model"]:
    """What the normed vector is multiplied by."""
    weight = weight_of(norm)
    return 1 + weight if kind == "rms_plus_one" else weight


def frozen_scale(kind: Norm, norm: nn.Module, at: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any 1"]:
    """One over the root mean square (of the centred vector, for LayerNorm) that the norm divides by at `at`."""
    if kind == "layer":
        at = at - at.mean(-1, keepdim=True)
    return (at.pow(2).mean(-1, keepdim=True) + epsilon(norm)).rsqrt()


def epsilon(norm: nn.Module) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-5)))
