"""What an adapter is, and how a module's tensors are read by it.

An adapter is data that says where a model family keeps its tensors; no forward pass is written in it. A new family is
one file with one `Adapter` value and a parity test. The functions below the data are all that the rest of the package
needs to know about a `transformers` module: its submodules, heads, weights, norms and experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vesalius.errors import InputError

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
    """For a sum that no module returns (resid_mid): it is read here, and written by adding the change to the output of
    the module at this path."""
    flat: bool = False
    """The module sees [batch * pos, ...]."""
    scaled: bool = False
    """The stream gets the module's output times the layout's `residual_scale`; the site is what the stream gets."""


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
    """First token of an encoder-decoder's decoder."""
    padding: int | None = None
    """Token by which the module itself tells what is padding; None where the mask alone says so."""
    residual_scale: float = 1.0
    """What blocks' outputs are multiplied by before they are added to the residual stream (Granite)."""
    logit_scale: float = 1.0
    """What the unembedding's output is multiplied by (Cohere, Granite)."""

    def layers_of(self, stack: str) -> int:
        return self.n_decoder_layers if stack == "decoder" else self.n_layers

    def limit(self, kind: str) -> tuple[int | None, str]:
        """How far an index in brackets may go at a kind of site, and what it counts; neurons by the tensor itself."""
        kind = kind.removeprefix("cross_")
        if kind in ("k", "v"):
            return self.n_kv_heads, "key-value heads per layer"
        if kind in ("q", "z", "result", "pattern", "scores"):
            return self.n_heads, "heads per layer"
        if kind in ("router", "expert_out"):
            return self.n_experts, "experts per layer"
        return (None, "neurons") if kind == "mlp_post" else (self.d_model, "dimensions")


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
    text: str = ""
    """Attribute of `module.config` that holds the language model's own config, where there are others beside it."""
    cap: str = ""
    """Config field with the bound of the final logits (cap * tanh(logits / cap)); None there is no bound."""
    attention_cap: str = ""
    """Config field with the bound of the attention scores; None there is no bound."""
    logits_over: str = ""
    """Config field that the unembedding's output is divided by."""
    causal: bool = True
    """No position reads a later one."""
    direct: bool = True
    """A prompt's logits are the unembedding of the normed residual stream, and that is the sum of what its components
    wrote: direct effects are exact."""
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
        config = self.config_of(module)
        read = {name: getattr(config, attribute, None) for name, attribute in self.config.items()}
        optional = {name: read.pop(name, None) for name in ("start", "padding")}
        residual, logits = read.pop("residual_scale", None), read.pop("logit_scale", None)
        if self.logits_over:
            logits = 1.0 / float(getattr(config, self.logits_over))
        read["n_kv_heads"] = read.get("n_kv_heads") or read["n_heads"]
        read["d_head"] = read.get("d_head") or (read["d_model"] or 0) // (read["n_heads"] or 1)
        missing = [self.config[name] for name, value in read.items() if value is None and name in self.config]
        read |= optional  # a config may leave them out
        if missing:
            raise InputError(f"the config of {type(module).__name__} lacks {', '.join(missing)}")
        sizes = {name: int(value) for name, value in read.items() if value is not None}
        one = 1.0  # a scale that a config leaves out
        return replace(Layout(**sizes), residual_scale=float(residual or one), logit_scale=float(logits or one))

    def config_of(self, module: nn.Module) -> Any:
        """The config that the sizes of the layers stand in."""
        return getattr(module.config, self.text) if self.text else module.config


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


# --- heads: from a module's tensor to a site's and back


def split_heads(tensor: Tensor, access: Access, layout: Layout, batch: int = 1) -> Tensor:
    """A module's tensor as the site names it: its part of the last axis, with a head axis when there is one.

    batch: examples in the run; for modules that see [batch * pos, ...].
    """
    if access.flat:
        tensor = tensor.unflatten(0, (batch, -1))
    if access.part:
        tensor = _pieces(tensor, access, layout)["qkv".index(access.part)]
    if access.scaled and layout.residual_scale != 1.0:
        tensor = tensor * layout.residual_scale
    if not access.heads:
        return tensor
    heads = layout.n_heads if access.heads == "head" else layout.n_kv_heads
    return tensor.unflatten(-1, (heads, -1))


def join_heads(whole: Tensor, site_tensor: Tensor, access: Access, layout: Layout) -> Tensor:
    """Inverse of `split_heads`: the module's tensor with the site's new value in its place."""
    value = site_tensor.flatten(-2) if access.heads else site_tensor
    if access.part:
        pieces = _pieces(whole.unflatten(0, (len(value), -1)) if access.flat else whole, access, layout)
        pieces["qkv".index(access.part)] = value
        value = _fused(pieces, access, layout)
    if access.scaled and layout.residual_scale != 1.0:
        value = value / layout.residual_scale
    return value.flatten(0, 1) if access.flat else value


def _pieces(tensor: Tensor, access: Access, layout: Layout) -> list[Tensor]:
    """Queries, keys and values of a fused projection, heads joined."""
    depth, keys = layout.d_head, layout.n_kv_heads
    if access.fused == "blocks":
        return list(tensor.split([layout.n_heads * depth, keys * depth, keys * depth], -1))
    # GPT-NeoX and Bloom interleave: for each key-value head its queries, its key, its value.
    groups = tensor.unflatten(-1, (keys, -1, depth))
    return [groups[..., :-2, :].flatten(-3), groups[..., -2, :].flatten(-2), groups[..., -1, :].flatten(-2)]


def _fused(pieces: list[Tensor], access: Access, layout: Layout) -> Tensor:
    """Inverse of `_pieces`."""
    if access.fused == "blocks":
        return torch.cat(pieces, -1)
    groups = [piece.unflatten(-1, (layout.n_kv_heads, -1, layout.d_head)) for piece in pieces]
    return torch.cat(groups, -2).flatten(-3)


# --- weights
#
# A model spread with device_map (accelerate) may keep weights on disk or in another memory and put them in place only
# for the length of a call. Between calls such a parameter is on the meta device: it has a shape and no values.


def weight_of(module: nn.Module, name: str = "weight") -> Tensor:
    """A parameter's values, without graph. Raises InputError when the module has none of this name, or no values."""
    found = parameter(module, name)
    if found is None:
        raise InputError(f"a {type(module).__name__} has no {name}")
    return found


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """A parameter's or buffer's values, without graph; None when there is none of this name."""
    value = getattr(module, name, None)
    if not isinstance(value, Tensor):
        return None
    if not value.is_meta:
        return value.detach()
    for hook in _accelerate_hooks(module):
        offloaded = getattr(hook, "weights_map", None)
        if offloaded is not None:
            return torch.as_tensor(offloaded[name]).detach()
    raise InputError(f"{name} of a {type(module).__name__} is on the meta device and has no values; load the weights")


def device_of(root: nn.Module) -> torch.device:
    """Where a model's inputs go: where its first weights are, or are put for a call."""
    for weight in root.parameters():
        if not weight.is_meta:
            return weight.device
    for module in root.modules():
        for hook in _accelerate_hooks(module):
            where = getattr(hook, "execution_device", None)
            if where is not None:
                return torch.device(where)
    return torch.device("cpu")


def spread(root: nn.Module) -> bool:
    """Whether the weights are on several devices, or are put in place call by call."""
    devices = {weight.device for weight in root.parameters()}
    return len(devices) > 1 or torch.device("meta") in devices


def _accelerate_hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [hook])) if hook is not None else []


# --- norms: with the scale held at one run's value, a norm is linear in its input


def gain(kind: Norm, norm: nn.Module) -> Float[Tensor, " d_model"]:
    """The norm's weight: what the normalised vector is multiplied by; ones where it has none (OLMo 1)."""
    shape = getattr(norm, "normalized_shape", None)
    if parameter(norm, "weight") is None and shape is not None:
        return torch.ones(tuple(shape), device=device_of(norm))
    weight = weight_of(norm)
    return 1 + weight if kind == "rms_plus_one" else weight


def frozen_scale(kind: Norm, norm: nn.Module, at: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any 1"]:
    """What a norm multiplies its input `at` by: one over its root mean square (centred first, for LayerNorm)."""
    if kind == "layer":
        at = at - at.mean(-1, keepdim=True)
    # Llama's norms call it variance_epsilon, Gemma's and PyTorch's eps.
    epsilon = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-5)))
    return (at.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()
