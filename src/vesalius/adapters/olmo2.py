"""OLMo 2: norms only after attention and MLP, and on the whole query and key vectors.

attn_out and mlp_out are what is added to the residual stream: the norms' outputs. mlp_in is the residual stream itself.
"""

from __future__ import annotations

from dataclasses import replace

from vesalius.adapters.base import Access
from vesalius.adapters.llama import LLAMA
from vesalius.adapters.understood import ROTARY, SIZES

OLMO2 = replace(
    LLAMA,
    family="olmo2",
    classes=("Olmo2ForCausalLM",),
    sites={
        **LLAMA.sites,
        "attn_out": Access("post_attention_layernorm"),
        # No norm stands before the MLP, so the MLP itself reads the stream.
        "resid_mid": Access("mlp", "in", delta="post_attention_layernorm"),
        "mlp_out": Access("post_feedforward_layernorm"),
    },
    attn_norm="post_attention_layernorm",
    accepts={},
    understood=SIZES | ROTARY | {"attention_bias"},
)
