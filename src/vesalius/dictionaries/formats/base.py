"""What a file format is here, and what its reader is given."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vesalius.dictionaries.coder import SparseCoder
from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.formats.reading import (
    AGAIN,
    Weights,
    read_json,
    read_npz,
    read_pickle,
    read_safetensors,
    refuse_settings,
)
from vesalius.errors import FileFormatError, InputError, NotFiniteError
from vesalius.site import Site


@dataclass(frozen=True)
class Options:
    """Arguments of `load` that a reader needs."""

    layer: int | None = None
    """Of files that hold several layers."""
    unpickle: bool = False
    in_scale: float | None = None
    k: int | None = None
    row_norm: str | None = None
    dtype: torch.dtype = torch.float32
    ignore: tuple[str, ...] = ()
    """Tensors and settings of the file, by name, that are left out although they are not understood."""


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
        return self.of(path, read_safetensors(path))

    def arrays(self, name: str) -> Weights:
        """An .npz file of the folder."""
        path = self.folder / name
        return self.of(path, read_npz(path))

    def of(self, path: Path, tensors: Mapping[str, Tensor]) -> Weights:
        """Tensors that were read from a file, less those that are to be ignored."""
        kept = {name: tensor for name, tensor in tensors.items() if name not in self.options.ignore}
        return Weights(path, kept, self.options.dtype)

    def refuse_settings(self, path: Path, settings: Mapping[str, Any], known: Collection[str], kind: str) -> None:
        """As `reading.refuse_settings`, less those that are to be ignored."""
        refuse_settings(path, settings, known, kind, self.options.ignore)

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
    options: tuple[str, ...] = ()
    """Of the arguments of `load` that only some formats have, those that it takes."""
