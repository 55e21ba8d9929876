"""Adapters: one file per model family, as data."""

from __future__ import annotations

from torch import nn

from vesalius.adapters.albert import ALBERT
from vesalius.adapters.base import Access, Adapter, Layout, Stack, submodule
from vesalius.adapters.bert import BERT
from vesalius.adapters.bloom import BLOOM
from vesalius.adapters.gemma import GEMMA2, GEMMA3
from vesalius.adapters.gpt2 import GPT2
from vesalius.adapters.gpt_neox import NEOX, NEOX_SERIAL
from vesalius.adapters.llama import LLAMA
from vesalius.adapters.mistral import MISTRAL
from vesalius.adapters.mixture import MIXTRAL, OLMOE, QWEN2_MOE
from vesalius.adapters.modernbert import MODERNBERT
from vesalius.adapters.olmo2 import OLMO2
from vesalius.adapters.opt import OPT
from vesalius.adapters.phi import PHI
from vesalius.adapters.phi3 import PHI3
from vesalius.adapters.qwen import QWEN2, QWEN3
from vesalius.adapters.t5 import T5
from vesalius.adapters.understood import check_config
from vesalius.adapters.vit import VIT
from vesalius.errors import UnknownArchitectureError

# Adapters of one class are tried in this order; the first whose config check passes is taken.
KNOWN: tuple[Adapter, ...] = (
    ALBERT,
    BERT,
    BLOOM,
    GEMMA2,
    GEMMA3,
    GPT2,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    MODERNBERT,
    NEOX,
    NEOX_SERIAL,
    OLMO2,
    OLMOE,
    OPT,
    PHI,
    PHI3,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    T5,
    VIT,
)

__all__ = ["KNOWN", "Access", "Adapter", "Layout", "Stack", "adapter_for", "submodule"]


def adapter_for(module: nn.Module) -> Adapter | None:
    """The adapter of this module's class, checked against its config; None when the module is no transformers model.

    Raises UnknownArchitectureError for a transformers model of an unknown class: a guess would give wrong sites.
    """
    name = type(module).__name__
    fitting = [adapter for adapter in KNOWN if name in adapter.classes]
    refusals = []
    for adapter in fitting:
        try:
            check_config(adapter, module)
        except UnknownArchitectureError as refusal:
            refusals.append(refusal)
        else:
            return adapter
    if refusals:
        raise refusals[0]
    if hasattr(module, "peft_config") and hasattr(module, "get_base_model"):
        raise UnknownArchitectureError(
            f"{name} is peft's wrapper around the model; pass the model inside, which has the same adapters in it: "
            "vs.Model(peft_model.get_base_model())"
        )
    # A transformers model of another class. Other modules are used by module paths, without an adapter.
    if hasattr(module, "config") and hasattr(module.config, "model_type"):
        known = ", ".join(sorted({c for adapter in KNOWN for c in adapter.classes}))
        raise UnknownArchitectureError(
            f"no adapter for {name}; known: {known}. Ways out: write one, vs.Model(net, adapter=vs.Adapter(...)), or "
            "go without, vs.Model(net, adapter=None), and use module:<path>|out sites."
        )
    return None
