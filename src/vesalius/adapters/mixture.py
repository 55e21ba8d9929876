"""Mixtures of experts: Mixtral, OLMoE, Qwen 2 and 3 MoE, gpt-oss. Llama's layer with a router and experts for an MLP.

router: logits [batch, pos, expert]; an edit reroutes. expert_out: what each expert adds, times its weight
[batch, pos, expert, d_model]; zero where a token was not sent. Their sum is mlp_out (less the shared expert of
Qwen 2 MoE). There is no mlp_post: each token has its own neurons. gpt-oss has attention sinks: a row of its pattern
sums to less than one. The mixture of DeepSeek V3 is read as a whole: its mlp_in and mlp_out.
"""

from __future__ import annotations

from dataclasses import replace

from vesalius.adapters.base import Access
from vesalius.adapters.llama import LLAMA
from vesalius.adapters.understood import ROTARY, SIZES, WINDOWS

MIXTRAL = replace(
    LLAMA,
    family="mixtral",
    classes=("MixtralForCausalLM",),
    sites={
        **{kind: access for kind, access in LLAMA.sites.items() if kind != "mlp_post"},
        # Router and experts get the tokens of the whole batch along one axis.
        "router": Access("mlp.gate", flat=True),
        "expert_out": Access("mlp.experts", flat=True),
    },
    gate="mlp.gate",
    experts="mlp.experts",
    config={**LLAMA.config, "n_experts": "num_local_experts"},
    accepts={},
    understood=SIZES | ROTARY | {"sliding_window", "num_experts_per_tok"},
)
OLMOE = replace(
    MIXTRAL,
    family="olmoe",
    classes=("OlmoeForCausalLM",),
    config={**LLAMA.config, "n_experts": "num_experts"},
    accepts={"clip_qkv": (None,)},
    understood=SIZES | ROTARY | {"num_experts_per_tok", "norm_topk_prob", "attention_bias"},
)
QWEN2_MOE = replace(
    OLMOE,
    family="qwen2_moe",
    classes=("Qwen2MoeForCausalLM",),
    # Every layer is a mixture; dense layers in between would have other sites.
    accepts={"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
    understood=SIZES
    | ROTARY
    | WINDOWS
    | {
        "num_experts_per_tok",
        "norm_topk_prob",
        "qkv_bias",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
    },
)
QWEN3_MOE = replace(
    QWEN2_MOE,
    family="qwen3_moe",
    classes=("Qwen3MoeForCausalLM",),
    understood=SIZES
    | ROTARY
    | WINDOWS
    | {"num_experts_per_tok", "norm_topk_prob", "attention_bias", "moe_intermediate_size", "num_local_experts"},
)
GPT_OSS = replace(
    MIXTRAL,
    family="gpt_oss",
    classes=("GptOssForCausalLM",),
    sites={
        **MIXTRAL.sites,
        "router": Access("mlp.router", flat=True),
    },
    gate="mlp.router",
    understood=SIZES
    | ROTARY
    | WINDOWS
    | {"num_experts_per_tok", "attention_bias", "swiglu_alpha", "swiglu_limit", "initial_context_length"}
    | {"experts_per_token"},
)
