"""A dictionary on disk: a folder with `dictionary.safetensors`, `config.json` and, after training, `history.npz`.

config.json, version 1:

    format, version    "vesalius-dictionary", 1
    coder              "dictionary" or "cross_layer_transcoder"
    settings           activation, in_sites, out_sites, k, apply_b_dec_to_input, in_scale, out_scale, groups,
                       row_norm (where there is one)
    tensors            name -> {shape, dtype}: the names in dictionary.safetensors
    sha256             file -> its hash
    content_hash       of settings and tensors together
    metadata           where it comes from: training config, hash of the activations, models with the hashes of their
                       weights, how training ended (summary), version of the package ("about" in older files)

config.json is written last and whole, so a folder that has it has everything it names.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from torch import Tensor

from vesalius.dictionaries.cross_layer import CrossLayerTranscoder
from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.history import History
from vesalius.errors import FileFormatError, InputError, UnknownNameError
from vesalius.jobs import write_atomic
from vesalius.jobs.cache import file_sha256
from vesalius.jobs.untrusted import read_json, read_npz, read_safetensors, understood
from vesalius.protocol.canonical import plain
from vesalius.site import Site

CONFIG, WEIGHTS, HISTORY = "config.json", "dictionary.safetensors", "history.npz"
FORMAT, VERSION = "vesalius-dictionary", 1
Stored = Dictionary | CrossLayerTranscoder
"""What can be kept in a folder."""


def save(coder: Stored, out: str | Path) -> Path:
    """Writes a coder to a folder, which is made when missing.

    The same coder may be saved again over itself. Raises InputError when the folder holds another dictionary.
    """
    folder = Path(out)
    config = _config(coder)
    if (folder / CONFIG).exists() and _read_config(folder)["content_hash"] != config["content_hash"]:
        raise InputError(f"{folder} holds another dictionary; choose another folder, or delete this one")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in coder.tensors.items()}
    write_atomic(folder / WEIGHTS, safetensors.torch.save(tensors))
    if coder.history is not None:
        write_atomic(folder / HISTORY, _npz(coder.history))
    hashes = {name: file_sha256(folder / name) for name in (WEIGHTS, HISTORY) if (folder / name).exists()}
    # Last, so that a folder with a config.json is whole.
    write_atomic(folder / CONFIG, json.dumps({**config, "sha256": hashes}, indent=1, sort_keys=True) + "\n")
    return folder


def _config(coder: Stored) -> dict[str, Any]:
    shapes = {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in coder.tensors.items()
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "coder": "dictionary" if isinstance(coder, Dictionary) else "cross_layer_transcoder",
        "settings": coder.settings,
        "tensors": shapes,
        "content_hash": coder.content_hash,
        "metadata": plain(coder.metadata, "metadata"),
    }


def is_folder(folder: str | Path) -> bool:
    """Whether a folder claims to hold a dictionary of this format."""
    try:
        found = read_json(Path(folder) / CONFIG)
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def read(folder: str | Path) -> Stored:
    """The coder in a folder.

    Every file is compared with the hash that was written beside it. Raises FileFormatError naming the file that is
    missing, truncated, altered or of a later version.
    """
    where = Path(folder)
    config = _read_config(where)
    with understood(f"{where} is not a dictionary as it was written"):
        return _built(where, config)


def _built(where: Path, config: Mapping[str, Any]) -> Stored:
    """What the files describe; anything may be of another type than it should be."""
    if config["coder"] not in READERS:
        raise UnknownNameError("coder in a file", str(config["coder"]), READERS)
    for name, wanted in config["sha256"].items():
        if name not in (WEIGHTS, HISTORY):
            raise FileFormatError(f"{where / CONFIG} names the file {name!r}, which no dictionary has")
        _check_file(where / name, str(wanted))
    history = _read_history(where / HISTORY) if HISTORY in config["sha256"] else None
    coder = READERS[config["coder"]](config["settings"], _read_weights(where / WEIGHTS), config["metadata"], history)
    # Files are compared with hashes that stand beside them; only this finds an edit of the settings.
    if coder.content_hash != config["content_hash"]:
        raise FileFormatError(f"{where / CONFIG} was altered: what it describes has another hash than it says")
    return coder


def _dictionary(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], history: History | None
) -> Dictionary:
    """A Dictionary from its settings and named tensors."""
    numbered = lambda name, count: tuple(tensors[f"{name}.{number}"] for number in range(count))  # noqa: E731
    sites = {name: tuple(map(Site.parse, settings[name])) for name in ("in_sites", "out_sites")}
    n_out = len(sites["out_sites"])
    return Dictionary(
        settings["activation"],
        **sites,
        encoders=numbered("W_enc", len(sites["in_sites"])),
        decoders=numbered("W_dec", n_out),
        b_enc=tensors["b_enc"],
        b_dec=numbered("b_dec", n_out),
        extras={name: t for name, t in tensors.items() if name not in ("b_enc", "W_skip") and "." not in name},
        k=settings["k"],
        skip=tensors.get("W_skip"),
        apply_b_dec_to_input=settings["apply_b_dec_to_input"],
        in_scale=tuple(settings["in_scale"]),
        out_scale=tuple(settings["out_scale"]),
        groups=tuple(settings["groups"]),
        row_norm=settings.get("row_norm", "none"),
        metadata=metadata,
        history=history,
    )


def _cross_layer(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], history: History | None
) -> CrossLayerTranscoder:
    """A CrossLayerTranscoder from its settings and named tensors: those of layer 2 begin with `2/`."""
    layers: list[Dictionary] = []
    for number, own in enumerate(settings["layers"]):
        prefix = f"{number}/"
        mine = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        layers.append(_dictionary(own, mine, {}, None))
    biases = tuple(tensors[f"b_dec.{number}"] for number in range(len(layers)))
    return CrossLayerTranscoder(tuple(layers), biases, metadata, history)


READERS: Mapping[str, Callable[..., Stored]] = {"dictionary": _dictionary, "cross_layer_transcoder": _cross_layer}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = read_json(path)
        if config["format"] != FORMAT:
            raise FileFormatError(f"{path} is of format {config['format']!r}, not {FORMAT!r}")
        if config["version"] != VERSION:
            raise FileFormatError(f"{path} is of version {config['version']}; this package reads version {VERSION}")
        needed = {name: config[name] for name in ("coder", "settings", "sha256", "content_hash")}
        return {**needed, "metadata": config["metadata" if "metadata" in config else "about"]}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise FileFormatError(f"{path} is not the description of a dictionary ({error})") from error


def _check_file(path: Path, wanted: str) -> None:
    if not path.is_file():
        raise FileFormatError(f"{path} is missing")
    if file_sha256(path) != wanted:
        raise FileFormatError(f"{path} is truncated or was altered: its hash is not the one in {CONFIG}")


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return read_safetensors(path)
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} cannot be read as safetensors ({error})") from error


def _npz(history: History) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **history.columns)  # type: ignore[arg-type]
    return buffer.getvalue()


def _read_history(path: Path) -> History:
    try:
        return History(read_npz(path))
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} cannot be read as a training history ({error})") from error
