"""A folder in transformers layout: everything that can be told wrong with it before transformers reads it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vesalius.adapters import KNOWN
from vesalius.errors import FileFormatError, UnknownArchitectureError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_CLASSES = frozenset(name for adapter in KNOWN for name in adapter.classes)
_OTHERS = _CLASSES - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} cannot be read as JSON: {error}. Download or copy it again.") from error
    if not isinstance(found, dict):
        raise FileFormatError(f"{path} should hold a JSON object, it holds a {type(found).__name__}.")
    return found


def check_folder(folder: Path) -> None:
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
    check_config(read_json(folder / "config.json"), str(folder / "config.json"))
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise FileFormatError(f"{path} is truncated or corrupt: {error}. Download or copy it again.") from error


def check_config(config: Mapping[str, Any], where: str) -> None:
    if config.get("auto_map"):
        raise FileFormatError(
            f"{where} names its own modelling code (auto_map), which is never run here: loading a model must not run "
            "a stranger's program. If transformers itself knows the model, remove auto_map; else build the module and "
            "use Model(module)."
        )
    kind = str(config.get("model_type"))
    if named_class(config) is None and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        known = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        close = difflib.get_close_matches(kind, known, n=4, cutoff=0.3) or ["gpt2", "llama"]
        raise UnknownArchitectureError(
            f"{where}: model_type {kind!r} is no causal language model of transformers {transformers.__version__}; it "
            f"knows {len(known)}, the closest being {', '.join(close)}. Other classes that an adapter knows: "
            f"{', '.join(sorted(_OTHERS))}. Any module can be wrapped with Model(module)."
        )


def named_class(config: Mapping[str, Any]) -> str | None:
    """The class that a config names, when it is one that an adapter knows: masked, encoder-decoder and image models."""
    named, kind = config.get("architectures"), config.get("model_type")
    fitting = (
        name
        for name in (named if isinstance(named, list) else [])
        if name in _CLASSES and getattr(transformers, name).config_class.model_type == kind
    )
    return next(fitting, None)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises FileFormatError when there are none, or some are missing."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise FileFormatError(f"{folder / INDEX} has no weight_map from tensor names to files.")
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
