"""JSON and other text of unknown origin, with bounds on size, depth and numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vesalius.jobs.untrusted.unreadable import UnreadableError, reason_of, size_of

MOST_TEXT = 2**25
"""Bytes of a JSON file. Configs and manifests are far below it."""
MOST_VALUES, MOST_CONTAINERS, MOST_DEPTH = 700_000, 200_000, 100
"""Of one JSON text: values, lists and objects, and how deep they may lie in each other. A value of two bytes can take
sixty, a container two hundred."""
LARGEST = 1e150
"""Numbers beyond it have no square, so that nothing can be computed with them."""


def read_json(path: Path, *, finite: bool = True) -> Any:
    """The value in a JSON file. Raises OSError when it cannot be opened, else as `parse_json`."""
    return parse_json(read_text(path), finite=finite)


def read_text(path: Path) -> str:
    """A UTF-8 file of bounded size. Raises OSError when it cannot be opened, UnreadableError for another."""
    size = size_of(path)
    if size > MOST_TEXT:
        raise UnreadableError(f"it has {size:,} bytes; such a file has at most {MOST_TEXT:,}")
    with path.open("rb") as stream:
        raw = stream.read(MOST_TEXT + 1)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"it is not UTF-8 text: byte {error.start}, {error.reason}") from error


def parse_json(
    text: str, *, finite: bool = True, values: int | None = MOST_VALUES, containers: int = MOST_CONTAINERS
) -> Any:
    """The value of a JSON text.

    Raises UnreadableError for what is no JSON, too large or too deep, a key that is there twice, half a surrogate pair,
    and (unless finite is False) NaN, infinity or a number beyond 1e150. values, containers: the most there may be;
    values None bounds neither.
    """
    if values is not None and (text.count(",") > values or _containers(text) > containers):
        raise UnreadableError(f"it holds more than {values:,} values or {containers:,} lists and objects")
    check_depth(text)
    try:
        found = (_CAREFUL if finite else _LENIENT).decode(text)
    except UnreadableError:
        raise
    except (ValueError, RecursionError) as error:
        raise UnreadableError(reason_of(error)) from error
    _check_pairs(found, text)
    return found


def check_depth(text: str) -> None:
    """Raises UnreadableError for JSON deeper than MOST_DEPTH: going through it would break off somewhere."""
    if _containers(text) <= MOST_DEPTH:
        return
    depth = 0
    for match in _BRACKET_OR_STRING.finditer(text):
        first = match[0][0]
        if first in "[{":
            depth += 1
            if depth > MOST_DEPTH:
                raise UnreadableError(f"lists and objects lie in each other more than {MOST_DEPTH} deep")
        elif first in "]}":
            depth -= 1


def decode_at(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins at a place in a text, and where it ends; the text's depth has been checked.

    Numbers may be of any size, as with finite=False.
    """
    try:
        found, end = _LENIENT.raw_decode(text, at)
    except UnreadableError:
        raise
    except (ValueError, RecursionError) as error:
        raise UnreadableError(reason_of(error)) from error
    _check_pairs(found, text[at:end])
    return found, end


# Possessive, so that neither a string that never ends nor one with many escapes is gone through again and again.
_BRACKET_OR_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
_HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
_MOST_DIGITS = 300


def _containers(text: str) -> int:
    return text.count("[") + text.count("{")


def _check_pairs(found: Any, text: str) -> None:
    # Only an escape can make one: the text itself was UTF-8.
    if _HALF_A_PAIR.search(text):
        try:
            json.dumps(found, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise UnreadableError("a text holds half a surrogate pair, which is no character") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UnreadableError(f"the key {twice[:60]!r} is there twice")
    return found


def _no_number(word: str) -> Any:
    raise UnreadableError(f"{word} is no number that can be computed with")


def _real(digits: str) -> float:
    value = float(digits)
    if abs(value) > LARGEST:
        _no_number(digits[:40])
    return value


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS or abs(value := int(digits)) > LARGEST:
        raise UnreadableError(f"a whole number of {len(digits):,} digits is none that can be computed with")
    return value


def _short_integer(digits: str) -> int:
    return int(digits) if len(digits) <= _MOST_DIGITS else _integer(digits)


_CAREFUL = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_number, parse_int=_integer, parse_float=_real)
_LENIENT = json.JSONDecoder(object_pairs_hook=_object, parse_int=_short_integer)
