"""ViT (image classifier): patches for positions, the class token first, norms before blocks.

Takes images [batch, channel, height, width]; a run's logits are [batch, class]. Sweeps are whole runs of pairs of
images; direct effects take prompts, so they are not for images.
"""

from __future__ import annotations

from dataclasses import replace

from vesalius.adapters.base import Access, Adapter
from vesalius.adapters.understood import SIZES

VIT = Adapter(
    family="vit",
    classes=("ViTForImageClassification",),
    layers="vit.layers",
    sites={
        "resid_pre": Access("", "in"),
        "q": Access("attention.q_proj", heads="head"),
        "k": Access("attention.k_proj", heads="kv_head"),
        "v": Access("attention.v_proj", heads="kv_head"),
        "z": Access("attention.o_proj", "in", heads="head"),
        "attn_out": Access("attention.o_proj"),
        "resid_mid": Access("layernorm_after", "in", delta="attention.o_proj"),
        "mlp_in": Access("mlp", "in"),
        "mlp_post": Access("mlp.fc2", "in"),
        "mlp_out": Access("mlp"),
        "resid_post": Access(""),
    },
    outside={"embed": Access("vit.embeddings"), "final_norm": Access("vit.layernorm")},
    o_proj="attention.o_proj",
    final_norm="vit.layernorm",
    unembed="classifier",
    norm="layer",
    config={
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "d_model": "hidden_size",
        # Classes take the place of tokens.
        "vocab": "num_labels",
    },
    attention="attention",
    understood=SIZES
    | {"image_size", "patch_size", "num_channels", "qkv_bias", "encoder_stride", "pooler_output_size", "pooler_act"},
    causal=False,
    call={},
    direct=False,
    input="pixel_values",
)
# Earlier releases of transformers 5 name these modules as BERT's, and give the MLP none of its own.
VIT_OLD = replace(
    VIT,
    layers="vit.encoder.layer",
    sites={
        "resid_pre": Access("", "in"),
        "q": Access("attention.attention.query", heads="head"),
        "k": Access("attention.attention.key", heads="kv_head"),
        "v": Access("attention.attention.value", heads="kv_head"),
        "z": Access("attention.output.dense", "in", heads="head"),
        "attn_out": Access("attention.output.dense"),
        "resid_mid": Access("layernorm_after", "in", delta="attention.output.dense"),
        "mlp_in": Access("intermediate", "in"),
        "mlp_post": Access("output.dense", "in"),
        "mlp_out": Access("output.dense"),
        "resid_post": Access(""),
    },
    o_proj="attention.output.dense",
    attention="attention.attention",
)
