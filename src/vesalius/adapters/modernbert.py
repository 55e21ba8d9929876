"""ModernBERT (masked language model): both directions, rotary positions, sliding and full layers, norms before blocks.

Its prediction head is not linear after the final norm, so there are no direct effects. Sweeps run the whole model.
"""

from __future__ import annotations

from vesalius.adapters.base import Access, Adapter
from vesalius.adapters.understood import ROTARY, SIZES, WINDOWS

MODERNBERT = Adapter(
    family="modernbert",
    classes=("ModernBertForMaskedLM",),
    layers="model.layers",
    sites={
        "resid_pre": Access("", "in"),
        "q": Access("attn.Wqkv", heads="head", part="q"),
        "k": Access("attn.Wqkv", heads="kv_head", part="k"),
        "v": Access("attn.Wqkv", heads="kv_head", part="v"),
        "z": Access("attn.Wo", "in", heads="head"),
        "attn_out": Access("attn.Wo"),
        # No module returns this sum, so it is read where the norm before the MLP reads it.
        "resid_mid": Access("mlp_norm", "in", delta="attn.Wo"),
        "mlp_in": Access("mlp", "in"),
        "mlp_post": Access("mlp.Wo", "in"),
        "mlp_out": Access("mlp"),
        "resid_post": Access(""),
    },
    outside={
        "embed": Access("model.embeddings"),
        "final_norm": Access("model.final_norm"),
        "logits": Access("decoder"),
    },
    o_proj="attn.Wo",
    final_norm="model.final_norm",
    unembed="decoder",
    norm="layer",
    config={
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "d_model": "hidden_size",
        "vocab": "vocab_size",
    },
    attention="attn",
    accepts={"sparse_prediction": (False,)},
    understood=SIZES
    | ROTARY
    | WINDOWS
    | {
        "hidden_activation",
        "initializer_cutoff_factor",
        "norm_eps",
        "norm_bias",
        "attention_bias",
        "local_attention",
        "global_attn_every_n_layers",
        "global_rope_theta",
        "local_rope_theta",
        "mlp_bias",
        "decoder_bias",
        "classifier_pooling",
        "classifier_bias",
        "classifier_activation",
        "deterministic_flash_attn",
        "sparse_pred_ignore_index",
        "reference_compile",
        "repad_logits_with_grad",
        "position_embedding_type",
    },
    causal=False,
    call={},
    direct=False,
)
