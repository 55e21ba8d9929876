"""The files that a run writes while it trains: checkpoints, metrics.jsonl with a line per step, and a TensorBoard file.

A checkpoint is whole or not there, checked by hash, and the last two are kept.
"""

from __future__ import annotations

import hashlib
import json
import struct
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import safetensors.torch
from torch import Tensor

from vesalius.dictionaries.history import COLUMNS
from vesalius.errors import FileFormatError, InputError
from vesalius.intervention import digest
from vesalius.jobs import Event, Sink, write_atomic
from vesalius.jobs.untrusted import opened_safetensors

CHECKPOINTS, METRICS, TENSORBOARD = "checkpoints", "metrics.jsonl", "tensorboard"
N_CHECKPOINTS = 2


@runtime_checkable
class Resumable(Protocol):
    """Something that is trained step by step, and can be put back where it was."""

    @property
    def steps(self) -> int: ...

    def tensors(self) -> dict[str, Tensor]: ...

    def restore(self, tensors: dict[str, Tensor]) -> None: ...


class Checkpoints:
    """The checkpoints of one plan in a folder; None keeps nothing. plan: hash of config and data.

    Raises InputError for a folder with checkpoints of another plan.
    """

    def __init__(self, out: Path | None, plan: str, sink: Sink, task: str = "train") -> None:
        self._folder = None if out is None else out / CHECKPOINTS
        self._plan, self._sink, self._task = plan, sink, task

    def save(self, fitter: Resumable) -> None:
        """Write the fitter's state, and drop what is older than the last two."""
        if self._folder is None:
            return
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in fitter.tensors().items()}
        metadata = {"plan": self._plan, "sha256": _hash(tensors)}
        write_atomic(self._folder / f"{fitter.steps:09}.safetensors", safetensors.torch.save(tensors, metadata))
        # Two are kept, so that one that was damaged by a crash while it was written to disk can be passed over.
        for path in self._paths()[:-N_CHECKPOINTS]:
            path.unlink()

    def resume(self, fitter: Resumable) -> None:
        """Put the fitter where the last whole checkpoint was; damaged ones are announced and passed over."""
        for path in reversed(self._paths()):
            try:
                fitter.restore(self._read(path))
            except FileFormatError as error:
                self._sink(Event("note", self._task, message=f"{error}; going on from an earlier step"))
                continue
            self._sink(Event("note", self._task, message=f"going on after step {fitter.steps} ({path})"))
            return

    def remove(self) -> None:
        """Delete all, when they are not needed any more."""
        for path in self._paths():
            path.unlink()
        if self._folder is not None and self._folder.is_dir():
            self._folder.rmdir()

    def _paths(self) -> list[Path]:
        return [] if self._folder is None else sorted(self._folder.glob("*.safetensors"))

    def _read(self, path: Path) -> dict[str, Tensor]:
        try:
            with opened_safetensors(path) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, ValueError) as error:
            raise FileFormatError(f"the checkpoint {path} is truncated or was altered ({error})") from error
        if metadata.get("sha256") != _hash(tensors):
            raise FileFormatError(f"the checkpoint {path} was altered: its hash is not the one it was written with")
        if metadata.get("plan") != self._plan:
            raise InputError(
                f"{path} belongs to another config or other data; use another folder, or delete it to start afresh"
            )
        return tensors


def _hash(tensors: Mapping[str, Tensor]) -> str:
    rows = [f"{name} {tuple(tensors[name].shape)} {digest(tensors[name])}" for name in sorted(tensors)]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


class Metrics:
    """The files of one run, in a folder; None writes nothing. tensorboard: a TensorBoard file too.

    Lines hold step, loss, fvu, l0, dead and lr as in `History`, the rows of all steps so far (`tokens`), `seconds`
    since this process began to train, and `tokens_per_second`. A run that goes on after a checkpoint goes on there too.
    """

    def __init__(self, folder: Path | None, batch_size: int, tensorboard: bool = False) -> None:
        self._folder, self._batch, self._tensorboard = folder, batch_size, tensorboard
        self._files: list[IO[Any]] = []
        self._began, self._first = time.monotonic(), 0

    def __enter__(self) -> Metrics:
        return self

    def begin(self, history: Sequence[Sequence[float]]) -> None:
        """Go on after these steps. Raises FileFormatError when the folder cannot be written to."""
        self._began, self._first = time.monotonic(), len(history)
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._files = [self._lines(len(history)), *([self._events(history)] if self._tensorboard else [])]
        except OSError as error:
            raise FileFormatError(f"cannot write to {self._folder}: {error.strerror or error}") from error

    def add(self, step: int, measured: Sequence[float]) -> str:
        """Write what was measured at a step, numbered from 1; returns what a progress bar says of it."""
        values = dict(zip(COLUMNS, measured, strict=True))
        seconds = time.monotonic() - self._began
        rate = (step - self._first) * self._batch / max(seconds, 1e-9)
        line = {"step": step, "tokens": step * self._batch, **values, "seconds": seconds, "tokens_per_second": rate}
        for file, record in zip(self._files, (json.dumps(line) + "\n", _event(step, values)), strict=False):
            file.write(record)
            file.flush()
        return (
            f"loss {values['loss']:.4g}, fvu {values['fvu']:.4f}, l0 {values['l0']:.1f}, silent {values['dead']:.1%}, "
            f"{rate:,.0f} tokens/s"
        )

    def __exit__(self, *_raised: object) -> None:
        for file in self._files:
            file.close()

    def _lines(self, steps: int) -> IO[str]:
        """The file with the lines of these first steps, ready for more."""
        assert self._folder is not None
        path = self._folder / METRICS
        old = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
        file = path.open("w", encoding="utf-8")
        # Lines after the last checkpoint are of steps that are about to be taken again.
        file.writelines(line for line in old[:steps] if line.endswith("\n"))
        return file

    def _events(self, history: Sequence[Sequence[float]]) -> IO[bytes]:
        """The TensorBoard file, made anew with the steps so far, so that none is drawn twice."""
        assert self._folder is not None
        folder = self._folder / TENSORBOARD
        folder.mkdir(exist_ok=True)
        for path in folder.glob("events.out.tfevents.*.vesalius"):
            path.unlink()
        file = (folder / f"events.out.tfevents.{time.time():.0f}.vesalius").open("wb")
        file.write(_record(_double(1, time.time()) + _bytes(3, b"brain.Event:2")))
        file.writelines(_event(step, dict(zip(COLUMNS, row, strict=True))) for step, row in enumerate(history, 1))
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
    """The checksum of a record: CRC-32C, rotated and shifted as TensorFlow does."""
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
