"""What training measured, written while it runs: metrics.jsonl, a line per step, and on wish a TensorBoard file."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

from vesalius.dictionaries.history import COLUMNS
from vesalius.errors import FileFormatError

FILE, BOARD = "metrics.jsonl", "tensorboard"


class Metrics:
    """The files of one run, in a folder; None writes nothing. board: a TensorBoard file too.

    Lines hold step, loss, fvu, l0, dead and lr as in `History`, the rows of all steps so far (`tokens`), `seconds`
    since this process began to train, and `tokens_per_second`. A run that goes on after a checkpoint goes on there too.
    """

    def __init__(self, folder: Path | None, batch_size: int, board: bool = False) -> None:
        self._folder, self._batch, self._board = folder, batch_size, board
        self._files: list[IO[Any]] = []
        self._began, self._first = time.monotonic(), 0

    def __enter__(self) -> Metrics:
        return self

    def begin(self, rows: Sequence[Sequence[float]]) -> None:
        """Take up after these steps, of which `rows` holds the measurements. Raises FileFormatError."""
        self._began, self._first = time.monotonic(), len(rows)
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._files = [self._lines(len(rows)), *([self._events(rows)] if self._board else [])]
        except OSError as error:
            raise FileFormatError(f"cannot write to {self._folder}: {error.strerror or error}") from error

    def add(self, step: int, row: Sequence[float]) -> str:
        """Write the measurements of a step, numbered from 1; gives what a progress bar says of it."""
        values = dict(zip(COLUMNS, row, strict=True))
        seconds = time.monotonic() - self._began
        rate = (step - self._first) * self._batch / max(seconds, 1e-9)
        told = {"step": step, "tokens": step * self._batch, **values, "seconds": seconds, "tokens_per_second": rate}
        for file, line in zip(self._files, (json.dumps(told) + "\n", _event(step, values)), strict=False):
            file.write(line)
            file.flush()
        return (
            f"loss {values['loss']:.4g}, fvu {values['fvu']:.4f}, l0 {values['l0']:.1f}, dead {values['dead']:.1%}, "
            f"{rate:,.0f} tokens/s"
        )

    def __exit__(self, *_raised: object) -> None:
        for file in self._files:
            file.close()

    def _lines(self, steps: int) -> IO[str]:
        """The file with the lines of these first steps, ready for more."""
        assert self._folder is not None
        path = self._folder / FILE
        old = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
        file = path.open("w", encoding="utf-8")
        file.writelines(line for line in old[:steps] if line.endswith("\n"))
        return file

    def _events(self, rows: Sequence[Sequence[float]]) -> IO[bytes]:
        """The TensorBoard file, made anew with the steps so far, so that none is drawn twice."""
        assert self._folder is not None
        folder = self._folder / BOARD
        folder.mkdir(exist_ok=True)
        for path in folder.glob("events.out.tfevents.*.vesalius"):
            path.unlink()
        file = (folder / f"events.out.tfevents.{time.time():.0f}.vesalius").open("wb")
        file.write(_record(_double(1, time.time()) + _bytes(3, b"brain.Event:2")))
        file.writelines(_event(step, dict(zip(COLUMNS, row, strict=True))) for step, row in enumerate(rows, 1))
        return file


# TensorBoard reads records of protocol buffers (tensorflow/core/util/event.proto, framework/summary.proto): few enough
# fields to write them here, rather than depend on a package of 30 MB.


def _event(step: int, values: Mapping[str, float]) -> bytes:
    """One record: wall_time 1, step 2, summary 5 of values 1, each tag 1 and simple_value 2."""
    scalars = (_bytes(1, f"train/{name}".encode()) + _float(2, value) for name, value in values.items())
    summary = b"".join(_bytes(1, scalar) for scalar in scalars)
    return _record(_double(1, time.time()) + b"\x10" + _varint(step) + _bytes(5, summary))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _bytes(field: int, content: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _varint(len(content)) + content


def _double(field: int, value: float) -> bytes:
    return bytes([field << 3 | 1]) + struct.pack("<d", value)


def _float(field: int, value: float) -> bytes:
    return bytes([field << 3 | 5]) + struct.pack("<f", value)


def _record(content: bytes) -> bytes:
    """Length, its checksum, content, its checksum."""
    length = struct.pack("<Q", len(content))
    return length + _masked(length) + content + _masked(content)


def _masked(content: bytes) -> bytes:
    """The checksum of a record: CRC-32C, turned and shifted."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _table()[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


@cache
def _table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)
