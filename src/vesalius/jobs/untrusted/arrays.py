"""Arrays in .npz files of unknown origin: zip archives whose members are bounded, and hold what their headers say."""

from __future__ import annotations

import ast
import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from vesalius.errors import VesaliusError
from vesalius.jobs.untrusted.unreadable import WRONG, UnreadableError, reason_of, size_of

MOST_MEMBERS, MOST_DIRECTORY = 4096, 2**20
"""Members of a zip archive, and bytes of the table that lists them."""
SWELL, SWELL_FACTOR = 48 * 2**20, 4
"""An archive may hold this much more than its own size, or this many times its size, whichever is more. Weights shrink
to half at best; only what is made to swell goes beyond."""


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file, of numbers or text.

    Raises OSError when it cannot be opened; UnreadableError for what is no such archive, arrays of objects (which are
    pickles), and headers that promise other sizes than there are.
    """
    size = size_of(path)
    try:
        with path.open("rb") as stream:
            _check_directory(stream, size)
            with zipfile.ZipFile(stream) as archive:
                members = archive.infolist()
                _check_members(members, size)
                return {info.filename.removesuffix(".npy"): _array(archive, info) for info in members}
    except VesaliusError:
        raise
    except (*WRONG, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise UnreadableError(f"it is no archive of arrays: {reason_of(error)}") from error


def _check_directory(stream: IO[bytes], size: int) -> None:
    """The table of members is read whole by `zipfile`, some ten times as large in memory; so its size comes first."""
    stream.seek(max(0, size - 2**16 - 98))
    tail = stream.read(2**16 + 98)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + 22 > len(tail):
        raise UnreadableError("it is no zip archive, or its end is missing")
    (table,) = struct.unpack_from("<I", tail, at + 12)
    # Large archives say it again, in a record that comes before.
    if at >= 76 and tail[at - 20 : at - 16] == b"PK\x06\x07":
        (table,) = struct.unpack_from("<Q", tail, at - 76 + 40)
    if table > MOST_DIRECTORY:
        raise UnreadableError(f"its table of members has {table:,} bytes; at most {MOST_DIRECTORY:,} are read")


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    names = [info.filename for info in members]
    total, most = sum(info.file_size for info in members), max(size + SWELL, SWELL_FACTOR * size)
    if len(members) > MOST_MEMBERS or len(set(names)) < len(names):
        raise UnreadableError(f"it has {len(members):,} members, of which some have the same name or are too many")
    if total > most:
        raise UnreadableError(f"its {size:,} bytes would become {total:,}; at most {most:,} are read")
    for info in members:
        # Other methods ask for memory before they give a byte.
        plain = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) and not info.flag_bits & 1
        if not plain or not info.filename.endswith(".npy"):
            raise UnreadableError(f"{info.filename[:60]!r} in it is no array as NumPy writes it")


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(info) as stream:
        dtype, shape, by_columns, header = _npy_header(stream)
        count = math.prod(shape)
        if count * dtype.itemsize != info.file_size - header:
            raise UnreadableError(f"{info.filename[:60]!r} promises {count:,} {dtype} and holds another number")
        flat = np.empty(count, dtype)
        into, at = flat.view(np.uint8) if count else np.empty(0, np.uint8), 0
        # One read more than there are bytes: at the end, the archive compares its checksum.
        while chunk := stream.read(2**20):
            into[at : at + len(chunk)] = np.frombuffer(chunk, np.uint8)
            at += len(chunk)
    return flat.reshape(shape[::-1]).T if by_columns else flat.reshape(shape)


def _npy_header(stream: IO[bytes]) -> tuple[np.dtype[Any], tuple[int, ...], bool, int]:
    """dtype, shape, whether columns come first, and the header's bytes. Raises ValueError and such for what is none."""
    start = stream.read(8)
    if start[:6] != b"\x93NUMPY" or start[6:] not in (b"\x01\x00", b"\x02\x00", b"\x03\x00"):
        raise UnreadableError("an array in it does not begin as one")
    form = "<H" if start[6] == 1 else "<I"
    raw = stream.read(struct.calcsize(form))
    (length,) = struct.unpack(form, raw)
    if length > 10_000:
        raise UnreadableError(f"the header of an array in it has {length:,} bytes")
    # Literals only: nothing in it is called.
    said = ast.literal_eval(stream.read(length).decode("utf-8").strip())
    descr, shape, by_columns = said["descr"], said["shape"], said["fortran_order"]
    whole = isinstance(shape, tuple) and all(type(n) is int and 0 <= n < 2**48 for n in shape) and len(shape) <= 32
    if not whole or not isinstance(descr, str) or not isinstance(by_columns, bool):
        raise UnreadableError("the header of an array in it is none of numbers or text")
    dtype = np.dtype(descr)
    if dtype.kind not in "biufcSUMm" or dtype.itemsize == 0:
        raise UnreadableError(f"an array of {dtype} in it is none of numbers or text")
    return dtype, shape, by_columns, 8 + len(raw) + length
