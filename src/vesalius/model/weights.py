"""Weights, whatever a module keeps them in: the matrix of a linear module, and a hash of all of a model's.

Fine-tuned and quantised models have LoRA beside the weights, packed integers, or tensors of a kind of their own. A
module that is nothing but `nn.Linear` or GPT-2's Conv1D is read. Any other is asked: a basis goes through it, and what
it answers to zero is its bias. One that is not linear is refused by name, because heads have no shares in it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vesalius.adapters.base import device_of, parameter, weight_of
from vesalius.errors import InputError

# A basis vector's length: the answer to it stands out from a large bias in bfloat16 as well. A power of two is exact.
_LENGTH = 256.0
_ROWS = 1024
_PROBES = 8
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True, eq=False)
class Linear:
    """y = x @ matrix.T + bias."""

    matrix: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None


def linear_of(module: nn.Module, width: int, dtype: torch.dtype) -> Linear:
    """What a module computes, as a matrix and a bias, without graph. width, dtype: of its inputs.

    Raises InputError for a module that is not linear (8-bit activations, dropout in training, a router).
    """
    if is_plain(module):
        weight = weight_of(module)
        return Linear(weight if isinstance(module, nn.Linear) else weight.T, parameter(module, "bias"))
    device = device_of(module)
    with torch.no_grad():
        zero = module(torch.zeros(1, 1, width, dtype=dtype, device=device))[0, 0]
        found = [_answers(module, rows, width, zero) for rows in torch.arange(width, device=device).split(_ROWS)]
        linear = Linear(torch.cat(found).T, zero if bool(zero.any()) else None)
        _check(module, linear, width)
    return linear


def is_plain(module: nn.Module) -> bool:
    """Whether a module is its weight and bias and nothing else.

    Not when a subclass, a hook, a replaced forward or a quantised tensor may compute something else from them.
    """
    conv1d = type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
    weight: object = getattr(module, "weight", None)
    return (
        (type(module) is nn.Linear or conv1d)
        and isinstance(weight, Tensor)
        and type(weight) in (nn.Parameter, Tensor)
        and weight.is_floating_point()
        and not (module._forward_hooks or module._forward_pre_hooks)
        # accelerate replaces forward in order to fetch the weights, and computes nothing else.
        and ("forward" not in vars(module) or hasattr(module, "_hf_hook"))
    )


def dtype_of(root: nn.Module) -> torch.dtype:
    """What a model's activations are in: its first weights that are no quantised ones."""
    for weight in root.parameters():
        if weight.is_floating_point() and weight.dtype.itemsize > 1:
            return weight.dtype
    return torch.get_default_dtype()


def rounding(tensor: Tensor) -> float:
    """What rounding alone may change in a product, relative to its size: the dtype's, or TF32's where a GPU uses it."""
    eps = torch.finfo(tensor.dtype).eps
    tf32 = tensor.is_cuda and tensor.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    # TF32 keeps 10 bits, as float16 does.
    return 4 * max(eps, torch.finfo(torch.float16).eps if tf32 else 2.5e-6)


def _answers(module: nn.Module, rows: Tensor, width: int, zero: Tensor) -> Float[Tensor, "row out"]:
    """The matrix's columns of these numbers."""
    basis = torch.zeros(1, len(rows), width, dtype=zero.dtype, device=rows.device)
    basis[0, torch.arange(len(rows), device=rows.device), rows] = _LENGTH
    answered: Tensor = (module(basis)[0] - zero) / _LENGTH
    return answered


def _check(module: nn.Module, linear: Linear, width: int) -> None:
    """Raises InputError when a module does something else to other vectors than its matrix does."""
    probe = torch.randn(1, _PROBES, width, generator=torch.Generator().manual_seed(0)).to(linear.matrix)
    wide = torch.promote_types(probe.dtype, torch.float32)
    expected = probe.to(wide) @ linear.matrix.to(wide).T
    got = module(probe).to(wide)
    if linear.bias is not None:
        got = got - linear.bias.to(wide)
    off = float((got - expected).norm() / expected.norm().clamp_min(torch.finfo(wide).tiny))
    if not off <= rounding(probe):
        kind = type(getattr(module, "weight", None)).__name__
        raise InputError(
            f"a {type(module).__name__} (weight: {kind}) is not linear: its answers are {off:.1%} off those of its own "
            "matrix, so heads have no exact shares of them. If it is quantised, dequantise it (module.dequantize(), or "
            "load it without quantisation); if it is in training mode, call model.module.eval()"
        )


def hash_of(root: nn.Module) -> str:
    """sha256 of every parameter and buffer, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(root.state_dict().items()):
        if not isinstance(tensor, Tensor):
            digest.update(f"{name}{tensor!r}".encode())
            continue
        if tensor.is_meta:
            path, _, last = name.rpartition(".")
            tensor = weight_of(root.get_submodule(path), last)
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        for held in _plain_tensors(tensor):
            digest.update(held.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor, or those that one of a kind of its own (torchao's) is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    held, how = tensor.__tensor_flatten__()
    for name in held:
        yield from _plain_tensors(getattr(tensor, name))
    # What else says how it multiplies, such as whether it rounds what it is multiplied with.
    yield torch.tensor(list(_ADDRESS.sub("", repr(how)).encode()), dtype=torch.uint8)
