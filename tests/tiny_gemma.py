"""Tiny Gemma 3 models as GGUF, with llama.cpp's conventions written out: norms as 1 + weight, SentencePiece tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

CONTROL, USER, BYTE = 3, 4, 6
PIECES = ["▁", "t", "h", "e", "n", "1", "2", "▁t", "th", "he", "▁the", "▁th", "en", "▁then"]
TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", "\n\n", "   ", *(f"<0x{b:02X}>" for b in range(256)), *PIECES]
TYPES = [CONTROL] * 4 + [USER] * 3 + [BYTE] * 256 + [1] * len(PIECES)
# As SentencePiece gives them: what is merged first has the highest score. "th" comes before "▁t" and "he".
RANKS = ["th", "he", "▁th", "▁t", "▁the", "en", "▁then", "▁", "t", "h", "e", "n", "1", "2"]
SCORES = [-1000.0] * 263 + [-float(RANKS.index(piece)) for piece in PIECES]


def tiny_gemma(seed: int = 0, **changes: Any) -> Gemma3ForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "num_hidden_layers": 7, "vocab_size": len(TOKENS), "max_position_embeddings": 128, "sliding_window": 5,
        "initializer_range": 0.2, "query_pre_attn_scalar": 32, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 500.0},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    }  # fmt: skip
    model = Gemma3ForCausalLM(Gemma3TextConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(-0.5, 0.5)  # norms of zero would hide a swap of two of them
    return model


def tensors_of(model: Gemma3ForCausalLM) -> dict[str, np.ndarray]:
    """The model's weights under their GGUF names."""
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
             "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
             "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.q_proj": "attn_q",
             "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip
    state = {name: weight.detach().numpy().copy() for name, weight in model.state_dict().items()}
    found = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": 1 + state["model.norm.weight"],
    }
    for layer in range(model.config.num_hidden_layers):
        for theirs, ours in names.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            found[f"blk.{layer}.{ours}.weight"] = 1 + weight if "norm" in theirs else weight
    if not model.config.tie_word_embeddings:
        found["output.weight"] = state["lm_head.weight"]
    return found


def add_pieces(writer: gguf.GGUFWriter, *, prefix: bool = False, scores: list[float] = SCORES) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types(TYPES)
    writer.add_token_scores(scores)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(prefix)


def write_gemma(path: Path, model: Gemma3ForCausalLM, fields: Callable[[gguf.GGUFWriter], None] = add_pieces) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(config.sliding_window)
    fields(writer)
    for name, weight in tensors_of(model).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
