"""Tensors in safetensors files of unknown origin."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vesalius.errors import VesaliusError
from vesalius.jobs.untrusted.text import parse_json
from vesalius.jobs.untrusted.unreadable import WRONG, UnreadableError, reason_of, size_of

MOST_HEADER = 2**23
"""Bytes of a header: some ninety thousand tensors."""
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """What the header of a safetensors file says of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def safetensors_header(path: Path) -> dict[str, Stored]:
    """The tensors that a safetensors file says it holds, which fit its size; no value is read.

    Raises OSError when it cannot be opened, UnreadableError for what is no such file or is truncated.
    """
    size = size_of(path)
    with path.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise UnreadableError("it is truncated: its header does not fit into it")
        if length > MOST_HEADER:
            raise UnreadableError(f"its header has {length:,} bytes; at most {MOST_HEADER:,} are read")
        raw = stream.read(length)
    try:
        said = parse_json(raw.decode("utf-8"), values=MOST_HEADER, containers=400_000)
        if not isinstance(said, dict):
            raise UnreadableError("its header is no object")
        return {name: _stored(entry, size - 8 - length) for name, entry in said.items() if name != "__metadata__"}
    except VesaliusError:
        raise
    except WRONG as error:
        raise UnreadableError(f"its header is none of safetensors: {reason_of(error)}") from error


def _stored(entry: Mapping[str, Any], size: int) -> Stored:
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise UnreadableError("a shape or an offset in it is no whole number")
    stored = Stored(entry["dtype"], tuple(shape))
    if (
        not begin <= end <= size
        or stored.size * _BITS[stored.dtype] != 8 * (end - begin)
        or max(shape, default=0) > 2**48
    ):
        raise UnreadableError("a tensor in it has another size than its header says; it is truncated or altered")
    return stored


def read_safetensors(path: Path, without: Collection[str] = ()) -> dict[str, Any]:
    """The tensors of a safetensors file on the CPU, all but those named. Raises as `safetensors_header`."""
    names = [name for name in safetensors_header(path) if name not in without]
    with opened_safetensors(path) as stored:
        return {name: stored.get_tensor(name) for name in names}


@contextlib.contextmanager
def opened_safetensors(path: Path) -> Iterator[Any]:
    """The open file of the safetensors package, after its header was checked. Raises as `safetensors_header`."""
    safetensors_header(path)
    try:
        with safe_open(path, framework="pt") as stored:
            yield stored
    except VesaliusError:
        raise
    except (*WRONG, SafetensorError) as error:
        raise UnreadableError(reason_of(error)) from error
