"""ALBERT (masked language model): BERT whose layers are one module, called again and again.

A site of layer 3 is the module's fourth call; an edit there leaves the other calls alone. The input of layer 0 is
projected from narrower embeddings; embed is that projection.
"""

from __future__ import annotations

from dataclasses import replace

from vesalius.adapters.base import Access
from vesalius.adapters.bert import BERT
from vesalius.adapters.understood import SIZES

ALBERT = replace(
    BERT,
    family="albert",
    classes=("AlbertForMaskedLM",),
    # One module for all layers, so that its path has no number.
    layers="albert.encoder.albert_layer_groups.0.albert_layers.0",
    sites={
        "resid_pre": Access("", "in"),
        "q": Access("attention.query", heads="head"),
        "k": Access("attention.key", heads="kv_head"),
        "v": Access("attention.value", heads="kv_head"),
        "z": Access("attention.dense", "in", heads="head"),
        "attn_out": Access("attention.dense"),
        "resid_mid": Access("attention"),
        "mlp_in": Access("ffn", "in"),
        "mlp_post": Access("ffn_output", "in"),
        "mlp_out": Access("ffn_output"),
        "resid_post": Access(""),
    },
    outside={"embed": Access("albert.encoder.embedding_hidden_mapping_in"), "logits": Access("predictions.decoder")},
    o_proj="attention.dense",
    final_norm="predictions.LayerNorm",
    unembed="predictions.decoder",
    attention="attention",
    # More groups would be more modules, and which one a layer calls would depend on the config.
    accepts={"num_hidden_groups": (1,), "inner_group_num": (1,), "position_embedding_type": ("absolute",)},
    understood=SIZES
    | {"embedding_size", "type_vocab_size", "down_scale_factor", "gap_size", "net_structure_type", "num_memory_blocks"},
    shared=True,
)
