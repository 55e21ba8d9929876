"""Mistral: Llama with a sliding attention window in every layer (or none)."""

from __future__ import annotations

from dataclasses import replace

from vesalius.adapters.llama import LLAMA
from vesalius.adapters.understood import ROTARY, SIZES

MISTRAL = replace(
    LLAMA,
    family="mistral",
    classes=("MistralForCausalLM",),
    accepts={},
    understood=SIZES | ROTARY | {"sliding_window"},
)
