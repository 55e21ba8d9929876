"""Tiny random models of every family, and every site's raw module, written down apart from the adapters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import tiny
import vesalius as vs

V = tiny.VOCAB
COMMON = {
    "vocab_size": V, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 40,
    "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": None, "bos_token_id": 0,
    "eos_token_id": 1,
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_experts": 5, "num_experts_per_tok": 2}
WINDOW = {"sliding_window": 3, "use_sliding_window": True}


# One of every kind of layer: what is tested edit by edit or dtype by dtype is tested on these; `make slow` tests all.
DISTINCT = (
    "albert", "bert", "bloom", "deepseek_v3", "gemma2", "gemma3 (images)", "gpt_neox", "gpt_oss", "gptj", "llama",
    "mixtral", "modernbert", "phi3", "qwen3", "stablelm (parallel)",
)  # fmt: skip


def distinct(names: Iterable[str]) -> list[Any]:
    """Parameters of a test: those of the other families are slow."""
    return [name if name in DISTINCT else pytest.param(name, marks=pytest.mark.slow) for name in names]


@dataclass(frozen=True)
class Family:
    """A tiny config, and where a raw hook finds each layer site: `path>` is an output, `>path` an input."""

    name: str
    model: str
    config: str
    sizes: dict[str, Any]
    layers: str
    raw: dict[str, str]
    heads: tuple[int, int] = (6, 2)
    qkv: Callable[[Any], tuple[Tensor, Tensor, Tensor]] | None = None
    """Queries, keys and values [batch, pos, head, d_head] from the fused projection's output, spelled out."""
    replayed: bool = True
    causal: bool = True
    shared: bool = False
    """All layers are the module at `layers`."""
    additive: bool = True
    """resid_post is resid_pre + attn_out + mlp_out."""
    direct: bool = True
    sinks: bool = False
    """Attention sinks: a row of the pattern sums to less than one."""
    scales: dict[str, float] = field(default_factory=dict)
    """What the stream gets of a raw tensor, where that is not the tensor itself."""

    def build(self, seed: int = 0, **changes: Any) -> Any:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**{**self.sizes, **changes})
        net = getattr(transformers, self.model)(config).eval()
        for name, parameter in net.named_parameters():
            # Norms start at one (or zero): only other values tell weight from 1 + weight, and biases start at zero.
            if "norm" in name.lower() or "ln_" in name or name.endswith(("bias", "sinks")):
                parameter.data += 0.2 * torch.randn_like(parameter)
        return net


LLAMA_RAW = {
    "q": "self_attn.q_proj>", "k": "self_attn.k_proj>", "v": "self_attn.v_proj>", "z": ">self_attn.o_proj",
    "attn_out": "self_attn>", "resid_mid": ">post_attention_layernorm", "mlp_in": ">mlp", "mlp_post": ">mlp.down_proj",
    "mlp_out": "mlp>",
}  # fmt: skip
POST_NORM = {"attn_out": "post_attention_layernorm>", "mlp_out": "post_feedforward_layernorm>"}
GEMMA_RAW = {**LLAMA_RAW, **POST_NORM, "resid_mid": ">pre_feedforward_layernorm"}
PHI_RAW = {
    **LLAMA_RAW, "z": ">self_attn.dense", "mlp_post": ">mlp.fc2", "resid_mid": "",
}  # fmt: skip
MIXTURE_RAW = {**LLAMA_RAW, "mlp_post": "", "router": "mlp.gate>"}
NEOX_RAW = {
    "z": ">attention.dense", "attn_out": "attention>", "mlp_in": ">mlp", "mlp_post": ">mlp.dense_4h_to_h",
    "mlp_out": "mlp>", "qkv": "attention.query_key_value>",
}  # fmt: skip
OPT_RAW = {
    "q": "self_attn.q_proj>", "k": "self_attn.k_proj>", "v": "self_attn.v_proj>", "z": ">self_attn.out_proj",
    "attn_out": "self_attn>", "resid_mid": ">final_layer_norm", "mlp_in": ">fc1", "mlp_post": ">fc2", "mlp_out": "fc2>",
}  # fmt: skip
BLOOM_RAW = {
    "z": ">self_attention.dense", "attn_out": "self_attention.dense>", "resid_mid": ">post_attention_layernorm",
    "mlp_in": ">mlp", "mlp_post": ">mlp.dense_4h_to_h", "mlp_out": "mlp.dense_4h_to_h>",
    "qkv": "self_attention.query_key_value>", "pattern": "self_attention.attention_dropout>",
}  # fmt: skip
BERT_RAW = {
    "q": "attention.self.query>", "k": "attention.self.key>", "v": "attention.self.value>",
    "z": ">attention.output.dense", "attn_out": "attention.output.dense>", "resid_mid": ">intermediate",
    "mlp_in": ">intermediate.dense", "mlp_post": ">output.dense", "mlp_out": "output.dense>",
}  # fmt: skip
ALBERT_RAW = {
    "q": "attention.query>", "k": "attention.key>", "v": "attention.value>", "z": ">attention.dense",
    "attn_out": "attention.dense>", "resid_mid": "attention>", "mlp_in": ">ffn", "mlp_post": ">ffn_output",
    "mlp_out": "ffn_output>",
}  # fmt: skip
MODERNBERT_RAW = {
    "z": ">attn.Wo", "attn_out": "attn>", "resid_mid": ">mlp_norm", "mlp_in": ">mlp", "mlp_post": ">mlp.Wo",
    "mlp_out": "mlp>", "qkv": "attn.Wqkv>",
}  # fmt: skip
GPT_NEO_RAW = {
    "q": "attn.attention.q_proj>", "k": "attn.attention.k_proj>", "v": "attn.attention.v_proj>",
    "z": ">attn.attention.out_proj", "attn_out": "attn>", "resid_mid": ">ln_2", "mlp_in": ">mlp",
    "mlp_post": ">mlp.c_proj", "mlp_out": "mlp>", "pattern": "attn.attention.attn_dropout>",
}  # fmt: skip
GPTJ_RAW = {
    "q": "attn.q_proj>", "k": "attn.k_proj>", "v": "attn.v_proj>", "z": ">attn.out_proj", "attn_out": "attn>",
    "mlp_in": ">mlp", "mlp_post": ">mlp.fc_out", "mlp_out": "mlp>", "pattern": "attn.attn_dropout>",
}  # fmt: skip
GPT_OSS_RAW = {**MIXTURE_RAW, "router": "mlp.router>"}
DEEPSEEK_RAW = {**LLAMA_RAW, "q": "self_attn.q_b_proj>", "k": "", "v": "", "mlp_post": ""}


def interleaved(fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Head by head: query, key, value."""
    by_head = fused.view(*fused.shape[:2], 6, 3, 8)
    return by_head[:, :, :, 0], by_head[:, :, :, 1], by_head[:, :, :, 2]


def in_blocks(fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Six queries, then two keys, then two values."""
    rows = fused.view(*fused.shape[:2], 10, 8)
    return rows[:, :, :6], rows[:, :, 6:8], rows[:, :, 8:]


def in_thirds(fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All queries, all keys, all values."""
    rows = fused.view(*fused.shape[:2], 3, 6, 8)
    return rows[:, :, 0], rows[:, :, 1], rows[:, :, 2]


def llama_like(name: str, model: str, config: str, sizes: dict[str, Any], **more: Any) -> Family:
    return Family(name, model, config, sizes, "model.layers", **{"raw": LLAMA_RAW, **more})


SLIDING_FULL = ["sliding_attention", "full_attention"]
GEMMA = {**GROUPED, "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 3, "layer_types": SLIDING_FULL}
BLOOM_SIZES = {"vocab_size": V, "hidden_size": 48, "n_layer": 2, "n_head": 6, "initializer_range": 0.2}
ENCODER: dict[str, Any] = {"replayed": False, "causal": False, "direct": False}
MODERNBERT = {**COMMON, "pad_token_id": 0, "cls_token_id": 0, "sep_token_id": 1, "local_attention": 4,
              "layer_types": ["full_attention", "sliding_attention"], "attention_bias": True}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 8, "patch_size": 4}  # fmt: skip
# One layer without a mixture, one with.
LATENT = {**COMMON, "num_key_value_heads": 6, "moe_intermediate_size": 24, "n_routed_experts": 4,
          "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "kv_lora_rank": 12, "qk_rope_head_dim": 4,
          "qk_nope_head_dim": 6, "v_head_dim": 8, "first_k_dense_replace": 1, "n_shared_experts": 1}  # fmt: skip
FAMILIES = {
    family.name: family
    for family in [
        llama_like("llama", "LlamaForCausalLM", "LlamaConfig", GROUPED),
        llama_like("llama with biases", "LlamaForCausalLM", "LlamaConfig",
                   {**GROUPED, "attention_bias": True, "mlp_bias": True, "head_dim": 10}),
        llama_like("mistral", "MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 4}),
        llama_like("qwen2", "Qwen2ForCausalLM", "Qwen2Config", {**GROUPED, **WINDOW, "max_window_layers": 1}),
        llama_like("qwen3", "Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 10, "attention_bias": True}),
        llama_like("gemma2", "Gemma2ForCausalLM", "Gemma2Config",
                   {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "attention_bias": True},
                   raw=GEMMA_RAW),
        llama_like("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA, raw=GEMMA_RAW),
        llama_like("phi", "PhiForCausalLM", "PhiConfig",
                   {**GROUPED, "qk_layernorm": True, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                                                         "partial_rotary_factor": 0.5}}, raw=PHI_RAW),
        llama_like("phi3", "Phi3ForCausalLM", "Phi3Config", {**GROUPED, "sliding_window": 4}, qkv=in_blocks,
                   raw={**LLAMA_RAW, "qkv": "self_attn.qkv_proj>", "q": "", "k": "", "v": ""}),
        llama_like("olmo2", "Olmo2ForCausalLM", "Olmo2Config", {**GROUPED, "attention_bias": True},
                   raw={**LLAMA_RAW, **POST_NORM, "resid_mid": ">mlp"}),
        Family("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", {**COMMON, "rotary_pct": 0.5}, "gpt_neox.layers",
               NEOX_RAW, (6, 6), interleaved),
        Family("gpt_neox (serial)", "GPTNeoXForCausalLM", "GPTNeoXConfig", {**COMMON, "use_parallel_residual": False},
               "gpt_neox.layers", {**NEOX_RAW, "resid_mid": ">post_attention_layernorm"}, (6, 6), interleaved),
        Family("opt", "OPTForCausalLM", "OPTConfig", {**COMMON, "ffn_dim": 40, "init_std": 0.2},
               "model.decoder.layers", OPT_RAW, (6, 6)),
        Family("bloom", "BloomForCausalLM", "BloomConfig", BLOOM_SIZES, "transformer.h", BLOOM_RAW, (6, 6),
               interleaved, replayed=False),
        llama_like("mixtral", "MixtralForCausalLM", "MixtralConfig",
                   {**GROUPED, "num_local_experts": 5, "num_experts_per_tok": 2}, raw=MIXTURE_RAW),
        llama_like("olmoe", "OlmoeForCausalLM", "OlmoeConfig", EXPERTS, raw=MIXTURE_RAW),
        llama_like("qwen2_moe", "Qwen2MoeForCausalLM", "Qwen2MoeConfig",
                   {**EXPERTS, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20,
                    "norm_topk_prob": True}, raw=MIXTURE_RAW),
        llama_like("gemma", "GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 12}),
        Family("gemma3 (images)", "Gemma3ForConditionalGeneration", "Gemma3Config",
               {"text_config": GEMMA, "vision_config": VISION, "mm_tokens_per_image": 4},
               "model.language_model.layers", GEMMA_RAW),
        Family("gpt_neo", "GPTNeoForCausalLM", "GPTNeoConfig",
               {"vocab_size": V, "hidden_size": 48, "num_layers": 2, "num_heads": 6, "window_size": 3,
                "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
                "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1},
               "transformer.h", GPT_NEO_RAW, (6, 6), replayed=False),
        Family("gptj", "GPTJForCausalLM", "GPTJConfig",
               {"vocab_size": V, "n_embd": 48, "n_layer": 2, "n_head": 6, "rotary_dim": 4, "n_positions": 64,
                "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1},
               "transformer.h", GPTJ_RAW, (6, 6), replayed=False),
        llama_like("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
                   {**EXPERTS, "moe_intermediate_size": 24, "head_dim": 10, "norm_topk_prob": True}, raw=MIXTURE_RAW),
        llama_like("gpt_oss", "GptOssForCausalLM", "GptOssConfig",
                   {**GROUPED, "num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 3,
                    "layer_types": SLIDING_FULL}, raw=GPT_OSS_RAW, sinks=True),
        llama_like("olmo", "OlmoForCausalLM", "OlmoConfig", GROUPED),
        llama_like("olmo3", "Olmo3ForCausalLM", "Olmo3Config",
                   {**GROUPED, "layer_types": SLIDING_FULL, "sliding_window": 3},
                   raw={**LLAMA_RAW, **POST_NORM, "resid_mid": ">mlp"}),
        llama_like("smollm3", "SmolLM3ForCausalLM", "SmolLM3Config", {**GROUPED, "no_rope_layer_interval": 2}),
        llama_like("cohere", "CohereForCausalLM", "CohereConfig",
                   {**GROUPED, "use_qk_norm": True, "logit_scale": 0.5}, raw={**LLAMA_RAW, "resid_mid": ""}),
        llama_like("granite", "GraniteForCausalLM", "GraniteConfig",
                   {**GROUPED, "embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.5,
                    "attention_multiplier": 0.3}, scales={"attn_out": 0.5, "mlp_out": 0.5}),
        llama_like("stablelm", "StableLmForCausalLM", "StableLmConfig",
                   {**GROUPED, "use_qkv_bias": True, "qk_layernorm": True}),
        llama_like("stablelm (parallel)", "StableLmForCausalLM", "StableLmConfig",
                   {**GROUPED, "use_parallel_residual": True}, raw={**LLAMA_RAW, "resid_mid": ""}),
        llama_like("deepseek_v3", "DeepseekV3ForCausalLM", "DeepseekV3Config", {**LATENT, "q_lora_rank": 14},
                   heads=(6, 6), raw=DEEPSEEK_RAW),
        llama_like("deepseek_v3 (plain queries)", "DeepseekV3ForCausalLM", "DeepseekV3Config",
                   {**LATENT, "q_lora_rank": None}, heads=(6, 6), raw={**DEEPSEEK_RAW, "q": "self_attn.q_proj>"}),
        Family("roberta", "RobertaForMaskedLM", "RobertaConfig",
               {**COMMON, "pad_token_id": V - 1, "max_position_embeddings": 128},
               "roberta.encoder.layer", BERT_RAW, (6, 6), **ENCODER, additive=False),
        Family("bert", "BertForMaskedLM", "BertConfig", COMMON, "bert.encoder.layer", BERT_RAW, (6, 6), **ENCODER,
               additive=False),
        Family("albert", "AlbertForMaskedLM", "AlbertConfig", {**COMMON, "embedding_size": 20, "num_hidden_layers": 3},
               "albert.encoder.albert_layer_groups.0.albert_layers.0", ALBERT_RAW, (6, 6), **ENCODER, additive=False,
               shared=True),
        Family("modernbert", "ModernBertForMaskedLM", "ModernBertConfig", MODERNBERT, "model.layers", MODERNBERT_RAW,
               (6, 6), in_thirds, **ENCODER),
    ]
}  # fmt: skip


# Raw modules of the sites outside layers: `path>` an output, `>path` an input. Learned positions: what is added.
_DECODER = {"embed": "model.embed_tokens>", "final_norm": "model.norm>", "logits": "lm_head>"}
OUTSIDE: dict[str, dict[str, str]] = {
    **{name: _DECODER for name in FAMILIES if FAMILIES[name].layers == "model.layers"},
    "phi": {**_DECODER, "final_norm": "model.final_layernorm>"},
    "granite": {**_DECODER, "embed": ">model.layers.0"},
    **{name: {**_DECODER, "embed": ">model.layers.0"} for name in ("gemma", "gemma2", "gemma3")},
    "gemma3 (images)": {"embed": "model.language_model.embed_tokens>", "final_norm": "model.language_model.norm>",
                        "logits": "lm_head>"},
    "gpt_neo": {"embed": "transformer.wte>", "pos_embed": "transformer.wpe>", "final_norm": "transformer.ln_f>",
                "logits": "lm_head>"},
    "gptj": {"embed": "transformer.wte>", "final_norm": "transformer.ln_f>", "logits": "lm_head>"},
    "roberta": {"embed": "roberta.embeddings>", "logits": "lm_head>"},
    **{name: {"embed": "gpt_neox.embed_in>", "final_norm": "gpt_neox.final_layer_norm>", "logits": "lm_head>"}
       for name in ("gpt_neox", "gpt_neox (serial)")},
    "opt": {"embed": "model.decoder.embed_tokens>", "pos_embed": "model.decoder.embed_positions>",
            "final_norm": "model.decoder.final_layer_norm>", "logits": "lm_head>"},
    "bloom": {"embed": "transformer.word_embeddings_layernorm>", "final_norm": "transformer.ln_f>",
              "logits": "lm_head>"},
    "bert": {"embed": "bert.embeddings>", "logits": "cls.predictions>"},
    "albert": {"embed": "albert.encoder.embedding_hidden_mapping_in>", "logits": "predictions>"},
    "modernbert": {"embed": "model.embeddings>", "final_norm": "model.final_norm>", "logits": "decoder>"},
}  # fmt: skip


def _outside(family: Family, net: nn.Module) -> dict[str, str]:
    """Earlier releases of transformers 5 call the unembedding of GPT-NeoX embed_out."""
    found = OUTSIDE[family.name]
    return {**found, "logits": "embed_out>"} if hasattr(net, "embed_out") else found


def raw_outside(family: Family, net: nn.Module, tokens: vs.Tokens) -> dict[str, Tensor]:
    """Every site outside the layers, from hooks registered here."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, _args, out: seen.__setitem__(name, out.detach().clone())

    def keep_input(name: str) -> Any:
        return lambda _module, args: seen.__setitem__(name, args[0].detach().clone())

    handles = [
        net.get_submodule(where.strip(">")).register_forward_pre_hook(keep_input(name))
        if where.startswith(">")
        else net.get_submodule(where.removesuffix(">")).register_forward_hook(keep(name))
        for name, where in _outside(family, net).items()
    ]
    with torch.no_grad():
        net(tokens.ids, attention_mask=tokens.real.long())
    for handle in handles:
        handle.remove()
    return {name: value.expand(len(tokens), *value.shape[1:]) for name, value in seen.items()}


def model(name: str, **changes: Any) -> vs.Model:
    return vs.Model(FAMILIES[name].build(**changes))


def raw_layers(family: Family, net: nn.Module, tokens: vs.Tokens) -> dict[str, Tensor]:
    """Every layer site of `raw` by name, from hooks registered here; fused projections are taken apart."""
    seen: dict[str, Tensor] = {}
    found = net.get_submodule(family.layers)
    handles = []
    for number, layer in enumerate([found] if family.shared else found):
        for kind, where in {**family.raw, "resid_pre": ">", "resid_post": "layer>"}.items():
            if where:
                handles.append(_hook(layer, where.replace("layer>", ">>"), kind, number, seen))
    with torch.no_grad():
        net(tokens.ids, attention_mask=tokens.real.long())
    for handle in handles:
        handle.remove()
    shaped = {
        name: _by_example(value, tokens) * family.scales.get(name.split(".")[-1], 1.0) for name, value in seen.items()
    }
    for name in [name for name in shaped if name.endswith("qkv")]:
        assert family.qkv is not None
        for kind, value in zip("qkv", family.qkv(shaped.pop(name)), strict=True):
            shaped[name.removesuffix("qkv") + kind] = value
    return shaped


def _hook(layer: Any, where: str, kind: str, number: int, seen: dict[str, Tensor]) -> Any:
    path = where.strip(">")
    module = layer.get_submodule(path)

    def name() -> str:
        """A module that is called again is the next layer."""
        return next(n for n in (f"layers.{k}.{kind}" for k in range(number, 99)) if n not in seen)

    def on_output(_module: Any, _args: Any, out: Any) -> None:
        seen[name()] = (out if isinstance(out, Tensor) else out[0]).detach().clone()

    def on_input(_module: Any, args: Any, kwargs: Any) -> None:
        seen[name()] = (args[0] if args else kwargs["hidden_states"]).detach().clone()

    if where.endswith(">") and where != ">":
        return module.register_forward_hook(on_output)
    return module.register_forward_pre_hook(on_input, with_kwargs=True)


def _by_example(value: Tensor, tokens: vs.Tokens) -> Tensor:
    """OPT's MLP and routers see [batch * pos, ...]."""
    if value.ndim == 2:
        return value.view(*tokens.ids.shape, -1)
    return value
