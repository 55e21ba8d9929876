"""Phi 3 and 4: Llama with one projection for queries, keys and values, and one for gate and up."""

from __future__ import annotations

from dataclasses import replace

from vesalius.adapters.base import Access
from vesalius.adapters.llama import LLAMA
from vesalius.adapters.understood import ROTARY, SIZES

PHI3 = replace(
    LLAMA,
    family="phi3",
    classes=("Phi3ForCausalLM",),
    sites={
        **LLAMA.sites,
        "q": Access("self_attn.qkv_proj", heads="head", part="q"),
        "k": Access("self_attn.qkv_proj", heads="kv_head", part="k"),
        "v": Access("self_attn.qkv_proj", heads="kv_head", part="v"),
    },
    accepts={"attention_bias": (False,)},
    understood=SIZES | ROTARY | {"sliding_window", "original_max_position_embeddings"},
)
