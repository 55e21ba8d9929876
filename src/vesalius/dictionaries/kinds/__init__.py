"""Kinds of dictionaries, one family a file: activation and loss."""

from __future__ import annotations

from vesalius.dictionaries.kinds.base import Activation, Entries, Gradients, Kind, Vectors
from vesalius.dictionaries.kinds.gated import GATED, GATED_ACTIVATION
from vesalius.dictionaries.kinds.jumprelu import JUMPRELU, JUMPRELU_ACTIVATION
from vesalius.dictionaries.kinds.relu import RELU, RELU_ACTIVATION
from vesalius.dictionaries.kinds.topk import BATCHTOPK, BATCHTOPK_ACTIVATION, MATRYOSHKA, TOPK, TOPK_ACTIVATION

ACTIVATIONS = {
    activation.name: activation
    for activation in (RELU_ACTIVATION, GATED_ACTIVATION, JUMPRELU_ACTIVATION, TOPK_ACTIVATION, BATCHTOPK_ACTIVATION)
}
"""What fitted dictionaries compute, by the name in `Dictionary.activation`."""
TRAINABLE = {kind.name: kind for kind in (RELU, GATED, JUMPRELU, TOPK, BATCHTOPK, MATRYOSHKA)}
"""How they are trained, by the name in `TrainConfig.kind`."""

__all__ = ["ACTIVATIONS", "TRAINABLE", "Activation", "Entries", "Gradients", "Kind", "Vectors"]
