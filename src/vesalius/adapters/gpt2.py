"""GPT-2 (LayerNorm, learned positions, fused query-key-value projection, Conv1D weights stored transposed)."""

from __future__ import annotations

from vesalius.adapters.base import Access, Adapter

GPT2 = Adapter(
    family="gpt2",
    classes=("GPT2LMHeadModel",),
    layers="transformer.h",
    sites={
        "resid_pre": Access("", "in"),
        "q": Access("attn.c_attn", heads="head", part="q"),
        "k": Access("attn.c_attn", heads="kv_head", part="k"),
        "v": Access("attn.c_attn", heads="kv_head", part="v"),
        "z": Access("attn.c_proj", "in", heads="head"),
        # A dropout module, because attn itself returns a tuple; it does nothing in evaluation mode.
        "attn_out": Access("attn.resid_dropout"),
        "resid_mid": Access("ln_2", "in", delta="attn.resid_dropout"),
        "mlp_in": Access("mlp", "in"),
        "mlp_post": Access("mlp.c_proj", "in"),
        "mlp_out": Access("mlp"),
        "resid_post": Access(""),
    },
    outside={
        "embed": Access("transformer.wte"),
        "pos_embed": Access("transformer.wpe"),
        "final_norm": Access("transformer.ln_f"),
        "logits": Access("lm_head"),
    },
    o_proj="attn.c_proj",
    final_norm="transformer.ln_f",
    unembed="lm_head",
    norm="layer",
    config={
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "d_model": "hidden_size",
        "vocab": "vocab_size",
    },
    attention="attn",
    replay={
        "past_key_values": "drop",
        "attention_mask": "drop",
        "encoder_hidden_states": "drop",
        "encoder_attention_mask": "drop",
        "use_cache": "false",
        "position_ids": "positions",
    },
    accepts={"add_cross_attention": (False,), "reorder_and_upcast_attn": (False,)},
    understood=frozenset(
        [
            "vocab_size",
            "n_positions",
            "n_embd",
            "n_layer",
            "n_head",
            "n_inner",
            "activation_function",
            "layer_norm_epsilon",
            "scale_attn_weights",
            "scale_attn_by_inverse_layer_idx",
        ]
    ),
)
