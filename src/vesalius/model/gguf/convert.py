"""From a GGUF file to a folder in transformers layout: config.json, model.safetensors and the tokenizer's files.

Only what is understood is converted: a metadata field or a tensor that could change the computation and is not known
here is refused, because a model that is nearly right is worse than none. Weights are stored as float32, which holds
every dequantised value exactly.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vesalius.jobs import Sink, silent, track
from vesalius.model.gguf.architecture import Entry, architecture_of, config_of, plan
from vesalius.model.gguf.file import GgufFile, read_gguf
from vesalius.model.gguf.tokenizer import read_tokenizer


def convert_gguf(path: Path, out: Path, *, sink: Sink = silent) -> None:
    """Write the model in the GGUF file `path` into the existing, empty folder `out`.

    Weights become float32 (4 bytes per parameter). `sink` gets one event per tensor. Raises InputError (file or gguf
    package missing), FileFormatError (corrupt, or holding what is not understood), NotFiniteError,
    UnknownArchitectureError, UnknownNameError (tokenizer).
    """
    file = read_gguf(path)
    architecture = architecture_of(file)
    config = config_of(file, architecture)
    entries, tokenizer = plan(file, architecture, config), read_tokenizer(file)
    _write_weights(file, entries, out / "model.safetensors", sink)
    config.save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)


def _write_weights(file: GgufFile, entries: Sequence[Entry], out: Path, sink: Sink) -> None:
    """A safetensors file, written tensor by tensor so that memory never holds the whole model."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + 4 * math.prod(entry.shape)
        header[entry.target] = {"dtype": "F32", "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    # Tensors have to start at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    with out.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for entry in track(entries, f"convert {file.path.name}", sink=sink):
            stream.write(_values(file, entry).astype("<f4").data)


def _values(file: GgufFile, entry: Entry) -> np.ndarray[Any, Any]:
    values = file.values(entry.source)
    if entry.minus:
        values = values - np.float32(entry.minus)
    return _rotary_rows(values, entry.heads) if entry.heads else values


def _rotary_rows(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows from llama.cpp's order (the two rows of a rotated pair adjacent) to transformers' (in two halves)."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)
