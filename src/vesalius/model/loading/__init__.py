"""From a name to a `Model`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vesalius.model.loading.lookup import DEMO, look_up

if TYPE_CHECKING:
    from vesalius.model.loading.pretrained import checked_device as checked_device
    from vesalius.model.loading.pretrained import load as load
    from vesalius.model.loading.pretrained import without_weights as without_weights

__all__ = ["DEMO", "checked_device", "load", "look_up", "without_weights"]


def __getattr__(name: str) -> Any:
    # Late and at this one edge: looking a name up needs neither torch nor transformers, which take seconds to import.
    if name in ("checked_device", "load", "without_weights"):
        return getattr(import_module("vesalius.model.loading.pretrained"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
