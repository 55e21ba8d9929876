"""Long work that can be interrupted: atomic files, resumable blocks, estimates, progress events, executors."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from vesalius.errors import FileFormatError, InputError, UnknownNameError

T = TypeVar("T")
R = TypeVar("R")
Arrays = dict[str, NDArray[Any]]

EVENT_KINDS = ("start", "advance", "end", "note")
_CHECKSUM = "__checksum__"
_RESERVED = frozenset({_CHECKSUM, "file", "allow_pickle"})  # the latter are parameters of np.savez
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)


@dataclass(frozen=True)
class Event:
    """Something happened in a task: it started, advanced to `done` of `total`, ended, or has a `message` (note).

    The message of an advance, such as "fvu 0.21", stands beside its bar.
    """

    kind: str
    task: str
    done: int = 0
    total: int | None = None
    message: str = ""

    def __post_init__(self) -> None:
        if self.kind not in EVENT_KINDS:
            raise UnknownNameError("kind of event", self.kind, EVENT_KINDS)


Sink = Callable[[Event], None]


def silent(event: Event) -> None:
    """The sink that draws nothing."""


def track(items: Iterable[T], task: str, total: int | None = None, sink: Sink = silent) -> Iterator[T]:
    """The items, one by one, with a start event, an advance after each was used, and an end whatever happens."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    done = 0
    sink(Event("start", task, 0, total))
    try:
        for item in items:
            yield item
            done += 1
            sink(Event("advance", task, done, total))
    finally:
        sink(Event("end", task, done, total, "" if total in (None, done) else f"stopped after {done} of {total}"))


@dataclass(frozen=True)
class Estimate:
    """What a job will cost: wall time, forward passes, peak memory and disk (bytes)."""

    seconds: float
    forwards: float = 0.0
    memory_bytes: int = 0
    disk_bytes: int = 0

    def describe(self) -> str:
        """One line for people, such as "about 12 min, 8,640 forward passes, 2.1 GB of memory"."""
        parts = [f"about {_duration(self.seconds)}"]
        if self.forwards:
            parts.append(f"{self.forwards:,.0f} forward passes")
        if self.memory_bytes:
            parts.append(f"{_size(self.memory_bytes)} of memory")
        if self.disk_bytes:
            parts.append(f"{_size(self.disk_bytes)} on disk")
        return ", ".join(parts)


class Executor(Protocol):
    """Runs a function on many items; results come in the order of the items."""

    def map(self, fn: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """The results, in order; an exception of one item is raised where its result would be."""
        ...


@dataclass(frozen=True)
class SerialExecutor:
    """One item after the other, in this process."""

    def map(self, fn: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        return map(fn, items)


def write_atomic(path: str | Path, data: bytes | str) -> Path:
    """Writes a file so that it is there whole or not at all; text as UTF-8. Missing folders are made.

    The data go to a temporary file in the same folder, are forced to disk, and take the name in one step. On failure
    the old file stays and nothing is left over. Raises InputError naming path and free space when the disk is full,
    FileFormatError when the path cannot be written.
    """
    target = Path(path)
    content = data.encode() if isinstance(data, str) else data
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_and_rename(target, content)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"no space to write {target} ({_size(len(content))}): {_size(_free(target.parent))} free in "
                f"{target.parent}; free some, or choose another folder"
            ) from error
        raise FileFormatError(f"cannot write {target}: {error.strerror or error}") from error
    return target


class Blocks:
    """Results of a long job, kept block by block, so that an interrupted job goes on where it was.

    folder: where blocks are kept (None: nothing is kept). plan_hash: what the blocks were computed for; a folder that
    holds another plan is refused with InputError. Blocks are plain `.npz` files with a checksum, never pickles.
    """

    def __init__(self, folder: str | Path | None, plan_hash: str, sink: Sink = silent) -> None:
        self.folder = None if folder is None else Path(folder)
        self.plan_hash = plan_hash
        self._sink = sink
        if self.folder is not None:
            _claim_folder(self.folder, plan_hash)

    def get(self, key: str, compute: Callable[[], Mapping[str, NDArray[Any]]]) -> Arrays:
        """The arrays of a block: read when stored and whole, else computed and stored.

        A block that is truncated or altered is announced through the sink and computed again.
        """
        if self.folder is None:
            return _arrays(key, compute())
        path = self.path(key)
        if path.exists():
            try:
                return _read_block(path, key)
            except _UNREADABLE as error:
                self._sink(Event("note", "blocks", message=f"block {key!r} is damaged ({error}); computing it again"))
        arrays = _arrays(key, compute())
        write_atomic(path, _npz({**arrays, _CHECKSUM: np.array(_checksum(key, arrays))}))
        return arrays

    def __contains__(self, key: str) -> bool:
        return self.folder is not None and self.path(key).exists()

    def path(self, key: str) -> Path:
        """Where the block of this key is kept. Raises InputError without a folder."""
        if self.folder is None:
            raise InputError("these blocks are kept nowhere: give Blocks a folder")
        readable = "".join(c if c.isalnum() or c in "-_." else "_" for c in key)[:60]
        return self.folder / f"{readable}.{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"


def _write_and_rename(target: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read; results are ordinary files.
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current


def _sync_folder(folder: Path) -> None:
    # Not every file system can sync a folder; the file itself is on disk already.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _claim_folder(folder: Path, plan_hash: str) -> None:
    plan = folder / "plan.json"
    if plan.exists():
        kept = _read_plan(plan)
        if kept != plan_hash:
            raise InputError(
                f"{folder} holds blocks of plan {kept}, but this job has plan {plan_hash}; "
                "use another folder, or delete this one to start afresh"
            )
    elif any(folder.glob("*.npz")):
        raise InputError(f"{folder} holds .npz files but no plan.json, so they are not blocks; use another folder")
    else:
        write_atomic(plan, json.dumps({"plan_hash": plan_hash}))


def _read_plan(path: Path) -> str:
    try:
        return str(json.loads(path.read_text("utf-8"))["plan_hash"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(f"{path} is not a plan of blocks ({error}); delete the folder to start afresh") from error


def _arrays(key: str, given: Mapping[str, NDArray[Any]]) -> Arrays:
    arrays = {name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in given.items()}
    for name, array in arrays.items():
        if array.dtype.hasobject or name in _RESERVED:
            raise InputError(
                f"block {key!r}: {name!r} ({array.dtype}) cannot be stored: use arrays of numbers or text, "
                f"and other names than {sorted(_RESERVED)}"
            )
    return arrays


def _npz(arrays: Arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _read_block(path: Path, key: str) -> Arrays:
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    if str(arrays.pop(_CHECKSUM)) != _checksum(key, arrays):
        raise ValueError("its checksum does not match")
    return arrays


def _checksum(key: str, arrays: Arrays) -> str:
    digest = hashlib.sha256(key.encode())
    for name in sorted(arrays):
        digest.update(f"\0{name}\0{arrays[name].dtype.str}\0{arrays[name].shape}\0".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
