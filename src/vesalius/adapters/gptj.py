"""GPT-J: attention and MLP side by side on one normed input, partial rotation; a bias on the logits.

Its attention does not go through transformers' AttentionInterface: the pattern is read and edited where its dropout is,
there are no scores, and sweeps run the whole model. There is no resid_mid.
"""

from __future__ import annotations

from dataclasses import replace

from vesalius.adapters.base import Access
from vesalius.adapters.gpt2 import GPT2

GPTJ = replace(
    GPT2,
    family="gptj",
    classes=("GPTJForCausalLM",),
    sites={
        "resid_pre": Access("", "in"),
        "q": Access("attn.q_proj", heads="head"),
        "k": Access("attn.k_proj", heads="kv_head"),
        "v": Access("attn.v_proj", heads="kv_head"),
        # Dropout does nothing in evaluation mode, and is the only module that returns the pattern.
        "pattern": Access("attn.attn_dropout"),
        "z": Access("attn.out_proj", "in", heads="head"),
        "attn_out": Access("attn.out_proj"),
        "mlp_in": Access("mlp", "in"),
        "mlp_post": Access("mlp.fc_out", "in"),
        "mlp_out": Access("mlp"),
        "resid_post": Access(""),
    },
    outside={site: access for site, access in GPT2.outside.items() if site != "pos_embed"},
    o_proj="attn.out_proj",
    attention="",
    replay={},
    # Without a cache its own attention takes another way, which rounds differently.
    call={},
    accepts={},
    understood=frozenset(
        [
            "vocab_size",
            "n_positions",
            "n_embd",
            "n_layer",
            "n_head",
            "n_inner",
            "rotary_dim",
            "activation_function",
            "layer_norm_epsilon",
            "rotary",
            "scale_attn_weights",
        ]
    ),
)
