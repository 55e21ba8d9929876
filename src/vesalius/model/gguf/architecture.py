"""What a GGUF architecture is in transformers: its config, and where each tensor goes. One architecture, one value."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import transformers

from vesalius.errors import FileFormatError, UnknownArchitectureError
from vesalius.model.gguf.file import GgufFile, special_ids, vocabulary

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


@dataclass(frozen=True)
class Entry:
    """One tensor: its name in the file and in transformers, and how it is stored differently."""

    source: str
    target: str
    shape: tuple[int, ...]
    heads: int = 0
    """Rows are stored in llama.cpp's rotary order for this many heads."""
    minus: float = 0.0
    """Subtracted from every value: llama.cpp stores Gemma's norms as 1 + weight."""


@dataclass(frozen=True)
class Architecture:
    """How one GGUF architecture is converted."""

    name: str
    config: str
    """Class of the transformers config; by name, because the first class of transformers takes seconds to import."""
    model: str
    """Class of the transformers model."""
    understood: frozenset[str]
    """Metadata fields, without the architecture's prefix."""
    settings: Callable[[GgufFile, Mapping[str, Any]], dict[str, Any]]
    """Config fields beside the sizes that all architectures have."""
    layer: Callable[[Any, int], Iterator[Entry]]
    norm_offset: float = 0.0


def _projections(config: Any, layer: int, rotary: bool) -> Iterator[Entry]:
    width, hidden, d_head = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    q, kv = heads * d_head, kv_heads * d_head
    old, new = f"blk.{layer}", f"model.layers.{layer}"
    yield Entry(f"{old}.attn_q.weight", f"{new}.self_attn.q_proj.weight", (q, width), heads if rotary else 0)
    yield Entry(f"{old}.attn_k.weight", f"{new}.self_attn.k_proj.weight", (kv, width), kv_heads if rotary else 0)
    yield Entry(f"{old}.attn_v.weight", f"{new}.self_attn.v_proj.weight", (kv, width))
    yield Entry(f"{old}.attn_output.weight", f"{new}.self_attn.o_proj.weight", (width, q))
    yield Entry(f"{old}.ffn_gate.weight", f"{new}.mlp.gate_proj.weight", (hidden, width))
    yield Entry(f"{old}.ffn_up.weight", f"{new}.mlp.up_proj.weight", (hidden, width))
    yield Entry(f"{old}.ffn_down.weight", f"{new}.mlp.down_proj.weight", (width, hidden))


def _norms(config: Any, layer: int, names: Mapping[str, str], minus: float) -> Iterator[Entry]:
    for old, new in names.items():
        size = config.head_dim if old in ("attn_q_norm", "attn_k_norm") else config.hidden_size
        yield Entry(f"blk.{layer}.{old}.weight", f"model.layers.{layer}.{new}.weight", (size,), minus=minus)


def _llama_layer(config: Any, layer: int) -> Iterator[Entry]:
    yield from _norms(config, layer, {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}, 0.0)
    yield from _projections(config, layer, rotary=True)


def _llama_settings(file: GgufFile, _sizes: Mapping[str, Any]) -> dict[str, Any]:
    theta = float(file.number("llama.rope.freq_base", 10000.0))
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


LLAMA = Architecture(
    name="llama",
    config="LlamaConfig",
    model="LlamaForCausalLM",
    understood=SHARED,
    settings=_llama_settings,
    layer=_llama_layer,
)

_GEMMA3_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Of all sizes only the 27B scales its queries by d_model / n_heads instead of d_head; the file does not say so.
_LAYERS_OF_27B = 62


def _gemma3_layer(config: Any, layer: int) -> Iterator[Entry]:
    yield from _norms(config, layer, _GEMMA3_NORMS, 1.0)
    yield from _projections(config, layer, rotary=False)


def _gemma3_settings(file: GgufFile, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp keeps some of Gemma 3 in its code and not in the file: local rope base, window pattern, scale."""
    layers = int(sizes["num_hidden_layers"])
    every = file.whole("gemma3.attention.sliding_window_pattern", 6)
    local = float(file.number("gemma3.rope.freq_base_swa", 10000.0))
    full = float(file.number("gemma3.rope.freq_base", 1000000.0))
    d_head = int(sizes["head_dim"])
    scaled = int(sizes["hidden_size"]) // int(sizes["num_attention_heads"]) if layers == _LAYERS_OF_27B else d_head
    return {
        "sliding_window": file.whole("gemma3.attention.sliding_window"),
        "layer_types": ["sliding_attention" if (n + 1) % every else "full_attention" for n in range(layers)],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
            "full_attention": {"rope_type": "default", "rope_theta": full},
        },
        "query_pre_attn_scalar": scaled,
        "hidden_activation": "gelu_pytorch_tanh",
    }


GEMMA3 = Architecture(
    name="gemma3",
    config="Gemma3TextConfig",
    model="Gemma3ForCausalLM",
    understood=SHARED | {"attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"},
    settings=_gemma3_settings,
    layer=_gemma3_layer,
    norm_offset=1.0,
)
ARCHITECTURES: Mapping[str, Architecture] = {known.name: known for known in (GEMMA3, LLAMA)}
"""GGUF architectures that can be converted."""


def architecture_of(file: GgufFile) -> Architecture:
    """The file's architecture. Raises UnknownArchitectureError for another, FileFormatError for no whole model."""
    name = str(file.fields.get("general.architecture"))
    if name not in ARCHITECTURES:
        raise UnknownArchitectureError(
            f"{file.path} holds architecture {name!r}; known for GGUF: {', '.join(ARCHITECTURES)}. "
            "Load the safetensors version of the model from a folder or by its hub id instead."
        )
    if file.fields.get("general.type", "model") != "model":
        raise FileFormatError(f"{file.path} holds a {file.fields['general.type']!r}, not a whole model.")
    _refuse_unknown(file, name, ARCHITECTURES[name].understood)
    return ARCHITECTURES[name]


def _refuse_unknown(file: GgufFile, architecture: str, understood: Collection[str]) -> None:
    """Raises FileFormatError for a field that is neither understood nor at the value where it changes nothing."""
    for key, value in file.fields.items():
        name = key.removeprefix(f"{architecture}.")
        if name != key and name not in understood and not (name in _NEUTRAL and value == _NEUTRAL[name]):
            raise FileFormatError(
                f"{file.path}: metadata field {key} = {value!r} changes the computation in a way the conversion does "
                "not know. Load the safetensors version of the model instead."
            )


def config_of(file: GgufFile, architecture: Architecture) -> Any:
    """The transformers configuration that the metadata describes."""
    found = _sizes(file, architecture.name)
    more = architecture.settings(file, found)
    try:
        return getattr(transformers, architecture.config)(**found, **more, architectures=[architecture.model])
    except Exception as error:
        raise FileFormatError(
            f"{file.path}: its metadata does not describe a {architecture.name} model: {error}"
        ) from error


def _sizes(file: GgufFile, architecture: str) -> dict[str, object]:
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


def plan(file: GgufFile, architecture: Architecture, config: Any) -> list[Entry]:
    """What to write, after checking that the file holds exactly these tensors in these shapes."""
    found = []
    # A damaged file may promise billions of layers: the loop stops at the first tensor that is missing.
    for entry in _entries(architecture, config):
        tensor = file.tensors.get(entry.source)
        if tensor is None:
            raise FileFormatError(f"{file.path} lacks tensor {entry.source}; it is not a whole model.")
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if shape != entry.shape:
            raise FileFormatError(
                f"{file.path}: tensor {entry.source} has shape {shape}, its metadata says {entry.shape}."
            )
        found.append(entry)
    extra = sorted(set(file.tensors) - {entry.source for entry in found})
    if extra:
        raise FileFormatError(
            f"{file.path}: the conversion does not know {len(extra)} of its tensors ({', '.join(extra[:4])}), such as "
            "biases, experts or scaled rotary frequencies. Load the safetensors version of the model instead."
        )
    return found


def _entries(architecture: Architecture, config: Any) -> Iterator[Entry]:
    table = (config.vocab_size, config.hidden_size)
    yield Entry("token_embd.weight", "model.embed_tokens.weight", table)
    for layer in range(config.num_hidden_layers):
        yield from architecture.layer(config, layer)
    yield Entry("output_norm.weight", "model.norm.weight", (config.hidden_size,), minus=architecture.norm_offset)
    if not config.tie_word_embeddings:
        yield Entry("output.weight", "lm_head.weight", table)
