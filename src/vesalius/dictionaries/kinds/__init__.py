"""Kinds of dictionaries, one a file: activation and loss."""

from __future__ import annotations

from vesalius.dictionaries.kinds.base import Activation, Entries, Gradients, Kind, Vectors
from vesalius.dictionaries.kinds.batchtopk import BatchTopK
from vesalius.dictionaries.kinds.gated import Gated
from vesalius.dictionaries.kinds.jumprelu import JumpRelu
from vesalius.dictionaries.kinds.matryoshka import Matryoshka
from vesalius.dictionaries.kinds.relu import Relu
from vesalius.dictionaries.kinds.topk import TopK
from vesalius.errors import UnknownNameError

_ACTIVATIONS: tuple[Activation, ...] = (Relu(), Gated(), JumpRelu(), TopK(), BatchTopK())
_TRAINED: tuple[Kind, ...] = (Relu(), Gated(), JumpRelu(), TopK(), BatchTopK(), Matryoshka())
ACTIVATIONS = {activation.name: activation for activation in _ACTIVATIONS}
TRAINED = {kind.name: kind for kind in _TRAINED}


def activation_of(name: str) -> Activation:
    """The activation with this name. Raises UnknownNameError listing the known ones."""
    if name not in ACTIVATIONS:
        raise UnknownNameError("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


__all__ = ["ACTIVATIONS", "TRAINED", "Activation", "Entries", "Gradients", "Kind", "Vectors", "activation_of"]
