"""Paths that a user gives: what is wrong with one, found before any work begins."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from vesalius.errors import FileFormatError, InputError

PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib")


def check_file(path: Path, suffixes: Sequence[str], things: str) -> None:
    """Raises FileFormatError for a path that is not a file with one of the suffixes: missing, a directory, a pickle.

    things: what is read from such files, for messages.
    """
    where, suffix = path.absolute(), path.suffix.lower()
    listed = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
    if path.is_dir():
        raise FileFormatError(f"{where} is a directory; give the {listed} file in it")
    if not path.exists():
        raise FileFormatError(f"there is no file {where}")
    if suffix in PICKLES:
        raise FileFormatError(
            f"{where}: pickled files can run code when they are opened and are refused; save as {suffixes[0]}"
        )
    if suffix not in suffixes:
        raise FileFormatError(f"{where} ends in {path.suffix or 'nothing'!r}; {things} are read from {listed}")


def check_writable(folder: Path, option: str = "--out") -> None:
    """Raises InputError when a folder, there or still to be made, cannot be written; leaves nothing behind."""
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        # Only writing tells: permissions say nothing about a read-only or a virtual file system.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {existing} is not a folder that can be written "
            f"({error.strerror or error}); give another {option}"
        ) from error
