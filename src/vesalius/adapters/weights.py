"""A module's parameters, also where they are kept away between calls.

A model that is spread with `device_map` may leave weights on disk or in another memory and put them in place for the
length of a call (accelerate); in between a parameter has a shape and no values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vesalius.errors import InputError


def weight_of(module: nn.Module, name: str = "weight") -> Tensor:
    """A parameter's values, without graph. Raises InputError when they are nowhere to be had."""
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
    for hook in _hooks(module):
        kept = getattr(hook, "weights_map", None)
        if kept is not None:
            return torch.as_tensor(kept[name]).detach()
    raise InputError(f"{name} of a {type(module).__name__} is on the meta device and has no values; load the weights")


def device_of(root: nn.Module) -> torch.device:
    """Where a model's inputs go: where its first weights are, or are put for a call."""
    for weight in root.parameters():
        if not weight.is_meta:
            return weight.device
    for module in root.modules():
        for hook in _hooks(module):
            where = getattr(hook, "execution_device", None)
            if where is not None:
                return torch.device(where)
    return torch.device("cpu")


def spread(root: nn.Module) -> bool:
    """Whether the weights lie on several devices, or are put in place call by call."""
    return len({weight.device for weight in root.parameters()} | _kept_away(root)) > 1


def _kept_away(root: nn.Module) -> set[torch.device]:
    return {torch.device("meta"), torch.device("cpu")} if any(weight.is_meta for weight in root.parameters()) else set()


def _hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [hook])) if hook is not None else []
