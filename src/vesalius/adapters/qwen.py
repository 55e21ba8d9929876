"""Qwen 2 and 3: Llama with biases on queries, keys and values (2), or norms on queries and keys (3).

q and k are the projections' outputs, before those norms and before rotation.
"""

from __future__ import annotations

from dataclasses import replace

from vesalius.adapters.llama import LLAMA
from vesalius.adapters.understood import ROTARY, SIZES, WINDOWS

QWEN2 = replace(
    LLAMA,
    family="qwen2",
    classes=("Qwen2ForCausalLM",),
    accepts={},
    understood=SIZES | ROTARY | WINDOWS,
)
QWEN3 = replace(
    QWEN2, family="qwen3", classes=("Qwen3ForCausalLM",), understood=SIZES | ROTARY | WINDOWS | {"attention_bias"}
)
