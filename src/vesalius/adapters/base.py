"""What an adapter is: data that says where a model family keeps its tensors. No forward pass is written here.

A new family is one file with one `Adapter` value and a parity test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from vesalius.adapters.understood import strange_field
from vesalius.errors import InputError, UnknownArchitectureError

Side = Literal["in", "out"]
Replay = Literal["drop", "false", "positions", "rotary"]
Norm = Literal["rms", "rms_plus_one", "layer"]


@dataclass(frozen=True)
class Access:
    """Where one tensor lives: a module's input or output, perhaps one part of it, perhaps split into heads."""

    path: str
    """Module path. Relative to the layer for layer sites."""
    side: Side = "out"
    heads: Literal["", "head", "kv_head"] = ""
    """Split the last axis into this many heads."""
    part: Literal["", "q", "k", "v"] = ""
    """This part of a fused query-key-value projection."""
    fused: Literal["blocks", "groups"] = "blocks"
    """blocks: all queries, all keys, all values. groups: per key-value head its queries, its key, its value."""
    delta: str = ""
    """The tensor is a sum no module returns: read here, written by adding the change at this path's output."""
    flat: bool = False
    """The module sees [batch * pos, ...]."""


@dataclass(frozen=True)
class Layout:
    """Sizes of one model."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    vocab: int
    n_experts: int = 0
    """Experts per layer; 0 where there are none."""
    n_decoder_layers: int = 0
    """Layers of an encoder-decoder's decoder; n_layers are its encoder's."""
    start: int | None = None
    """Token that an encoder-decoder's decoder begins with."""

    def layers_of(self, stack: str) -> int:
        return self.n_decoder_layers if stack == "decoder" else self.n_layers


@dataclass(frozen=True)
class Stack:
    """A stack of layers; an encoder-decoder model has two. Fields as in `Adapter`."""

    layers: str
    sites: Mapping[str, Access]
    outside: Mapping[str, Access]
    o_proj: str
    attention: str = ""
    cross_o_proj: str = ""
    """Output projection of the attention to the encoder, from the layer."""
    cross_attention: str = ""
    """Attention to the encoder, relative to the layer."""


@dataclass(frozen=True)
class Adapter:
    """One model family, as data. Paths are attribute paths from the wrapped module."""

    family: str
    classes: tuple[str, ...]
    """Names of the module classes it fits."""
    layers: str
    """Path of the list of layers; of the one layer when `shared`."""
    sites: Mapping[str, Access]
    """Layer sites, relative to the layer ("" is the layer itself). attn_out and mlp_out are what is ADDED to the
    residual stream: after a post norm where there is one."""
    outside: Mapping[str, Access]
    """Sites outside the layers: embed, pos_embed, final_norm, logits."""
    o_proj: str
    """Output projection of attention, from the layer; a Linear [d_model, head * d_head] or Conv1D (transposed)."""
    final_norm: str
    unembed: str
    norm: Norm
    """The norms' arithmetic. rms_plus_one multiplies by 1 + weight."""
    config: Mapping[str, str] = field(default_factory=dict)
    """Layout field -> attribute of `module.config`; a missing optional one (n_kv_heads, d_head) is derived."""
    attention: str = ""
    """Attention module, relative to the layer, when it goes through transformers' AttentionInterface; "" when not."""
    replay: Mapping[str, Replay] = field(default_factory=dict)
    """How a layer's keyword is rebuilt when it is called again on some positions; others must not be tensors. Empty:
    layers cannot be replayed and sweeps run the whole model."""
    accepts: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Config field -> values that this adapter understands; any other value is refused."""
    understood: frozenset[str] = frozenset()
    """Config fields whose every value is fine here: the sites and their sums mean the same."""
    same: Mapping[str, str] = field(default_factory=dict)
    """Config field -> the field it must equal."""
    attn_norm: str = ""
    """Norm between the output projection and the residual stream, relative to the layer."""
    cap: str = ""
    """Config field with the bound of the final logits (cap * tanh(logits / cap)); None there is no bound."""
    causal: bool = True
    """No position reads a later one."""
    direct: bool = True
    """Logits of prompts are the unembedding of the normed sum of all that was written: direct effects are exact."""
    positions: bool = True
    """The module takes position_ids."""
    call: Mapping[str, Any] = field(default_factory=lambda: {"use_cache": False})
    """Constant arguments of every call."""
    input: str = "input_ids"
    """Name of the module's input."""
    shared: bool = False
    """All layers are one module, called again and again."""
    gate: str = ""
    """Router of a mixture of experts, relative to the layer: returns (logits, weights, indices), all [token, ...]."""
    experts: str = ""
    """Experts, relative to the layer: called with (hidden states, indices, weights)."""
    stacks: Mapping[str, Stack] = field(default_factory=dict)
    """`encoder` and `decoder` of a model that has both; then layers, sites, o_proj and attention here are empty."""

    def stack(self, name: str = "") -> Stack:
        """The stack a site belongs to; the only one of a model that has one."""
        if name in self.stacks:
            return self.stacks[name]
        return Stack(self.layers, self.sites, self.outside, self.o_proj, self.attention)

    @property
    def stack_names(self) -> tuple[str, ...]:
        return tuple(self.stacks) or ("",)

    def layout(self, module: nn.Module) -> Layout:
        """Sizes read from `module.config`. Raises InputError when a field is missing."""
        config = module.config
        read = {name: getattr(config, attribute, None) for name, attribute in self.config.items()}
        start = read.pop("start", None)
        read["n_kv_heads"] = read.get("n_kv_heads") or read["n_heads"]
        read["d_head"] = read.get("d_head") or (read["d_model"] or 0) // (read["n_heads"] or 1)
        missing = [self.config[name] for name, value in read.items() if value is None and name in self.config]
        read["start"] = start  # a config may leave it out
        if missing:
            raise InputError(f"the config of {type(module).__name__} lacks {', '.join(missing)}")
        return Layout(**{name: int(value) for name, value in read.items() if value is not None})

    def check(self, module: nn.Module) -> None:
        """Refuse a config this adapter does not understand, naming the field and its value.

        Raises UnknownArchitectureError: for a value outside `accepts`, for a field that differs from the one it must
        equal, and for any other field that is not understood and not at its default.
        """
        config, name = module.config, type(module).__name__
        known_names = {*self.understood, *self.accepts, *self.same, *self.config.values(), self.cap}
        found = strange_field(config, known_names)
        if found is not None:
            raise UnknownArchitectureError(
                f"{name} has config.{found[0]}={found[1]!r}, a field that the {self.family} adapter does not "
                f"understand. If it changes nothing in the forward pass, say so: vs.Model(net, adapter=adapter) takes "
                f"an adapter without this check"
            )
        for one, other in self.same.items():
            if getattr(config, one, None) != getattr(config, other, None):
                raise UnknownArchitectureError(
                    f"{name} has config.{one}={getattr(config, one, None)!r}; the {self.family} adapter understands "
                    f"only the value of config.{other}, {getattr(config, other, None)!r}"
                )
        for field_name, known in self.accepts.items():
            value = getattr(config, field_name, known[0])
            if value not in known:
                raise UnknownArchitectureError(
                    f"{name} has config.{field_name}={value!r}; the {self.family} adapter understands {known}"
                )


def submodule(root: nn.Module, path: str) -> nn.Module:
    """Module at a dotted path; "" is the root. Raises InputError naming the first part that is missing."""
    here = root
    for number, part in enumerate(path.split(".") if path else []):
        child = getattr(here, part, None)
        if (
            child is None
            and part.isdigit()
            and isinstance(here, nn.ModuleList | nn.Sequential)
            and int(part) < len(here)
        ):
            child = here[int(part)]
        if not isinstance(child, nn.Module):
            done = ".".join(path.split(".")[:number]) or type(root).__name__
            known = ", ".join(name for name, _ in here.named_children()) or "none"
            raise InputError(f"no module {part!r} in {done} (asked for {path!r}); its children: {known}")
        here = child
    return here
