"""OPT: LayerNorm, learned positions, ReLU; the MLP has no module of its own and sees [batch * pos, d_model].

OPT 350M is refused: its norms come after the blocks and its embeddings are narrower than its layers.
"""

from __future__ import annotations

from vesalius.adapters.base import Access, Adapter
from vesalius.adapters.understood import SIZES

OPT = Adapter(
    family="opt",
    classes=("OPTForCausalLM",),
    layers="model.decoder.layers",
    sites={
        "resid_pre": Access("", "in"),
        "q": Access("self_attn.q_proj", heads="head"),
        "k": Access("self_attn.k_proj", heads="kv_head"),
        "v": Access("self_attn.v_proj", heads="kv_head"),
        "z": Access("self_attn.out_proj", "in", heads="head"),
        "attn_out": Access("self_attn.out_proj"),
        # A layer's own norm before its MLP, whatever its name.
        "resid_mid": Access("final_layer_norm", "in", delta="self_attn.out_proj", flat=True),
        "mlp_in": Access("fc1", "in", flat=True),
        "mlp_post": Access("fc2", "in", flat=True),
        "mlp_out": Access("fc2", flat=True),
        "resid_post": Access(""),
    },
    outside={
        "embed": Access("model.decoder.embed_tokens"),
        "pos_embed": Access("model.decoder.embed_positions"),
        "final_norm": Access("model.decoder.final_layer_norm"),
        "logits": Access("lm_head"),
    },
    o_proj="self_attn.out_proj",
    final_norm="model.decoder.final_layer_norm",
    unembed="lm_head",
    norm="layer",
    config={
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "d_model": "hidden_size",
        "vocab": "vocab_size",
    },
    attention="self_attn",
    replay={
        "attention_mask": "drop",
        "past_key_values": "drop",
        "use_cache": "false",
        "position_ids": "positions",
    },
    accepts={
        "do_layer_norm_before": (True,),
        "layer_norm_elementwise_affine": (True,),
        "_remove_final_layer_norm": (False,),
    },
    understood=SIZES | {"ffn_dim", "enable_bias", "activation_function"},
    # Otherwise projections stand between the embeddings and the stream.
    same={"word_embed_proj_dim": "hidden_size"},
)
