"""One model family a file, as data."""

from __future__ import annotations

from torch import nn

from vesalius.adapters.base import Access, Adapter, Layout, submodule
from vesalius.adapters.gpt2 import GPT2
from vesalius.adapters.llama import LLAMA
from vesalius.errors import UnknownArchitectureError

KNOWN: tuple[Adapter, ...] = (GPT2, LLAMA)

__all__ = ["KNOWN", "Access", "Adapter", "Layout", "adapter_for", "submodule"]


def adapter_for(module: nn.Module) -> Adapter | None:
    """The adapter of this module's class, checked against its config; None when the module is no transformers model.

    Raises UnknownArchitectureError for a transformers model of an unknown class: a guess would give wrong sites.
    """
    name = type(module).__name__
    for adapter in KNOWN:
        if name in adapter.classes:
            adapter.check(module)
            return adapter
    if hasattr(module, "config") and hasattr(module.config, "model_type"):
        known = ", ".join(sorted(c for adapter in KNOWN for c in adapter.classes))
        raise UnknownArchitectureError(
            f"no adapter for {name}; known: {known}. Ways out: write one, vs.Model(net, adapter=vs.Adapter(...)), or "
            "go without, vs.Model(net, adapter=None), and use module:<path>|out sites."
        )
    return None
