"""Llama, SmolLM and others of class LlamaForCausalLM (RMSNorm, rotary positions, grouped-query attention, SwiGLU)."""

from __future__ import annotations

from vesalius.adapters.base import Access, Adapter
from vesalius.adapters.understood import ROTARY, SIZES

LLAMA = Adapter(
    family="llama",
    classes=("LlamaForCausalLM",),
    layers="model.layers",
    sites={
        "resid_pre": Access("", "in"),
        "q": Access("self_attn.q_proj", heads="head"),
        "k": Access("self_attn.k_proj", heads="kv_head"),
        "v": Access("self_attn.v_proj", heads="kv_head"),
        "z": Access("self_attn.o_proj", "in", heads="head"),
        "attn_out": Access("self_attn.o_proj"),
        # No module returns this sum, so it is read where the norm before the MLP reads it.
        "resid_mid": Access("post_attention_layernorm", "in", delta="self_attn.o_proj"),
        "mlp_in": Access("mlp", "in"),
        "mlp_post": Access("mlp.down_proj", "in"),
        "mlp_out": Access("mlp"),
        "resid_post": Access(""),
    },
    outside={
        "embed": Access("model.embed_tokens"),
        "final_norm": Access("model.norm"),
        "logits": Access("lm_head"),
    },
    o_proj="self_attn.o_proj",
    final_norm="model.norm",
    unembed="lm_head",
    norm="rms",
    config={
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "d_head": "head_dim",
        "d_model": "hidden_size",
        "vocab": "vocab_size",
    },
    attention="self_attn",
    replay={
        "attention_mask": "drop",
        "past_key_values": "drop",
        "use_cache": "false",
        "position_ids": "positions",
        "position_embeddings": "rotary",
    },
    accepts={"pretraining_tp": (1,)},
    understood=SIZES | ROTARY | {"attention_bias", "mlp_bias"},
)
