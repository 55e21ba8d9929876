"""T5 (encoder-decoder): norms before blocks, relative position biases added to the scores, no scaling of them.

Sites of the two stacks are encoder.layers.2.z, decoder.layers.2.z. The decoder also attends to the encoder: cross_q,
cross_k, cross_v, cross_scores, cross_pattern, cross_z and cross_attn_out; resid_mid is the stream before that,
resid_mid_cross after it. final_norm of the decoder is before T5's scaling of the logits. A run takes
Tokens(ids, decoder=ids), by default the start token alone, and its logits are the decoder's.
"""

from __future__ import annotations

from vesalius.adapters.base import Access, Adapter, Stack
from vesalius.adapters.understood import SIZES

SELF = {
    "resid_pre": Access("", "in"),
    "q": Access("layer.0.SelfAttention.q", heads="head"),
    "k": Access("layer.0.SelfAttention.k", heads="kv_head"),
    "v": Access("layer.0.SelfAttention.v", heads="kv_head"),
    "z": Access("layer.0.SelfAttention.o", "in", heads="head"),
    "attn_out": Access("layer.0.SelfAttention.o"),
    # Blocks return the sum with the residual stream.
    "resid_mid": Access("layer.0"),
    "resid_post": Access(""),
}
CROSS = {
    "cross_q": Access("layer.1.EncDecAttention.q", heads="head"),
    "cross_k": Access("layer.1.EncDecAttention.k", heads="kv_head"),
    "cross_v": Access("layer.1.EncDecAttention.v", heads="kv_head"),
    "cross_z": Access("layer.1.EncDecAttention.o", "in", heads="head"),
    "cross_attn_out": Access("layer.1.EncDecAttention.o"),
    "resid_mid_cross": Access("layer.1"),
}


def _mlp(number: int) -> dict[str, Access]:
    path = f"layer.{number}.DenseReluDense"
    return {"mlp_in": Access(path, "in"), "mlp_post": Access(f"{path}.wo", "in"), "mlp_out": Access(path)}


def _outside(stack: str) -> dict[str, Access]:
    return {"embed": Access(f"{stack}.block.0", "in"), "final_norm": Access(f"{stack}.final_layer_norm")}


T5 = Adapter(
    family="t5",
    classes=("T5ForConditionalGeneration",),
    layers="",
    sites={},
    outside={"logits": Access("lm_head")},
    o_proj="",
    final_norm="decoder.final_layer_norm",
    unembed="lm_head",
    norm="rms",
    config={
        "n_layers": "num_layers",
        "n_decoder_layers": "num_decoder_layers",
        "n_heads": "num_heads",
        "d_head": "d_kv",
        "d_model": "d_model",
        "vocab": "vocab_size",
        "start": "decoder_start_token_id",
    },
    understood=SIZES
    | {
        "d_ff",
        "relative_attention_num_buckets",
        "relative_attention_max_distance",
        "layer_norm_epsilon",
        "feed_forward_proj",
        "dense_act_fn",
        "is_gated_act",
        "scale_decoder_outputs",
        "n_positions",
    },
    accepts={"is_decoder": (False,)},
    # Its encoder reads both ways.
    causal=False,
    # Its logits are those of the decoder, while a direct effect is of what was written at a prompt's position.
    direct=False,
    positions=False,
    stacks={
        "encoder": Stack(
            layers="encoder.block",
            sites={**SELF, **_mlp(1)},
            outside=_outside("encoder"),
            o_proj="layer.0.SelfAttention.o",
            attention="layer.0.SelfAttention",
        ),
        "decoder": Stack(
            layers="decoder.block",
            sites={**SELF, **CROSS, **_mlp(2)},
            outside=_outside("decoder"),
            o_proj="layer.0.SelfAttention.o",
            attention="layer.0.SelfAttention",
            cross_o_proj="layer.1.EncDecAttention.o",
            cross_attention="layer.1.EncDecAttention",
        ),
    },
)
