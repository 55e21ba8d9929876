"""From a folder to a coder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vesalius.dictionaries import folder as own
from vesalius.dictionaries.coder import Coder
from vesalius.dictionaries.cross_layer import cross_layer_from
from vesalius.errors import FileFormatError

READERS: dict[str, Callable[..., Coder]] = {
    "dictionary": own.dictionary_from,
    "cross_layer_transcoder": cross_layer_from,
}


def load(where: str | Path) -> Coder:
    """The dictionary in a folder.

    Raises FileFormatError naming the file that is missing, truncated or altered, or when the folder holds none.
    """
    folder = Path(where)
    if not folder.is_dir():
        raise FileFormatError(f"{folder} is not a folder; give the one a dictionary was saved in")
    if not own.is_folder(folder):
        raise FileFormatError(f"{folder} holds no dictionary: there is no {own.CONFIG} of format {own.FORMAT!r} in it")
    coder: Coder = own.read(folder, READERS)
    return coder
