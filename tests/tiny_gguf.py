"""Tiny GGUF files written from random Llama models, with llama.cpp's conventions written out the slow way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

SPECIAL = ["<|end|>", "<|start|>", "<own>"]  # ids 0 and 1 are control tokens, id 2 is user-defined
BYTES = sorted(ByteLevel.alphabet())
MERGED = [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("1", "2"), ("Ċ", "Ċ"), ("Ġ", "Ġ")]
TOKENS = SPECIAL + BYTES + [a + b for a, b in MERGED]
TYPES = [3, 3, 4] + [1] * (len(TOKENS) - 3)


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 2, "vocab_size": len(TOKENS) + 3, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)  # norms of one would hide a swap of two of them
    return model


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's rotary order, row by row: rows i and i + d/2 of a head come to stand side by side."""
    half = len(weight) // heads // 2
    order = [head * 2 * half + i + part * half for head in range(heads) for i in range(half) for part in range(2)]
    return weight[order]


def tensors_of(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """The model's weights under their GGUF names."""
    state = {name: weight.detach().numpy().copy() for name, weight in model.state_dict().items()}
    names = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
             "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip
    found = {"token_embd.weight": state["model.embed_tokens.weight"], "output_norm.weight": state["model.norm.weight"]}
    if not model.config.tie_word_embeddings:
        found["output.weight"] = state["lm_head.weight"]
    for layer in range(model.config.num_hidden_layers):
        for theirs, ours in names.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}.get(ours)
            found[f"blk.{layer}.{ours}.weight"] = interleaved(weight, heads) if heads else weight
    return found


def add_model_fields(writer: gguf.GGUFWriter, model: LlamaForCausalLM) -> None:
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    if config.head_dim != config.hidden_size // config.num_attention_heads:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)


def add_tokenizer(
    writer: gguf.GGUFWriter, *, pre: str = "smollm", tokens: list[str] = TOKENS, bos: bool = False
) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(TYPES[: len(tokens)])
    writer.add_token_merges([f"{a} {b}" for a, b in MERGED])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(bos)
    writer.add_chat_template("{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}")


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    *,
    architecture: str = "llama",
    fields: Callable[[gguf.GGUFWriter], None] = add_tokenizer,
    tensors: Mapping[str, np.ndarray] | None = None,
    quantised: Mapping[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """Write `model` as GGUF. fields: adds metadata; tensors: instead of the model's own; quantised: types by name."""
    writer = gguf.GGUFWriter(path, architecture)
    add_model_fields(writer, model)
    fields(writer)
    for name, weight in (tensors_of(model) if tensors is None else tensors).items():
        kind = (quantised or {}).get(name)
        if kind is None:
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits_of(model: LlamaForCausalLM) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12) * 7 % model.config.vocab_size
    with torch.no_grad():
        return model(ids).logits
