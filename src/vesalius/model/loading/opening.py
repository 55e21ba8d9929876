"""From files that were checked to a Model: transformers reads them, and what it would only mention is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars

from vesalius.errors import FileFormatError, InputError, NotFiniteError
from vesalius.jobs import Event, Sink
from vesalius.model import Model
from vesalius.model.loading.folder import INDEX, WEIGHTS, named_class, read_json

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class Order:
    """What was asked for, apart from which model. note: what a reader should know about its weights."""

    device: torch.device
    dtype: torch.dtype
    sink: Sink
    note: str = ""


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


def opened(source: str, name: str, order: Order, config: Mapping[str, Any], *, local: bool = True) -> Model:
    """A Model from a checked folder or a hub id, whose config.json is `config`."""
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
            known = getattr(transformers, named_class(config) or "AutoModelForCausalLM")
            module, info = known.from_pretrained(source, **asked, **options)
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
    return Model(module.to(order.device).eval(), tokenizer, name=name, note=order.note)


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
