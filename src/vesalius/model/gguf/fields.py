"""Metadata that all architectures share: refusing the unknown, sizes, special tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from vesalius.errors import FileFormatError
from vesalius.model.gguf.file import GgufFile

# Fields that change no computation, or whose meaning is the same everywhere.
SHARED = frozenset(
    ["block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
     "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
     "rope.freq_base", "rope.dimension_count", "vocab_size", "rope.scaling.finetuned",
     "rope.scaling.original_context_length"]
)  # fmt: skip
# Fields that change the computation, with the value at which they do not.
_NEUTRAL: Mapping[str, object] = {
    "rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.scaling.attn_factor": 1.0, "expert_count": 0,
    "expert_used_count": 0, "attention.causal": True, "attention.clamp_kqv": 0.0, "attention.max_alibi_bias": 0.0,
}  # fmt: skip
# Roles of special tokens in transformers, and GGUF's words for them.
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def refuse_unknown(file: GgufFile, architecture: str, understood: Collection[str]) -> None:
    """Every field of the architecture is either understood or at the value where it changes nothing."""
    for key, value in file.fields.items():
        name = key.removeprefix(f"{architecture}.")
        if name != key and name not in understood and not (name in _NEUTRAL and value == _NEUTRAL[name]):
            raise FileFormatError(
                f"{file.path}: metadata field {key} = {value!r} changes the computation in a way the conversion does "
                "not know. Load the safetensors version of the model instead."
            )


def special_ids(file: GgufFile, size: int) -> dict[str, int]:
    """Token id of each special role (bos, eos, unk, pad) that the file fills, in a vocabulary of this size."""
    found = {}
    for role, word in _ROLES.items():
        key = f"tokenizer.ggml.{word}_token_id"
        index = file.fields.get(key)
        if index is None:
            continue
        if not isinstance(index, int) or not 0 <= index < size:
            raise FileFormatError(f"{file.path}: {key} = {index!r} is outside the vocabulary of {size}.")
        found[role] = index
    return found


def sizes(file: GgufFile, architecture: str) -> dict[str, object]:
    """The fields of a transformers config that all architectures have."""
    at = f"{architecture}."
    heads, width = file.whole(at + "attention.head_count"), file.whole(at + "embedding_length")
    kv_heads = file.whole(at + "attention.head_count_kv", heads)
    d_head = file.whole(at + "attention.key_length", width // heads)
    _check_heads(file, at, heads, kv_heads, d_head)
    size = vocabulary(file)
    roles = {f"{role}_token_id": None for role in ("bos", "eos", "pad")}
    ids = {f"{role}_token_id": index for role, index in special_ids(file, size).items() if role != "unk"}
    return {
        "vocab_size": size,
        "hidden_size": width,
        "intermediate_size": file.whole(at + "feed_forward_length"),
        "num_hidden_layers": file.whole(at + "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": d_head,
        "max_position_embeddings": file.whole(at + "context_length"),
        # The field is a float32; its shortest decimal form (1e-05) is the number that was meant.
        "rms_norm_eps": float(str(np.float32(file.number(at + "attention.layer_norm_rms_epsilon")))),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": "float32",
        **roles,
        **ids,
    }


def _check_heads(file: GgufFile, at: str, heads: int, kv_heads: int, d_head: int) -> None:
    if heads % kv_heads or d_head % 2:
        raise FileFormatError(
            f"{file.path}: {heads} query heads, {kv_heads} key-value heads and head size {d_head} do not fit together."
        )
    for key in (at + "rope.dimension_count", at + "attention.value_length"):
        if file.whole(key, d_head) != d_head:
            raise FileFormatError(
                f"{file.path}: {key} = {file.fields[key]} differs from the head size {d_head}; the conversion does not "
                "know such a model. Load its safetensors version instead."
            )


def vocabulary(file: GgufFile) -> int:
    """Rows of the embedding. Raises FileFormatError when there is none."""
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise FileFormatError(f"{file.path} lacks a matrix token_embd.weight; it is not a whole model.")
    return int(table.shape[-1])
