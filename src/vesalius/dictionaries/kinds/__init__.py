"""Kinds of dictionaries, one a file: activation and loss."""

from __future__ import annotations

from vesalius.dictionaries.kinds.base import Activation, Vectors
from vesalius.dictionaries.kinds.batchtopk import BatchTopK
from vesalius.dictionaries.kinds.gated import Gated
from vesalius.dictionaries.kinds.jumprelu import JumpRelu
from vesalius.dictionaries.kinds.relu import Relu
from vesalius.dictionaries.kinds.topk import TopK
from vesalius.errors import UnknownNameError

_ALL: tuple[Activation, ...] = (Relu(), Gated(), JumpRelu(), TopK(), BatchTopK())
ACTIVATIONS = {activation.name: activation for activation in _ALL}


def activation_of(name: str) -> Activation:
    """The activation with this name. Raises UnknownNameError listing the known ones."""
    if name not in ACTIVATIONS:
        raise UnknownNameError("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


__all__ = ["ACTIVATIONS", "Activation", "Vectors", "activation_of"]
