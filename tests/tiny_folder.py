"""What the tests of loading share: a tiny folder, and a name that must be refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiny_gguf import tiny_llama, write_gguf
from vesalius.model.gguf import convert_gguf
from vesalius.model.loading import load


def tiny_folder(parent: Path) -> Path:
    """A tiny model in transformers layout, with the tokenizer of the tiny GGUF file."""
    out = parent / "tiny"
    out.mkdir()
    convert_gguf(write_gguf(parent / "t.gguf", tiny_llama()), out)
    return out


def refused(name: object, error: type[Exception], **options: object) -> str:
    with pytest.raises(error) as caught:
        load(name, **options)
    assert type(caught.value) is error
    return str(caught.value)


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
