"""GPT-Neo (TinyStories): LayerNorm, learned positions, global and local attention without scaling of the scores.

Its attention does not go through transformers' AttentionInterface: the pattern is read and edited where its dropout is,
there are no scores, and sweeps run the whole model.
"""

from __future__ import annotations

from dataclasses import replace

from vesalius.adapters.base import Access
from vesalius.adapters.gpt2 import GPT2
from vesalius.adapters.understood import SIZES

GPT_NEO = replace(
    GPT2,
    family="gpt_neo",
    classes=("GPTNeoForCausalLM",),
    sites={
        **GPT2.sites,
        "q": Access("attn.attention.q_proj", heads="head"),
        "k": Access("attn.attention.k_proj", heads="kv_head"),
        "v": Access("attn.attention.v_proj", heads="kv_head"),
        # Dropout does nothing in evaluation mode, and is the only module that returns the pattern.
        "pattern": Access("attn.attention.attn_dropout"),
        "z": Access("attn.attention.out_proj", "in", heads="head"),
        "attn_out": Access("attn.attention.out_proj"),
        "resid_mid": Access("ln_2", "in", delta="attn.attention.out_proj"),
    },
    o_proj="attn.attention.out_proj",
    attention="",
    replay={},
    # Without a cache its own attention takes another way, which rounds differently.
    call={},
    accepts={},
    understood=SIZES
    | {
        "num_layers",
        "num_heads",
        "attention_types",
        "attention_layers",
        "window_size",
        "activation_function",
        "layer_norm_epsilon",
        "embed_dropout",
    },
)
