"""Reading GGUF, the file format of llama.cpp: metadata, a tokenizer and quantised weights in one file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vesalius.errors import FileFormatError, InputError, NotFiniteError

# Roles of special tokens in transformers, and GGUF's words for them.
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# No real metadata array is longer; one flipped bit in a length must not make us read for hours.
_LONGEST_ARRAY = 1 << 22


@dataclass(frozen=True)
class GgufFile:
    """Metadata and tensor table of a GGUF file; tensor values stay on disk until `values` asks for one."""

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, Any]

    def values(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Dequantised float32 values of one tensor, checked to be finite."""
        tensor = self.tensors[name]
        try:
            found = _gguf().quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise FileFormatError(
                f"{self.path}: tensor {name} is quantised as {tensor.tensor_type.name}, which the gguf package cannot "
                "dequantise; use a file quantised as Q8_0, Q4_1, Q4_K, F16 or F32."
            ) from None
        if not np.isfinite(found).all():
            raise NotFiniteError(
                f"{self.path}: tensor {name} holds NaN or infinity; the file is damaged, get it again."
            )
        return np.ascontiguousarray(found, dtype=np.float32)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number from the metadata. Raises FileFormatError when it is missing or anything else."""
        value = self.fields.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
            raise FileFormatError(f"{self.path}: metadata field {key} must be one positive number, found {value!r}.")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive whole number from the metadata. Raises FileFormatError when it is missing or anything else."""
        value = self.number(key, default)
        if value != int(value):
            raise FileFormatError(f"{self.path}: metadata field {key} must be a whole number, found {value!r}.")
        return int(value)


def _gguf() -> Any:
    """The optional gguf package, imported at this one place."""
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise InputError("reading a .gguf file needs the gguf package: pip install gguf") from None
    return gguf


def _bounded_reader(gguf: Any) -> Any:
    """The package's reader, made to stop at the end of the file: by itself it goes on and returns empty arrays."""

    class Bounded(gguf.GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            kind, order = np.dtype(dtype), override_order or self.byte_order
            end = int(offset) + kind.itemsize * int(count)
            if end > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data)}, before its own table says")
            # A plain view: slicing the memmap itself is several times slower, and a tokenizer has 100,000 strings.
            part = self.data.view(np.ndarray)[int(offset) : end].view(kind)
            return part if order == "I" else part.view(kind.newbyteorder(order))

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            is_array = int(raw_type) == int(gguf.GGUFValueType.ARRAY)
            if is_array and int(self._get(int(orig_offs) + 4, np.uint64)[0]) > _LONGEST_ARRAY:
                raise ValueError("a metadata array has an impossible length")
            return super()._get_field_parts(orig_offs, raw_type)

    return Bounded


def read_gguf(path: Path) -> GgufFile:
    """Metadata and tensor table of `path`.

    Raises InputError when the file cannot be opened or the gguf package is missing, FileFormatError when it is no GGUF
    file, truncated, corrupt, one part of several, or written for a machine of the other byte order.
    """
    gguf = _gguf()
    try:
        with np.errstate(all="raise"):
            reader = _bounded_reader(gguf)(path)
            fields = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, LookupError, ArithmeticError, TypeError, MemoryError) as error:
        raise FileFormatError(f"{path} is not a complete GGUF file: {error}. Download or copy it again.") from error
    if reader.byte_order != "I":
        raise FileFormatError(
            f"{path} is written in the other byte order than this machine's; get a little-endian file."
        )
    if fields.get("split.count", 1) != 1:
        raise FileFormatError(
            f"{path} is one of {fields['split.count']} parts; join them with llama-gguf-split --merge."
        )
    return GgufFile(path, fields, {tensor.name: tensor for tensor in reader.tensors})


def special_ids(file: GgufFile, size: int) -> dict[str, int]:
    """Token id of each special role (bos, eos, unk, pad) that the file defines, in a vocabulary of this size."""
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


def vocabulary(file: GgufFile) -> int:
    """Rows of the embedding. Raises FileFormatError when there is none."""
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise FileFormatError(f"{file.path} lacks a matrix token_embd.weight; it is not a whole model.")
    return int(table.shape[-1])
