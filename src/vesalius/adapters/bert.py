"""BERT and RoBERTa (masked language models): attention in both directions, norms on the residual stream itself.

attn_out and mlp_out are added to the stream, which is then normed: resid_mid and resid_post are normed sums, so no
direct effects. Sweeps run the whole model.
"""

from __future__ import annotations

from dataclasses import replace

from vesalius.adapters.base import Access, Adapter
from vesalius.adapters.understood import SIZES

BERT = Adapter(
    family="bert",
    classes=("BertForMaskedLM",),
    layers="bert.encoder.layer",
    sites={
        "resid_pre": Access("", "in"),
        "q": Access("attention.self.query", heads="head"),
        "k": Access("attention.self.key", heads="kv_head"),
        "v": Access("attention.self.value", heads="kv_head"),
        "z": Access("attention.output.dense", "in", heads="head"),
        "attn_out": Access("attention.output.dense"),
        # The norm after attention stands on the stream: its output goes on.
        "resid_mid": Access("attention"),
        "mlp_in": Access("intermediate", "in"),
        "mlp_post": Access("output.dense", "in"),
        "mlp_out": Access("output.dense"),
        "resid_post": Access(""),
    },
    outside={"embed": Access("bert.embeddings"), "logits": Access("cls.predictions.decoder")},
    o_proj="attention.output.dense",
    # A dense layer, an activation and a norm in one module.
    final_norm="cls.predictions.transform",
    unembed="cls.predictions.decoder",
    norm="layer",
    config={
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "d_model": "hidden_size",
        "vocab": "vocab_size",
    },
    attention="attention.self",
    accepts={"is_decoder": (False,), "add_cross_attention": (False,), "position_embedding_type": ("absolute",)},
    understood=SIZES | {"type_vocab_size"},
    causal=False,
    call={},
    direct=False,
)
ROBERTA = replace(
    BERT,
    family="roberta",
    classes=("RobertaForMaskedLM", "XLMRobertaForMaskedLM"),
    layers="roberta.encoder.layer",
    outside={"embed": Access("roberta.embeddings"), "logits": Access("lm_head.decoder")},
    final_norm="lm_head.layer_norm",
    unembed="lm_head.decoder",
    # Positions are numbered from the padding token's number on, by the module itself, which tells padding by its token.
    positions=False,
    config={**BERT.config, "padding": "pad_token_id"},
)
