"""What an adapter is: data that says where a model family keeps its tensors. No forward pass is written here.

A new family is one file with one `Adapter` value and a parity test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from vesalius.errors import InputError, UnknownArchitectureError

Side = Literal["in", "out"]
Replay = Literal["drop", "false", "positions", "rotary"]


@dataclass(frozen=True)
class Access:
    """Where one tensor lives: a module's input or output, perhaps one part of it, perhaps split into heads."""

    path: str
    """Module path; `{layer}` is replaced by the number. Relative to the layer for layer sites."""
    side: Side = "out"
    heads: Literal["", "head", "kv_head"] = ""
    """Split the last axis into this many heads."""
    part: tuple[int, int] | None = None
    """(number, of): this equal part of the last axis (fused query-key-value projections)."""
    delta: str = ""
    """The tensor is a sum no module returns: read here, written by adding the change at this path's output."""


@dataclass(frozen=True)
class Layout:
    """Sizes of one model."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    vocab: int


@dataclass(frozen=True)
class Adapter:
    """One model family, as data. Paths are attribute paths from the wrapped module."""

    family: str
    classes: tuple[str, ...]
    """Names of the module classes it fits."""
    layers: str
    """Path of the list of layers."""
    sites: Mapping[str, Access]
    """Layer sites, relative to the layer ("" is the layer itself)."""
    outside: Mapping[str, Access]
    """Sites outside the layers: embed, pos_embed, final_norm, logits."""
    o_proj: str
    """Output projection of attention, from the layer; a Linear [d_model, head * d_head] or Conv1D (transposed)."""
    final_norm: str
    unembed: str
    norm: Literal["rms", "layer"]
    config: Mapping[str, str] = field(default_factory=dict)
    """Layout field -> attribute of `module.config`; a missing optional one (n_kv_heads, d_head) is derived."""
    attention: str = ""
    """Attention module, relative to the layer, when it goes through transformers' AttentionInterface; "" when not."""
    replay: Mapping[str, Replay] = field(default_factory=dict)
    """How a layer's keyword is rebuilt when it is called again on some positions; others must not be tensors."""
    refuse: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Config field -> values that this adapter understands; any other value is refused."""

    def layout(self, module: nn.Module) -> Layout:
        """Sizes read from `module.config`. Raises InputError when a field is missing."""
        config = module.config
        read = {name: getattr(config, attribute, None) for name, attribute in self.config.items()}
        read["n_kv_heads"] = read.get("n_kv_heads") or read["n_heads"]
        read["d_head"] = read.get("d_head") or (read["d_model"] or 0) // (read["n_heads"] or 1)
        missing = [self.config[name] for name, value in read.items() if value is None and name in self.config]
        if missing:
            raise InputError(f"the config of {type(module).__name__} lacks {', '.join(missing)}")
        return Layout(**{name: int(value) for name, value in read.items() if value is not None})

    def check(self, module: nn.Module) -> None:
        """Refuse a config this adapter does not understand, naming the field."""
        for name, understood in self.refuse.items():
            value = getattr(module.config, name, understood[0])
            if value not in understood:
                raise UnknownArchitectureError(
                    f"{type(module).__name__} has config.{name}={value!r}; "
                    f"the {self.family} adapter understands {understood}"
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
