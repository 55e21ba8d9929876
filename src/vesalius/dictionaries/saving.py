"""Writing a coder in our format or another library's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vesalius.dictionaries import folder
from vesalius.dictionaries.cross_layer import CrossLayerTranscoder
from vesalius.dictionaries.formats import READ_ONLY, WRITERS
from vesalius.errors import InputError, UnknownNameError

OWN = "vesalius"


def save(coder: Any, out: str | Path, *, format: str = OWN) -> Path:
    """Writes a coder to a folder, which is made when missing.

    format: `vesalius` keeps everything; `saelens`, `sparsify`, `gemma_scope`, `gemma_scope_2` and `circuit_tracer`
    write what those libraries open. What a format has no field for is folded into the weights where the function stays
    the same (scales of inputs, b_dec on inputs), and refused where it does not.

    In our format the same coder may be saved again over itself. Raises InputError naming what the format cannot
    express, or when the folder holds another dictionary; UnknownNameError listing the formats that are written.
    """
    where = Path(out)
    if format == OWN:
        return folder.save(coder, where)
    if format not in WRITERS:
        why = f"{format} is read only." if format in READ_ONLY else ""
        raise UnknownNameError("format to write", format, [OWN, *WRITERS], why)
    if isinstance(coder, CrossLayerTranscoder) and format != "circuit_tracer":
        raise InputError(f"{format} cannot express a cross-layer transcoder; circuit_tracer and {OWN} can")
    if (where / folder.CONFIG).exists() and folder.is_folder(where):
        raise InputError(f"{where} holds a dictionary in our own format; choose another folder")
    WRITERS[format](coder, where)
    return where
