"""From a GGUF file to a folder in transformers layout: config.json, model.safetensors and the tokenizer's files.

Only what is understood is converted: a metadata field or a tensor that would change the computation and is not known
here is refused, because a model that is nearly right is worse than none. Weights are stored as float32, in which every
dequantised value is exact.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

from vesalius.errors import FileFormatError, UnknownArchitectureError, UnknownNameError
from vesalius.gguf_file import GgufFile, read_gguf
from vesalius.jobs import Sink, silent, track

ARCHITECTURES = ("llama",)
"""GGUF architectures that can be converted."""

PRE_TOKENIZERS: Mapping[str, Callable[[], Any]] = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
}
"""How text is cut before byte-pair merging, by the name the file gives it."""

_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types
# Roles of special tokens in transformers, and GGUF's words for them.
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

_UNDERSTOOD = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.freq_base", "rope.dimension_count", "vocab_size", "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
}  # fmt: skip
# Fields that change the computation, with the value at which they do not.
_NEUTRAL: Mapping[str, object] = {
    "rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.scaling.attn_factor": 1.0, "expert_count": 0,
    "expert_used_count": 0, "attention.causal": True, "attention.clamp_kqv": 0.0, "attention.max_alibi_bias": 0.0,
}  # fmt: skip


def _refuse_unknown(file: GgufFile) -> None:
    """Every field of the architecture is either understood or at the value where it changes nothing."""
    architecture = file.fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnknownArchitectureError(
            f"{file.path} holds architecture {architecture!r}; known for GGUF: {', '.join(ARCHITECTURES)}. "
            "Load the safetensors version of the model from a folder or by its hub id instead."
        )
    if file.fields.get("general.type", "model") != "model":
        raise FileFormatError(f"{file.path} holds a {file.fields['general.type']!r}, not a whole model.")
    for key, value in file.fields.items():
        name = key.removeprefix("llama.")
        if name != key and name not in _UNDERSTOOD and not (name in _NEUTRAL and value == _NEUTRAL[name]):
            raise FileFormatError(
                f"{file.path}: metadata field {key} = {value!r} changes the computation in a way the conversion does "
                "not know. Load the safetensors version of the model instead."
            )


def _special_ids(file: GgufFile, size: int) -> dict[str, int]:
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


def _check_heads(file: GgufFile, heads: int, kv_heads: int, d_head: int) -> None:
    if heads % kv_heads or d_head % 2:
        raise FileFormatError(
            f"{file.path}: {heads} query heads, {kv_heads} key-value heads and head size {d_head} do not fit together."
        )
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if file.whole(key, d_head) != d_head:
            raise FileFormatError(
                f"{file.path}: {key} = {file.fields[key]} differs from the head size {d_head}; the conversion does not "
                "know such a model. Load its safetensors version instead."
            )


def read_config(file: GgufFile) -> transformers.LlamaConfig:
    """The transformers configuration that the metadata describes. Raises on any field that is not understood."""
    _refuse_unknown(file)
    heads, width = file.whole("llama.attention.head_count"), file.whole("llama.embedding_length")
    kv_heads = file.whole("llama.attention.head_count_kv", heads)
    d_head = file.whole("llama.attention.key_length", width // heads)
    _check_heads(file, heads, kv_heads, d_head)
    vocabulary = _vocabulary(file)
    special: dict[str, int | None] = {f"{role}_token_id": None for role in ("bos", "eos", "pad")}
    special |= {f"{role}_token_id": index for role, index in _special_ids(file, vocabulary).items() if role != "unk"}
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": file.whole("llama.feed_forward_length"),
        "num_hidden_layers": file.whole("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": d_head,
        "max_position_embeddings": file.whole("llama.context_length"),
        # The field is a float32; its shortest decimal form (1e-05) is the number that was meant.
        "rms_norm_eps": float(str(np.float32(file.number("llama.attention.layer_norm_rms_epsilon")))),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(file.number("llama.rope.freq_base", 10000.0))},
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float32",
    }
    try:
        return transformers.LlamaConfig(**settings, **special)
    except (ValueError, TypeError) as error:
        raise FileFormatError(f"{file.path}: its metadata do not describe a Llama model: {error}") from error


def _vocabulary(file: GgufFile) -> int:
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise FileFormatError(f"{file.path} lacks a matrix token_embd.weight; it is not a whole model.")
    return int(table.shape[-1])


@dataclass(frozen=True)
class _Entry:
    source: str
    target: str
    shape: tuple[int, ...]
    heads: int = 0  # rows are stored in llama.cpp's rotary order for this many heads


def _layer_entries(config: Any, layer: int) -> Iterator[_Entry]:
    width, hidden, d_head = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    q, kv = heads * d_head, kv_heads * d_head
    old, new = f"blk.{layer}", f"model.layers.{layer}"
    yield _Entry(f"{old}.attn_norm.weight", f"{new}.input_layernorm.weight", (width,))
    yield _Entry(f"{old}.attn_q.weight", f"{new}.self_attn.q_proj.weight", (q, width), heads)
    yield _Entry(f"{old}.attn_k.weight", f"{new}.self_attn.k_proj.weight", (kv, width), kv_heads)
    yield _Entry(f"{old}.attn_v.weight", f"{new}.self_attn.v_proj.weight", (kv, width))
    yield _Entry(f"{old}.attn_output.weight", f"{new}.self_attn.o_proj.weight", (width, q))
    yield _Entry(f"{old}.ffn_norm.weight", f"{new}.post_attention_layernorm.weight", (width,))
    yield _Entry(f"{old}.ffn_gate.weight", f"{new}.mlp.gate_proj.weight", (hidden, width))
    yield _Entry(f"{old}.ffn_up.weight", f"{new}.mlp.up_proj.weight", (hidden, width))
    yield _Entry(f"{old}.ffn_down.weight", f"{new}.mlp.down_proj.weight", (width, hidden))


def _entries(config: Any) -> Iterator[_Entry]:
    yield _Entry("token_embd.weight", "model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    for layer in range(config.num_hidden_layers):
        yield from _layer_entries(config, layer)
    yield _Entry("output_norm.weight", "model.norm.weight", (config.hidden_size,))
    if not config.tie_word_embeddings:
        yield _Entry("output.weight", "lm_head.weight", (config.vocab_size, config.hidden_size))


def _plan(file: GgufFile, config: Any) -> list[_Entry]:
    """What to write, after checking that the file holds exactly these tensors in these shapes."""
    plan = []
    for entry in _entries(config):  # stops at the first missing one, however many layers corrupt metadata promise
        tensor = file.tensors.get(entry.source)
        if tensor is None:
            raise FileFormatError(f"{file.path} lacks tensor {entry.source}; it is not a whole model.")
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if shape != entry.shape:
            raise FileFormatError(
                f"{file.path}: tensor {entry.source} has shape {shape}, its metadata say {entry.shape}."
            )
        plan.append(entry)
    extra = sorted(set(file.tensors) - {entry.source for entry in plan})
    if extra:
        raise FileFormatError(
            f"{file.path}: the conversion does not know {len(extra)} of its tensors ({', '.join(extra[:4])}), such as "
            "biases, experts or scaled rotary frequencies. Load the safetensors version of the model instead."
        )
    return plan


def _rotary_rows(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows from llama.cpp's order (a rotated pair side by side) to that of transformers (in two halves)."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def _write_weights(file: GgufFile, plan: list[_Entry], out: Path, sink: Sink) -> None:
    """A safetensors file, written tensor by tensor so that memory never holds the whole model."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in plan:
        start, end = end, end + 4 * math.prod(entry.shape)
        header[entry.target] = {"dtype": "F32", "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    with out.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for entry in track(plan, f"convert {file.path.name}", sink=sink):
            values = file.values(entry.source)
            stream.write((_rotary_rows(values, entry.heads) if entry.heads else values).astype("<f4").data)


def _byte_pairs(file: GgufFile, tokens: list[str]) -> models.BPE:
    if len(set(tokens)) != len(tokens):
        raise FileFormatError(f"{file.path}: its tokenizer lists a token twice.")
    try:
        merges = [tuple(merge.split(" ")) for merge in file.fields.get("tokenizer.ggml.merges", [])]
        return models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges, fuse_unk=False)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise FileFormatError(f"{file.path}: its tokenizer's merges do not fit its tokens: {error}") from error


def _added(token: str, *, special: bool) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token, special=special, normalized=False)


def _frame(special: Mapping[str, int], tokens: list[str], fields: Mapping[str, Any]) -> Any:
    """The template that puts the beginning and end token around a text, as far as the file asks for it."""
    asked = [role for role in ("bos", "eos") if fields.get(f"tokenizer.ggml.add_{role}_token", False)]
    around = {role: (tokens[special[role]], special[role]) for role in asked if role in special}
    first, last = ([around[role][0]] if role in around else [] for role in ("bos", "eos"))
    one, two = ([*first, text, *last] for text in ("$A", "$B"))
    return processors.TemplateProcessing(single=one, pair=one + two, special_tokens=list(around.values()))


def _check_tokenizer_kind(file: GgufFile) -> None:
    hint = "Load the safetensors version of the model instead."
    kind, cut = file.fields["tokenizer.ggml.model"], file.fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise UnknownNameError(f"tokenizer model in {file.path}:", kind, ["gpt2"], hint)
    if cut not in PRE_TOKENIZERS:
        raise UnknownNameError(f"pre-tokenizer in {file.path}:", cut, PRE_TOKENIZERS, hint)
    if file.fields.get("tokenizer.ggml.add_space_prefix", False):
        raise FileFormatError(f"{file.path}: add_space_prefix is not known for a byte-pair tokenizer. {hint}")


def read_tokenizer(file: GgufFile) -> transformers.PreTrainedTokenizerFast | None:
    """The byte-level BPE tokenizer in the metadata, or None when the file holds none.

    Control tokens become special tokens; a beginning or end token is added to a text only if the file asks for it.
    Raises UnknownNameError for a kind of tokenizer or a pre-tokenizer that is not known, FileFormatError when corrupt.
    """
    fields = file.fields
    if fields.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        return None
    _check_tokenizer_kind(file)
    tokens = fields.get("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list) or not isinstance(fields.get("tokenizer.ggml.token_type", []), list):
        raise FileFormatError(f"{file.path}: its tokenizer's tokens or token types are not lists.")
    kinds = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if not 0 < len(tokens) <= _vocabulary(file) or len(kinds) != len(tokens):
        raise FileFormatError(
            f"{file.path}: {len(tokens)} tokens with {len(kinds)} token types do not fit an embedding of "
            f"{_vocabulary(file)} rows."
        )
    special = _special_ids(file, len(tokens))
    core = tokenizers.Tokenizer(_byte_pairs(file, tokens))
    core.pre_tokenizer = PRE_TOKENIZERS[fields.get("tokenizer.ggml.pre", "default")]()
    core.decoder = decoders.ByteLevel()
    core.post_processor = _frame(special, tokens, fields)
    typed = list(zip(tokens, kinds, strict=True))
    core.add_special_tokens([_added(token, special=True) for token, kind in typed if kind == _CONTROL])
    core.add_tokens([_added(token, special=False) for token, kind in typed if kind == _USER_DEFINED])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        clean_up_tokenization_spaces=False,
        model_max_length=file.whole("llama.context_length"),
        chat_template=fields.get("tokenizer.chat_template"),
        **{f"{role}_token": tokens[index] for role, index in special.items()},
    )


def convert_gguf(path: Path, out: Path, *, sink: Sink = silent) -> None:
    """Write the model in the GGUF file `path` into the existing, empty folder `out`.

    Weights become float32 (4 bytes a parameter). `sink` gets one event a tensor. Raises InputError (file or gguf
    package missing), FileFormatError (corrupt, or holding what is not understood), NotFiniteError,
    UnknownArchitectureError, UnknownNameError (tokenizer).
    """
    file = read_gguf(path)
    config = read_config(file)
    plan, tokenizer = _plan(file, config), read_tokenizer(file)
    _write_weights(file, plan, out / "model.safetensors", sink)
    config.save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
