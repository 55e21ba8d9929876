"""DeepSeek V3 (latent attention): keys and values come from one compressed vector per token.

q is the projection's output, before rotation, and wider than z; keys and values have no sites of their own, because
no module returns them: the latent is `module:model.layers.0.self_attn.kv_a_layernorm|out`. Whole mixtures are read, as
the first layers have none: routers and experts are `module:` sites.
"""

from __future__ import annotations

from dataclasses import replace

from vesalius.adapters.base import Access
from vesalius.adapters.llama import LLAMA
from vesalius.adapters.understood import ROTARY, SIZES

DEEPSEEK_V3 = replace(
    LLAMA,
    family="deepseek_v3",
    classes=("DeepseekV3ForCausalLM",),
    sites={
        **{kind: access for kind, access in LLAMA.sites.items() if kind not in ("k", "v", "mlp_post")},
        "q": Access("self_attn.q_b_proj", heads="head"),
    },
    config={**LLAMA.config, "d_head": "v_head_dim"},
    accepts={"pretraining_tp": (1,), "ep_size": (1,)},
    understood=SIZES
    | ROTARY
    | {
        "moe_intermediate_size",
        "n_shared_experts",
        "n_routed_experts",
        "routed_scaling_factor",
        "kv_lora_rank",
        "q_lora_rank",
        "qk_rope_head_dim",
        "qk_nope_head_dim",
        "qk_head_dim",
        "n_group",
        "topk_group",
        "num_experts_per_tok",
        "first_k_dense_replace",
        "norm_topk_prob",
        "rope_interleave",
        "attention_bias",
        # Layers that predict further tokens are in the files and not loaded.
        "num_mtp_layers",
        "num_nextn_predict_layers",
        "scoring_func",
        "topk_method",
        "moe_layer_freq",
        "aux_loss_alpha",
        "seq_aux",
    },
)
# Small models have no compressed queries.
DEEPSEEK_V3_PLAIN = replace(
    DEEPSEEK_V3,
    family="deepseek_v3 (plain queries)",
    sites={**DEEPSEEK_V3.sites, "q": Access("self_attn.q_proj", heads="head")},
    accepts={**DEEPSEEK_V3.accepts, "q_lora_rank": (None,)},
    understood=DEEPSEEK_V3.understood - {"q_lora_rank"},
)
