"""From a name to a `Model`: files are checked, transformers reads them, and what it would only warn of is an error.

Nothing here runs code that came with a model, and nothing unpickles. A GGUF file is converted once into a cache; the
cached folder is used only when every byte is as it was written.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vesalius.adapters import KNOWN
from vesalius.errors import FileFormatError, InputError, NotFiniteError, UnknownArchitectureError
from vesalius.jobs import Event, Sink, untrusted
from vesalius.jobs.cache import cache_root, file_sha256, made_folder
from vesalius.jobs.progress import shown
from vesalius.model.gguf import convert_gguf
from vesalius.model.loading.lookup import (
    DEMO,
    INDEX,
    WEIGHTS,
    check_hub,
    look_up,
    no_local_model,
    read_json,
    weight_files,
)
from vesalius.model.loading.promises import check_counts, check_size
from vesalius.model.model import Model

_DEMO_NOTE = "4-bit weights (Q4_1) of an instruct model, as packaged: not the full-precision original"
# Part of the cache's key: to be raised when convert_gguf writes something else.
_LAYOUT = "v1"
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_CLASSES = frozenset(name for adapter in KNOWN for name in adapter.classes)
_NOT_CAUSAL = _CLASSES - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


@dataclass(frozen=True)
class _Request:
    """Arguments of `load`, apart from the name. note: what a reader should know about the weights."""

    device: torch.device
    dtype: torch.dtype
    sink: Sink
    note: str = ""


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
    found = look_up(name)
    with shown(sink) as events:
        request = _Request(checked_device(device), _checked_dtype(dtype), events)
        if found.kind == "hub":
            return _from_hub(str(name), request)
        if found.kind == "folder":
            _check_folder(found.path)
            return _from_folder(found.path, found.path.resolve().name, request)
        folder = _converted(found.path, cache, events)
        if name == DEMO:
            return _from_folder(folder, DEMO, replace(request, note=_DEMO_NOTE))
        return _from_folder(folder, found.path.stem, request)


def without_weights(name: str | Path, *, cache: Path | None = None, sink: Sink | None = None) -> Model:
    """A model as its config describes it: for its sites and their shapes, and none of its numbers mean anything.

    name, cache, sink: as for `load`. No weights are read (a .gguf file is converted, where it was not before), and the
    memory that they would take is not touched. Raises as `load`, where the config is at fault.
    """
    found = look_up(name)
    with shown(sink) as events:
        if found.kind == "hub":
            config, _ = transformers.PreTrainedConfig.get_config_dict(str(name))
            source, title = str(name), str(name)
        else:
            folder = found.path if found.kind == "folder" else _converted(found.path, cache, events)
            config, source = read_json(folder / "config.json"), str(folder)
            title = (
                DEMO if name == DEMO else found.path.resolve().stem if found.kind == "gguf" else folder.resolve().name
            )
    with untrusted.understood(f"{source}/config.json does not describe a model"), _quiet():
        _check_config(config, f"{source}/config.json")
        made = _class_of(config)
        build = made.from_config if made is transformers.AutoModelForCausalLM else made._from_config
        with torch.device("meta"):
            module = build(transformers.AutoConfig.from_pretrained(source, trust_remote_code=False))
    # Pages of memory that nothing was written to cost nothing, and a pass over them gives every shape.
    return Model(module.to_empty(device="cpu").eval(), None, name=title, probe=False)


def checked_device(device: str | torch.device | None) -> torch.device:
    """The device, after a tensor was made there. Raises InputError when that fails."""
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


# --- where the files come from


def _converted(path: Path, cache: Path | None, sink: Sink) -> Path:
    """The folder a GGUF file was converted to; its place is the hash of the file, so an edited file is another one."""
    folder = cache_root(cache) / "gguf" / f"{file_sha256(path)}-{_LAYOUT}"
    return made_folder(
        folder, lambda out: convert_gguf(path, out, sink=sink), origin=path.name, task=f"convert {path.name}", sink=sink
    )


def _from_folder(folder: Path, name: str, request: _Request) -> Model:
    return _read(str(folder), name, request, read_json(folder / "config.json"))


def _from_hub(name: str, request: _Request) -> Model:
    """A model by its hub id: from the hub's local cache when it is whole there, else downloaded."""
    with contextlib.suppress(OSError):
        return _hub_model(name, request, local=True)
    check_hub(name)
    request.sink(Event("note", f"load {name}", 0, 1, f"downloading {name}"))
    try:
        return _hub_model(name, request, local=False)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model {name!r} could not be had from the hub ({reason}): {no_local_model(name)}") from error


def _hub_model(name: str, request: _Request, *, local: bool) -> Model:
    config, _ = transformers.PreTrainedConfig.get_config_dict(name, local_files_only=local)
    _check_config(config, f"{name}/config.json")
    return _read(name, name, request, config, local=local)


# --- what is checked before transformers reads them


def _check_folder(folder: Path) -> None:
    path, config = folder / "config.json", read_json(folder / "config.json")
    with untrusted.understood(f"{path} does not describe a model"):
        _check_config(config, str(path))
        tensors = _tensors(folder)
        check_counts(config, tensors, path)
        with _quiet():
            check_size(_class_of(config), folder, tensors)


def _tensors(folder: Path) -> list[untrusted.Stored]:
    """Every tensor of its weight files."""
    found: list[untrusted.Stored] = []
    for path in weight_files(folder):
        try:
            found += list(untrusted.safetensors_header(path).values())
        except (OSError, ValueError) as error:
            raise FileFormatError(f"{path} is truncated or corrupt: {error}. Download or copy it again.") from error
    return found


def _class_of(config: Mapping[str, Any]) -> Any:
    """The class of transformers that opens a model."""
    return getattr(transformers, _named_class(config) or "AutoModelForCausalLM")


def _check_config(config: Mapping[str, Any], where: str) -> None:
    if config.get("auto_map"):
        raise FileFormatError(
            f"{where} names its own modelling code (auto_map), which is never run here: loading a model must not run "
            "a stranger's program. If transformers itself knows the model, remove auto_map; else build the module and "
            "use Model(module)."
        )
    kind = str(config.get("model_type"))
    if _named_class(config) is None and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        known = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        close = difflib.get_close_matches(kind, known, n=4, cutoff=0.3) or ["gpt2", "llama"]
        raise UnknownArchitectureError(
            f"{where}: model_type {kind!r} is no causal language model of transformers {transformers.__version__}; it "
            f"knows {len(known)}, the closest being {', '.join(close)}. Other classes that an adapter knows: "
            f"{', '.join(sorted(_NOT_CAUSAL))}. Any module can be wrapped with Model(module)."
        )


def _named_class(config: Mapping[str, Any]) -> str | None:
    """The class that a config names, when it is one that an adapter knows: masked, encoder-decoder and image models."""
    named, kind = config.get("architectures"), config.get("model_type")
    fitting = (
        name
        for name in (named if isinstance(named, list) else [])
        if isinstance(name, str) and name in _CLASSES and getattr(transformers, name).config_class.model_type == kind
    )
    return next(fitting, None)


# --- transformers reads them


def _read(source: str, name: str, request: _Request, config: Mapping[str, Any], *, local: bool = True) -> Model:
    """A Model from a checked folder or a hub id, whose config.json is `config`."""
    options = {"trust_remote_code": False, "local_files_only": local}
    # Mismatched sizes are refused below, where the message can say which.
    wanted = {
        "dtype": request.dtype,
        "use_safetensors": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    try:
        with _quiet():
            module, info = _class_of(config).from_pretrained(source, **wanted, **options)
            tokenizer = _tokenizer(source, options)
    except MemoryError:
        raise
    except Exception as error:
        # A corrupt file can make transformers raise anything. Hub errors of a hub id are reported by the caller.
        if isinstance(error, InputError) or (isinstance(error, OSError) and not Path(source).is_dir()):
            raise
        raise FileFormatError(f"{source}: transformers cannot load it: {type(error).__name__}: {error}") from error
    _check_complete(info, source)
    if info["unexpected_keys"]:
        unused = ", ".join(sorted(info["unexpected_keys"])[:4])
        request.sink(Event("note", f"load {name}", 1, 1, f"{source}: tensors the model does not use: {unused}"))
    _check_finite(module, source)
    return Model(module.to(request.device).eval(), tokenizer, name=name, note=request.note)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers draws bars and tables of its own; what it found is reported here by events and errors."""
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
        # enable_progress_bar switches the hub's bars on as well.
        if bars and not hub_bars:
            disable_progress_bars()


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
    shards = read_json(folder / INDEX)["weight_map"] if (folder / INDEX).is_file() else {}
    for name, weight in module.named_parameters():
        if weight.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(weight.detach()))).all()):
            raise NotFiniteError(
                f"{folder / shards.get(name, WEIGHTS)}: tensor {name} holds NaN or infinity as {weight.dtype}. The "
                "file is damaged, or the dtype too small for it."
            )
