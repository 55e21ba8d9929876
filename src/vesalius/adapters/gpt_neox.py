"""GPT-NeoX and Pythia: LayerNorm, partial rotation, queries, keys and values interleaved head by head.

Pythia's attention and MLP both read the layer's input (parallel residual): there is no resid_mid. Models with
`use_parallel_residual=False` have one.
"""

from __future__ import annotations

from dataclasses import replace

from vesalius.adapters.base import Access, Adapter
from vesalius.adapters.understood import ROTARY, SIZES

NEOX = Adapter(
    family="gpt_neox",
    classes=("GPTNeoXForCausalLM",),
    layers="gpt_neox.layers",
    sites={
        "resid_pre": Access("", "in"),
        "q": Access("attention.query_key_value", heads="head", part="q", fused="groups"),
        "k": Access("attention.query_key_value", heads="kv_head", part="k", fused="groups"),
        "v": Access("attention.query_key_value", heads="kv_head", part="v", fused="groups"),
        "z": Access("attention.dense", "in", heads="head"),
        "attn_out": Access("attention.dense"),
        # No resid_mid: attention and MLP are added to the stream together.
        "mlp_in": Access("mlp", "in"),
        "mlp_post": Access("mlp.dense_4h_to_h", "in"),
        "mlp_out": Access("mlp"),
        "resid_post": Access(""),
    },
    outside={
        "embed": Access("gpt_neox.embed_in"),
        "final_norm": Access("gpt_neox.final_layer_norm"),
        "logits": Access("lm_head"),
    },
    o_proj="attention.dense",
    final_norm="gpt_neox.final_layer_norm",
    unembed="lm_head",
    norm="layer",
    config={
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "d_model": "hidden_size",
        "vocab": "vocab_size",
    },
    attention="attention",
    replay={
        "attention_mask": "drop",
        "layer_past": "drop",
        "use_cache": "false",
        "position_ids": "positions",
        "position_embeddings": "rotary",
    },
    accepts={"use_parallel_residual": (True,), "is_decoder": (False, True)},
    understood=SIZES | ROTARY | {"attention_bias", "rotary_pct", "rotary_emb_base"},
)
NEOX_SERIAL = replace(
    NEOX,
    family="gpt_neox (serial)",
    sites={**NEOX.sites, "resid_mid": Access("post_attention_layernorm", "in", delta="attention.dense")},
    accepts={**NEOX.accepts, "use_parallel_residual": (False,)},
)


def _before_lm_head(adapter: Adapter) -> Adapter:
    """Earlier releases of transformers 5 name the unembedding otherwise."""
    return replace(adapter, unembed="embed_out", outside={**adapter.outside, "logits": Access("embed_out")})


NEOX_OLD, NEOX_SERIAL_OLD = _before_lm_head(NEOX), _before_lm_head(NEOX_SERIAL)
