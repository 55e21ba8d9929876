"""Llama, SmolLM and others of class LlamaForCausalLM (RMSNorm, rotary positions, grouped-query attention, SwiGLU).

Families that are Llama but for a scale, a norm or a switch: SmolLM3 (some layers without rotation), Granite (scaled
embeddings, block outputs and logits), StableLM (LayerNorm), Cohere (LayerNorm, one for both blocks; scaled logits).
"""

from __future__ import annotations

from dataclasses import replace

from vesalius.adapters.base import Access, Adapter
from vesalius.adapters.understood import ROTARY, SIZES, WINDOWS

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
SMOLLM3 = replace(
    LLAMA,
    family="smollm3",
    classes=("SmolLM3ForCausalLM",),
    accepts={"pretraining_tp": (1, 2)},  # read nowhere
    understood=SIZES | ROTARY | WINDOWS | {"attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"},
)
GRANITE = replace(
    LLAMA,
    family="granite",
    classes=("GraniteForCausalLM",),
    sites={
        **LLAMA.sites,
        # What is added to the stream: the outputs times residual_multiplier.
        "attn_out": Access("self_attn.o_proj", scaled=True),
        "mlp_out": Access("mlp", scaled=True),
    },
    # No module returns the scaled embedding.
    outside={**LLAMA.outside, "embed": Access("model.layers.0", "in")},
    config={**LLAMA.config, "residual_scale": "residual_multiplier"},
    logits_over="logits_scaling",
    accepts={},
    understood=SIZES | ROTARY | {"attention_bias", "mlp_bias", "embedding_multiplier", "attention_multiplier"},
)
STABLELM = replace(
    LLAMA,
    family="stablelm",
    classes=("StableLmForCausalLM",),
    norm="layer",
    accepts={"use_parallel_residual": (False,)},
    understood=SIZES | ROTARY | {"use_qkv_bias", "qk_layernorm", "rope_pct"},
)
# Attention and MLP are added to the stream together: there is no resid_mid.
_SIDE_BY_SIDE = {kind: access for kind, access in LLAMA.sites.items() if kind != "resid_mid"}
STABLELM_PARALLEL = replace(
    STABLELM, family="stablelm (parallel)", sites=_SIDE_BY_SIDE, accepts={"use_parallel_residual": (True,)}
)
COHERE = replace(
    LLAMA,
    family="cohere",
    classes=("CohereForCausalLM",),
    sites=_SIDE_BY_SIDE,
    norm="layer",
    config={**LLAMA.config, "logit_scale": "logit_scale"},
    accepts={},
    understood=SIZES | ROTARY | {"attention_bias", "use_qk_norm"},
)
