"""OLMo 1, 2 and 3.

OLMo 1 is Llama with norms that have no weights; checkpoints that clip queries, keys and values are refused, because
they are clipped in place, after the site was read. OLMo 2 and 3 have norms only after attention and MLP, and on the
whole query and key vectors: attn_out and mlp_out are what is added to the residual stream, the norms' outputs, and
mlp_in is the residual stream itself.
"""

from __future__ import annotations

from dataclasses import replace

from vesalius.adapters.base import Access
from vesalius.adapters.llama import LLAMA
from vesalius.adapters.understood import ROTARY, SIZES, WINDOWS

OLMO = replace(
    LLAMA,
    family="olmo",
    classes=("OlmoForCausalLM",),
    norm="layer",
    accepts={"clip_qkv": (None,)},
    understood=SIZES | ROTARY | {"attention_bias"},
)
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
OLMO3 = replace(OLMO2, family="olmo3", classes=("Olmo3ForCausalLM",), understood=OLMO2.understood | WINDOWS)
