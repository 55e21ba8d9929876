"""Encoders that stand in larger models, taken alone: CLIP's two towers, Whisper's encoder.

Give the tower itself: vs.Model(clip.vision_model), vs.Model(whisper.get_encoder()). A run's logits are its first
output, the last hidden states. Sweeps are whole runs of pairs.
"""

from __future__ import annotations

from dataclasses import replace

from vesalius.adapters.base import Access, Adapter
from vesalius.adapters.understood import SIZES

CLIP_VISION = Adapter(
    family="clip (vision)",
    classes=("CLIPVisionModel", "CLIPVisionTransformer"),
    layers="encoder.layers",
    sites={
        "resid_pre": Access("", "in"),
        "q": Access("self_attn.q_proj", heads="head"),
        "k": Access("self_attn.k_proj", heads="kv_head"),
        "v": Access("self_attn.v_proj", heads="kv_head"),
        "z": Access("self_attn.out_proj", "in", heads="head"),
        "attn_out": Access("self_attn.out_proj"),
        "resid_mid": Access("layer_norm2", "in", delta="self_attn.out_proj"),
        "mlp_in": Access("mlp", "in"),
        "mlp_post": Access("mlp.fc2", "in"),
        "mlp_out": Access("mlp"),
        "resid_post": Access(""),
    },
    # The normed embeddings, which enter the stream; the last norm is applied to the class token alone.
    outside={"embed": Access("pre_layrnorm")},
    o_proj="self_attn.out_proj",
    final_norm="post_layernorm",
    unembed="",
    norm="layer",
    config={"n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "d_model": "hidden_size",
            "vocab": "projection_dim"},
    attention="self_attn",
    understood=SIZES | {"image_size", "patch_size", "num_channels"},
    causal=False,
    call={},
    direct=False,
    input="pixel_values",
)  # fmt: skip
CLIP_VISION_OLD = replace(
    CLIP_VISION,
    layers="vision_model.encoder.layers",
    outside={"embed": Access("vision_model.pre_layrnorm")},
    final_norm="vision_model.post_layernorm",
)
CLIP_TEXT = replace(
    CLIP_VISION,
    family="clip (text)",
    classes=("CLIPTextModel", "CLIPTextTransformer"),
    outside={"embed": Access("embeddings"), "final_norm": Access("final_layer_norm")},
    final_norm="final_layer_norm",
    config={**CLIP_VISION.config, "vocab": "vocab_size"},
    understood=SIZES | {"projection_dim"},
    causal=True,
    input="input_ids",
)
CLIP_TEXT_OLD = replace(
    CLIP_TEXT,
    layers="text_model.encoder.layers",
    outside={"embed": Access("text_model.embeddings"), "final_norm": Access("text_model.final_layer_norm")},
    final_norm="text_model.final_layer_norm",
)
WHISPER = replace(
    CLIP_VISION,
    family="whisper (encoder)",
    classes=("WhisperEncoder",),
    layers="layers",
    sites={
        **CLIP_VISION.sites,
        # A layer's own norm before its MLP, whatever its name.
        "resid_mid": Access("final_layer_norm", "in", delta="self_attn.out_proj"),
        "mlp_in": Access("fc1", "in"),
        "mlp_post": Access("fc2", "in"),
        "mlp_out": Access("fc2"),
    },
    outside={"embed": Access("layers.0", "in"), "final_norm": Access("layer_norm")},
    final_norm="layer_norm",
    config={"n_layers": "encoder_layers", "n_heads": "encoder_attention_heads", "d_model": "d_model",
            "vocab": "vocab_size"},
    understood=SIZES
    | {"num_mel_bins", "encoder_ffn_dim", "decoder_layers", "decoder_attention_heads", "decoder_ffn_dim",
       "encoder_layerdrop", "decoder_layerdrop", "activation_function", "scale_embedding", "max_source_positions",
       "max_target_positions", "decoder_start_token_id", "begin_suppress_tokens", "suppress_tokens",
       "forced_decoder_ids", "use_weighted_layer_sum", "classifier_proj_size", "apply_spec_augment", "mask_time_prob",
       "mask_time_length", "mask_time_min_masks", "mask_feature_prob", "mask_feature_length",
       "mask_feature_min_masks", "median_filter_width", "num_hidden_layers", "max_length"},
    input="input_features",
)  # fmt: skip
