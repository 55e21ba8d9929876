"""What a GGUF architecture is in transformers: its config, and where each tensor goes. One value each, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import transformers

from vesalius.errors import FileFormatError, UnknownArchitectureError
from vesalius.model.gguf.fields import SHARED, refuse_unknown, sizes
from vesalius.model.gguf.file import GgufFile


@dataclass(frozen=True)
class Entry:
    """One tensor: its name in the file and in transformers, and how it is stored differently."""

    source: str
    target: str
    shape: tuple[int, ...]
    heads: int = 0
    """Rows are stored in llama.cpp's rotary order for this many heads."""
    minus: float = 0.0
    """What the file has added to every value: llama.cpp stores Gemma's norms as 1 + weight."""


@dataclass(frozen=True)
class Architecture:
    """How one GGUF architecture is converted."""

    name: str
    config: str
    """Class of the transformers config; by name, because transformers loads for seconds at the first class."""
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
    "llama", "LlamaConfig", "LlamaForCausalLM", SHARED, _llama_settings, _llama_layer
)  # fmt: skip

_GEMMA3_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
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
    "gemma3", "Gemma3TextConfig", "Gemma3ForCausalLM",
    SHARED | {"attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"},
    _gemma3_settings, _gemma3_layer, norm_offset=1.0,
)  # fmt: skip
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
    refuse_unknown(file, name, ARCHITECTURES[name].understood)
    return ARCHITECTURES[name]


def config_of(file: GgufFile, architecture: Architecture) -> Any:
    """The transformers configuration that the metadata describe."""
    found = sizes(file, architecture.name)
    more = architecture.settings(file, found)
    try:
        return getattr(transformers, architecture.config)(**found, **more, architectures=[architecture.model])
    except (ValueError, TypeError) as error:
        raise FileFormatError(
            f"{file.path}: its metadata do not describe a {architecture.name} model: {error}"
        ) from error


def plan(file: GgufFile, architecture: Architecture, config: Any) -> list[Entry]:
    """What to write, after checking that the file holds exactly these tensors in these shapes."""
    found = []
    for entry in _entries(architecture, config):  # stops at the first missing one, however many layers are promised
        tensor = file.tensors.get(entry.source)
        if tensor is None:
            raise FileFormatError(f"{file.path} lacks tensor {entry.source}; it is not a whole model.")
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if shape != entry.shape:
            raise FileFormatError(
                f"{file.path}: tensor {entry.source} has shape {shape}, its metadata say {entry.shape}."
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
