"""What you run: a network left as it is, with names for its tensors, and everything that reaches into it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vesalius.model.model import Model as Model

__all__ = ["Model"]


def __getattr__(name: str) -> Any:
    # Late and at this one edge: the command line looks a model's name up (model.loading) before it imports torch.
    if name == "Model":
        return import_module("vesalius.model.model").Model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
