"""Long work that can be interrupted: files written whole or not at all, and results kept block by block."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vesalius.errors import FileFormatError, InputError
from vesalius.jobs.progress import Event, Sink, silent, size_in_words
from vesalius.jobs.untrusted import read_json, read_npz

Arrays = dict[str, NDArray[Any]]

_CHECKSUM = "__checksum__"
# The last two are parameters of np.savez, which takes arrays as keywords.
_RESERVED = frozenset({_CHECKSUM, "file", "allow_pickle"})


def write_atomic(path: str | Path, data: bytes | str) -> Path:
    """Write a file so that it is there whole or not at all; text as UTF-8. Missing folders are made.

    The data goes to a temporary file in the same folder, is forced to disk, and takes the name in one step. On failure
    the old file stays and no temporary file is left. Raises InputError naming path and free space when the disk is
    full, FileFormatError when the path cannot be written.
    """
    target = Path(path)
    _written(target, data, _take_name)
    return target


def write_once(path: str | Path, data: bytes | str) -> bool:
    """As `write_atomic`, unless there is a file of that name: then it stays, and the answer is False.

    Of several processes that do this at once, one writes the file and the others hear that it is there.
    """
    try:
        _written(Path(path), data, _take_free_name)
    except FileExistsError:
        return False
    return True


def _written(target: Path, data: bytes | str, take: Callable[[Path, Path], object]) -> None:
    content = data.encode() if isinstance(data, str) else data
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_and_take(target, content, take)
    except FileExistsError:
        if take is _take_free_name and target.exists():
            raise
        raise FileFormatError(f"cannot write {target}: there is a file where its folder should be") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"no space to write {target} ({size_in_words(len(content))}): {size_in_words(_free(target.parent))} "
                f"free in {target.parent}; free some, or choose another folder"
            ) from error
        raise FileFormatError(f"cannot write {target}: {error.strerror or error}") from error


class Blocks:
    """Results of a long job, stored block by block, so that an interrupted job goes on where it stopped.

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
            except (OSError, ValueError, KeyError) as error:
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


def _write_and_take(target: Path, content: bytes, take: Callable[[Path, Path], object]) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read; results are ordinary files.
        Path(name).chmod(0o666 & ~_umask())
        take(Path(name), target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _take_name(made: Path, target: Path) -> None:
    made.replace(target)


def _take_free_name(made: Path, target: Path) -> None:
    """Raises FileExistsError when the name is taken."""
    try:
        os.link(made, target)
    except FileExistsError:
        raise
    except OSError:
        # Some file systems have no hard links; here a reader may meet the file before it is whole.
        with target.open("xb") as file:
            file.write(made.read_bytes())
    made.unlink()


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
    # The last look is for another process, which may have written its plan and a block in the meantime.
    if not plan.exists() and any(folder.glob("*.npz")) and not plan.exists():
        raise InputError(f"{folder} holds .npz files but no plan.json, so they are not blocks; use another folder")
    # Of two jobs that begin at the same instant one writes its plan, and the other finds it.
    if not plan.exists() and write_once(plan, json.dumps({"plan_hash": plan_hash})):
        return
    kept = _read_plan(plan)
    if kept != plan_hash:
        raise InputError(
            f"{folder} holds blocks of plan {kept}, but this job has plan {plan_hash}; "
            "use another folder, or delete this one to start afresh"
        )


def _read_plan(path: Path) -> str:
    try:
        return str(read_json(path)["plan_hash"])
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
    arrays = read_npz(path)
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
