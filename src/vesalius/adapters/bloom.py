"""Bloom: LayerNorm, ALiBi, queries, keys and values interleaved head by head; blocks return the residual sum.

Its attention does not go through transformers' AttentionInterface: the pattern is read and edited where its dropout is,
there are no scores, and sweeps run the whole model. embed is the normed embedding, which enters the residual stream.
"""

from __future__ import annotations

from vesalius.adapters.base import Access, Adapter
from vesalius.adapters.understood import SIZES

BLOOM = Adapter(
    family="bloom",
    classes=("BloomForCausalLM",),
    layers="transformer.h",
    sites={
        "resid_pre": Access("", "in"),
        "q": Access("self_attention.query_key_value", heads="head", part="q", fused="groups"),
        "k": Access("self_attention.query_key_value", heads="kv_head", part="k", fused="groups"),
        "v": Access("self_attention.query_key_value", heads="kv_head", part="v", fused="groups"),
        # Dropout does nothing in evaluation mode, and is the only module that returns the pattern.
        "pattern": Access("self_attention.attention_dropout"),
        "z": Access("self_attention.dense", "in", heads="head"),
        "attn_out": Access("self_attention.dense"),
        "resid_mid": Access("post_attention_layernorm", "in", delta="self_attention.dense"),
        "mlp_in": Access("mlp", "in"),
        "mlp_post": Access("mlp.dense_4h_to_h", "in"),
        # Not "mlp", which returns the sum with the residual stream.
        "mlp_out": Access("mlp.dense_4h_to_h"),
        "resid_post": Access(""),
    },
    outside={
        "embed": Access("transformer.word_embeddings_layernorm"),
        "final_norm": Access("transformer.ln_f"),
        "logits": Access("lm_head"),
    },
    o_proj="self_attention.dense",
    final_norm="transformer.ln_f",
    unembed="lm_head",
    norm="layer",
    config={"n_layers": "n_layer", "n_heads": "n_head", "d_model": "hidden_size", "vocab": "vocab_size"},
    # pretraining_tp splits products only together with slow_but_exact.
    accepts={
        "apply_residual_connection_post_layernorm": (False,),
        "pretraining_tp": (1, 2, 4),
        "slow_but_exact": (False,),
    },
    understood=SIZES
    | {
        "layer_norm_epsilon",
        "attention_softmax_in_fp32",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "offset_alibi",
        "skip_bias_add",
        "skip_bias_add_qkv",
        "n_inner",
        "n_embed",
    },
    # ALiBi: distances are added to the scores.
    positions=False,
)
