"""Adapters: one file per model family, as data."""

from __future__ import annotations

from torch import nn

from vesalius.adapters.albert import ALBERT
from vesalius.adapters.base import Access, Adapter, Layout, Stack, submodule
from vesalius.adapters.bert import BERT, ROBERTA
from vesalius.adapters.bloom import BLOOM
from vesalius.adapters.deepseek import DEEPSEEK_V3, DEEPSEEK_V3_PLAIN
from vesalius.adapters.gemma import GEMMA, GEMMA2, GEMMA3, GEMMA3_IMAGES
from vesalius.adapters.gpt2 import GPT2
from vesalius.adapters.gpt_neo import GPT_NEO
from vesalius.adapters.gpt_neox import NEOX, NEOX_OLD, NEOX_SERIAL, NEOX_SERIAL_OLD
from vesalius.adapters.gptj import GPTJ
from vesalius.adapters.llama import COHERE, GRANITE, LLAMA, SMOLLM3, STABLELM, STABLELM_PARALLEL
from vesalius.adapters.mistral import MISTRAL
from vesalius.adapters.mixture import GPT_OSS, MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from vesalius.adapters.modernbert import MODERNBERT
from vesalius.adapters.olmo import OLMO, OLMO2, OLMO3
from vesalius.adapters.opt import OPT
from vesalius.adapters.phi import PHI
from vesalius.adapters.phi3 import PHI3
from vesalius.adapters.qwen import QWEN2, QWEN3
from vesalius.adapters.t5 import T5
from vesalius.adapters.towers import CLIP_TEXT, CLIP_TEXT_OLD, CLIP_VISION, CLIP_VISION_OLD, WHISPER
from vesalius.adapters.understood import check_config, check_modules
from vesalius.adapters.vit import VIT, VIT_OLD
from vesalius.errors import UnknownArchitectureError

# Adapters of one class are tried in this order; the first whose config check passes is taken.
KNOWN: tuple[Adapter, ...] = (
    ALBERT,
    BERT,
    BLOOM,
    CLIP_TEXT,
    CLIP_TEXT_OLD,
    CLIP_VISION,
    CLIP_VISION_OLD,
    COHERE,
    DEEPSEEK_V3_PLAIN,
    DEEPSEEK_V3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GEMMA3_IMAGES,
    GPT2,
    GPTJ,
    GPT_NEO,
    GPT_OSS,
    GRANITE,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    MODERNBERT,
    NEOX,
    NEOX_SERIAL,
    NEOX_OLD,
    NEOX_SERIAL_OLD,
    OLMO,
    OLMO2,
    OLMO3,
    OLMOE,
    OPT,
    PHI,
    PHI3,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    ROBERTA,
    SMOLLM3,
    STABLELM,
    STABLELM_PARALLEL,
    T5,
    VIT,
    VIT_OLD,
    WHISPER,
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
            check_modules(adapter, module)
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
            f"no adapter for {name}; known: {known}. Ways out: write one, most often a known one with a few fields "
            "changed (dataclasses.replace), vs.Model(net, adapter=vs.Adapter(...)), and try it with "
            "vs.check_adapter(model); or go without, vs.Model(net, adapter=None), and use module:<path>|out sites."
        )
    return None
