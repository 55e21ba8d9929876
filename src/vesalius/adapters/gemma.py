"""Gemma 1, 2 and 3: norms before and after each block, scaled embeddings, sliding and full attention layers.

attn_out and mlp_out are what is added to the residual stream: the outputs of the norms after attention and MLP. embed
is the scaled embedding. The site logits is the unembedding's output, before Gemma 2's cap; a run's logits are capped.
q and k are the projections' outputs, before Gemma 3's query and key norms and before rotation.
Gemma 1 has no norms after the blocks. Gemma 3 with images is run on text, as its language model alone would be.
"""

from __future__ import annotations

from dataclasses import replace

from vesalius.adapters.base import Access
from vesalius.adapters.llama import LLAMA
from vesalius.adapters.understood import ROTARY, SIZES, WINDOWS

GEMMA = replace(
    LLAMA,
    family="gemma",
    classes=("GemmaForCausalLM",),
    # Read where it enters the stream: not in every release is the scale part of the embedding.
    outside={**LLAMA.outside, "embed": Access("model.layers.0", "in")},
    norm="rms_plus_one",
    accepts={"use_bidirectional_attention": (None, False)},
    understood=SIZES | ROTARY | {"attention_bias", "hidden_activation"},
)
GEMMA2 = replace(
    LLAMA,
    family="gemma2",
    classes=("Gemma2ForCausalLM",),
    outside=GEMMA.outside,
    sites={
        **LLAMA.sites,
        "attn_out": Access("post_attention_layernorm"),
        # In Gemma post_attention_layernorm norms attention's output; Llama has that name for the norm before the MLP.
        "resid_mid": Access("pre_feedforward_layernorm", "in", delta="post_attention_layernorm"),
        "mlp_out": Access("post_feedforward_layernorm"),
    },
    norm="rms_plus_one",
    attn_norm="post_attention_layernorm",
    cap="final_logit_softcapping",
    attention_cap="attn_logit_softcapping",
    accepts={"use_bidirectional_attention": (None, False)},
    understood=SIZES
    | ROTARY
    | WINDOWS
    | {"hidden_activation", "query_pre_attn_scalar", "attn_logit_softcapping", "attention_bias"},
)
# Gemma 3 reads attn_logit_softcapping nowhere: a value there would be a promise the model does not keep.
GEMMA3 = replace(
    GEMMA2,
    family="gemma3",
    classes=("Gemma3ForCausalLM",),
    accepts={"use_bidirectional_attention": (False, None), "attn_logit_softcapping": (None,)},
    understood=GEMMA2.understood | {"sliding_window_pattern"},
)
GEMMA3_IMAGES = replace(
    GEMMA3,
    family="gemma3 (images)",
    classes=("Gemma3ForConditionalGeneration",),
    layers="model.language_model.layers",
    outside={
        "embed": Access("model.language_model.embed_tokens"),
        "final_norm": Access("model.language_model.norm"),
        "logits": Access("lm_head"),
    },
    final_norm="model.language_model.norm",
    text="text_config",
    understood=GEMMA3.understood
    | {
        "vision_config",
        "mm_tokens_per_image",
        "boi_token_index",
        "eoi_token_index",
        "image_token_index",
        "boi_token_id",
        "eoi_token_id",
        "image_token_id",
    },
)
