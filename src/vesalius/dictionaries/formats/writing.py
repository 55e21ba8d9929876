"""Writing files of other libraries: safetensors, whole or not at all, in one floating-point type."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from vesalius.dictionaries.dictionary import Dictionary
from vesalius.errors import InputError
from vesalius.jobs import write_atomic


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Tensors on the CPU, in memory order. Raises InputError when another file is there."""
    ready = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_new(path, safetensors.torch.save(ready, metadata={"format": "pt"}))


def write_new(path: Path, data: bytes | str) -> None:
    """Writes a file that is not there yet, or the same again. Raises InputError when another is there."""
    content = data.encode() if isinstance(data, str) else data
    if path.exists() and (path.stat().st_size != len(content) or path.read_bytes() != content):
        raise InputError(f"{path} is there already and holds something else; choose another folder, or delete it")
    write_atomic(path, content)


def same_dtype(given: Dictionary) -> torch.dtype:
    """The floating-point type of its encoder."""
    return given.encoders[0].dtype


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` and so on."""
    return str(dtype).removeprefix("torch.")


def npz_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """An .npz file of float32 arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: tensor.detach().cpu().float().numpy() for name, tensor in tensors.items()})  # type: ignore[arg-type]
    return buffer.getvalue()
