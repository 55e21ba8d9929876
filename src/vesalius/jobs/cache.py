"""Folders that are costly to make: made once, used only while every byte is as it was written.

A folder is filled under a temporary name and renamed when it is complete, with a manifest of sizes and hashes. A killed
process leaves a temporary folder, which is never used and which the next process to make something removes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from vesalius.errors import InputError
from vesalius.jobs import Event, Sink, silent, write_atomic
from vesalius.jobs.untrusted import read_json

if sys.platform != "win32":
    import fcntl

MANIFEST = "manifest.json"


def cache_root(cache: Path | None = None) -> Path:
    """`cache` if given, else $VESALIUS_CACHE, else $XDG_CACHE_HOME/vesalius, else ~/.cache/vesalius."""
    if cache is not None:
        return Path(cache).expanduser()
    if os.environ.get("VESALIUS_CACHE"):
        return Path(os.environ["VESALIUS_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vesalius"


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flaw(folder: Path) -> str:
    """Why a folder may not be used; empty when it holds exactly the files of its manifest, byte for byte.

    Hidden files are ignored: file browsers write them everywhere.
    """
    try:
        files = read_json(folder / MANIFEST)["files"]
        present = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
        if present != {*files, MANIFEST}:
            return "files were added or removed"
        sized = [name for name, written in files.items() if (folder / name).stat().st_size != written["size"]]
        changed = sized or [name for name, written in files.items() if file_sha256(folder / name) != written["sha256"]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"its manifest is missing or unusable ({type(error).__name__})"
    return f"{', '.join(sorted(changed))} changed since it was written" if changed else ""


def made_folder(
    folder: Path, fill: Callable[[Path], None], *, origin: str, task: str = "make", sink: Sink = silent
) -> Path:
    """`folder`, filled by `fill(empty folder)` unless it is already there and intact.

    origin: what it is made from, for the manifest. task: name of the work, in events. Safe with several processes at
    once: one makes the folder, the others wait for it. Raises InputError when the place cannot be written, and what
    `fill` raises, in which case nothing is left behind.
    """
    if not flaw(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        waiting = Event("note", task, 0, 1, "waiting for another process")
        with alone(folder.parent / ".lock", lambda: sink(waiting)) as locked:
            if locked:
                _sweep(folder.parent)
            reason = flaw(folder)
            if reason and os.path.lexists(folder):
                sink(Event("note", task, 0, 1, f"made again: {reason} in {folder}"))
            if reason:
                _make(folder, fill, origin)
    except OSError as error:
        raise InputError(
            f"cannot write the cache at {folder.parent}: {error.strerror or error}. Name another place with cache= or "
            "the environment variable VESALIUS_CACHE."
        ) from error
    return folder


@contextlib.contextmanager
def alone(lock: Path, waiting: Callable[[], None]) -> Iterator[bool]:
    """One process at a time in the `with` block, where the system can lock files; yields whether it can.

    The system releases the lock when the process that holds it dies, however it dies.
    """
    with lock.open("a") as stream:
        yield _locked(stream.fileno(), waiting)


def _locked(handle: int, waiting: Callable[[], None]) -> bool:
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        waiting()
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        # Some network drives have no locks.
        return False
    return True


def _sweep(root: Path) -> None:
    """Remove what killed processes left; only under the lock, when no other process can be using it."""
    for left in root.glob("*.tmp-*"):
        _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _make(folder: Path, fill: Callable[[Path], None], origin: str) -> None:
    temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        fill(temporary)
        files = {
            path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(temporary.iterdir())
        }
        write_atomic(temporary / MANIFEST, json.dumps({"origin": origin, "files": files}, indent=1, sort_keys=True))
        _publish(temporary, folder)
    finally:
        _remove(temporary)


def _publish(temporary: Path, folder: Path) -> None:
    try:
        # Fails when there is a file of that name, or a folder with files in it.
        temporary.replace(folder)
    except OSError:
        # Without a lock another process may have been first, and what it made is as good.
        if not flaw(folder):
            return
        aside = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex}")
        folder.replace(aside)
        temporary.replace(folder)
        _remove(aside)
