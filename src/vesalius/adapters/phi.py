"""Phi (1, 1.5, 2): attention and MLP side by side on one normed input, partial rotation, biases everywhere.

Both read the same residual stream, so there is no resid_mid.
"""

from __future__ import annotations

from dataclasses import replace

from vesalius.adapters.base import Access
from vesalius.adapters.llama import LLAMA
from vesalius.adapters.understood import ROTARY, SIZES

PHI = replace(
    LLAMA,
    family="phi",
    classes=("PhiForCausalLM",),
    sites={
        **{kind: access for kind, access in LLAMA.sites.items() if kind != "resid_mid"},
        "z": Access("self_attn.dense", "in", heads="head"),
        "attn_out": Access("self_attn.dense"),
        "mlp_post": Access("mlp.fc2", "in"),
    },
    outside={**LLAMA.outside, "final_norm": Access("model.final_layernorm")},
    o_proj="self_attn.dense",
    final_norm="model.final_layernorm",
    norm="layer",
    accepts={},
    understood=SIZES | ROTARY | {"qk_layernorm"},
)
