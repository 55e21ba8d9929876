"""What a config promises, held against the weights beside it before a model is built for them.

transformers builds what the config says, and fills what the weights lack with random numbers; a config of a few bytes
could ask for any amount of either.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from vesalius.errors import FileFormatError
from vesalius.jobs.untrusted import Stored

# Weights may be shared between layers, tied, or packed; what is refused is far beyond that.
_MOST_LAYERS, _MOST_EXPERTS, _MOST_OF_ANYTHING = 1_000, 4_096, 100_000
_TIMES, _MORE = 4, 2**23
_LAYERS = re.compile(r"(?:^|_)(?:n|num)_(?:\w+_)?(?:layers?|blocks?)$|layers$|^depths?$")
_EXPERTS = re.compile(r"expert")
_COUNTS = re.compile(r"^(?:n|num)_")


def check_counts(config: Mapping[str, Any], tensors: Collection[Stored], where: Path) -> None:
    """Raises FileFormatError for a config that asks for more layers, experts or labels than its weights can have."""
    values = sum(tensor.size for tensor in tensors)
    limits = (
        (_LAYERS, max(_MOST_LAYERS, len(tensors))),
        (_EXPERTS, max(_MOST_EXPERTS, len(tensors))),
        (_COUNTS, max(_MOST_OF_ANYTHING, values)),
    )
    for key, value in _numbers(config):
        most = next((limit for pattern, limit in limits if pattern.search(key)), None)
        if most is not None and value > most:
            raise FileFormatError(
                f"{where} says {key}={str(value)[:20]}, and the weights beside it have {len(tensors)} tensors of "
                f"{values:,} values. Download or copy both again."
            )


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number of a config with its key, those of the parts of a model too."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        for one in value if isinstance(value, list) else (value,):
            if isinstance(one, int | float):
                yield key, one


def check_size(known: Any, folder: Path, tensors: Collection[Stored]) -> None:
    """Raises FileFormatError for a config of a model that is far larger than the weights beside it.

    known: the model's class. It is built without memory for its weights, which takes milliseconds.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            empty = known.from_config(config) if known is transformers.AutoModelForCausalLM else known(config)
    except Exception:
        return
    asked = sum(tensor.numel() for tensor in (*empty.parameters(), *empty.buffers()))
    values = sum(tensor.size for tensor in tensors)
    if asked > _TIMES * values + _MORE:
        raise FileFormatError(
            f"{folder / 'config.json'} describes a model of {asked:,} parameters, and the weights beside it have "
            f"{values:,}. Download or copy both again."
        )
