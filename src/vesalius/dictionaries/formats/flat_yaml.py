"""The little of YAML that description files of transcoders use: `key: value` lines, and lists of plain words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vesalius.errors import FileFormatError
from vesalius.jobs.untrusted import parse_json, read_text

_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None, "~": None, "": None}


def read_flat_yaml(path: Path) -> dict[str, Any]:
    """Scalars and lists of scalars by key. Raises FileFormatError for a file that is missing or holds more."""
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} cannot be read ({error})") from error
    found: dict[str, Any] = {}
    last = ""
    for number, line in enumerate(lines, 1):
        text = line.split(" #")[0].rstrip()
        if not text or text.startswith(("#", "---")):
            continue
        if text.lstrip().startswith("- ") and last:
            found[last] = [*(found[last] or []), _scalar(text.lstrip()[2:])]
        elif ":" in text and not text[0].isspace():
            last, _, value = text.partition(":")
            found[last.strip()] = _scalar(value)
            last = last.strip()
        else:
            raise FileFormatError(f"{path}, line {number}: only `key: value` and lists of words are read, not {text!r}")
    return found


def _scalar(text: str) -> Any:
    word = text.strip()
    if word.startswith(("{", "[", "&", "*", "!", "|", ">")):
        raise FileFormatError(f"only plain values are read from YAML here, not {word!r}")
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    if word[0] == "'":
        return word.strip("'")
    try:
        return parse_json(word)
    except ValueError:
        return word


def flat_yaml(values: dict[str, Any]) -> str:
    """Scalars as YAML text (every JSON scalar is one)."""
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items())
