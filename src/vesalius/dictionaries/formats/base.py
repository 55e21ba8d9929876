"""What a file format is here, and what its reader is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vesalius.dictionaries.coder import SparseCoder
from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.formats.reading import AGAIN, Weights, read_json, read_npz, read_pickle, read_safetensors
from vesalius.errors import FileFormatError, InputError, NotFiniteError
from vesalius.site import Site


@dataclass(frozen=True)
class Options:
    """Arguments of `load` that a reader needs."""

    layer: int | None = None
    """Of files that hold several layers."""
    unpickle: bool = False
    in_scale: float | None = None
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Found:
    """A file or folder that was given, and the options it is read with."""

    path: Path
    options: Options = field(default_factory=Options)

    @property
    def folder(self) -> Path:
        """The folder, or the one the file is in."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def given(self) -> str:
        """Name of the file that was given, or empty for a folder."""
        return "" if self.path.is_dir() else self.path.name

    def has(self, name: str) -> bool:
        """Whether this file was given, or is in the folder that was given."""
        return self.given == name if self.given else (self.path / name).is_file()

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder."""
        return read_json(self.folder / name)

    def maybe_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder, or nothing."""
        return read_json(self.folder / name) if (self.folder / name).is_file() else {}

    def weights(self, name: str) -> Weights:
        """A safetensors file of the folder."""
        path = self.folder / name
        return Weights(path, read_safetensors(path), self.options.dtype)

    def arrays(self, name: str) -> Weights:
        """An .npz file of the folder."""
        path = self.folder / name
        return Weights(path, read_npz(path), self.options.dtype)

    def pickled(self, name: str) -> dict[str, Any]:
        """The state dict in a pickle of the folder."""
        return read_pickle(self.folder / name, self.options.unpickle)


def built(path: Path, activation: str, **fields: Any) -> Dictionary:
    """A Dictionary from the tensors of a file.

    Raises FileFormatError naming the file, where they don't fit each other or hold NaN or infinity.
    """
    try:
        # The checks of a Dictionary speak of tensors; here the user needs to know which file they are in.
        return Dictionary(activation, **fields)
    except NotFiniteError as error:
        raise FileFormatError(f"{path}: {error}. {AGAIN}") from error
    except InputError as error:
        raise FileFormatError(f"{path}: {error}") from error


def own_sites(path: Path, written: Mapping[str, Any]) -> tuple[Site, Site]:
    """Sites that this package wrote into another library's config. Raises FileFormatError for what names none."""
    try:
        return Site.parse(str(written.get("in_site"))), Site.parse(str(written.get("out_site")))
    except InputError as error:
        raise FileFormatError(f"{path}, under `vesalius`: {error}") from error


Read = Callable[[Found], SparseCoder]
Write = Callable[[Any, Path], None]


@dataclass(frozen=True)
class Format:
    """One format: how it is recognised by what is there, how it is read, and how it is written."""

    name: str
    holds: str
    """What a folder of this format has, for messages."""
    claims: Callable[[Found], bool]
    read: Read
    write: Write | None = None
