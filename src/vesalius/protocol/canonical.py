"""One canonical JSON and one content hash for everything that is stored or compared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from vesalius.errors import InputError, NotFiniteError, UnknownNameError

T = TypeVar("T")


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, ASCII, floats as their shortest round-tripping repr.

    Dataclasses become objects, tuples arrays. Raises InputError naming type and path for anything else than JSON
    (sets, bytes, closures, arrays, keys that are not text), NotFiniteError for NaN and infinity.
    """
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def content_hash(value: Any) -> str:
    """SHA-256 (64 hexadecimal digits) of the canonical JSON of a value. Raises as `canonical_json`."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()


def plain(value: Any, path: str = "value") -> Any:
    """A copy of the value in dicts, lists, text, numbers, booleans and None only. Raises as `canonical_json`."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return number(value, path)
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {_key(key, path): plain(item, f"{path}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), f"{path}.{f.name}") for f in dataclasses.fields(value)}
    raise InputError(
        f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which has no canonical JSON; "
        "records hold only dicts, lists, text, numbers, booleans and None"
    )


def number(value: Any, path: str) -> float:
    """A finite float. Raises NotFiniteError naming the path, InputError for what is no number."""
    try:
        result = float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} must be a number; got {value!r}") from error
    if not math.isfinite(result):
        raise NotFiniteError(f"{path} is {result}; records hold finite numbers only")
    return result


def numbers(values: Any, path: str) -> tuple[float, ...]:
    """Finite floats, `[example]`. Raises as `number`, naming the index."""
    return tuple(number(value, f"{path}[{index}]") for index, value in enumerate(values))


def mapping(value: Any, path: str) -> dict[str, Any]:
    """A plain copy of a mapping, so that later changes of the caller's dict don't reach the record."""
    if not isinstance(value, Mapping):
        raise InputError(f"{path} must be a mapping; got {type(value).__name__}")
    copied: dict[str, Any] = plain(value, path)
    return copied


def build(cls: type[T], data: Any) -> T:
    """The dataclass from its JSON. Raises UnknownNameError for an unknown field, InputError for a missing one."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if not isinstance(data, Mapping):
        raise InputError(f"{cls.__name__} must be a mapping; got {type(data).__name__}")
    for name in data:
        if name not in fields:
            raise UnknownNameError(f"field of {cls.__name__}", name, fields)
    needed = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING and f.init]
    missing = [name for name in needed if name not in data]
    if missing:
        raise InputError(f"{cls.__name__} lacks the field(s) {', '.join(missing)}")
    return cls(**data)


def _key(key: Any, path: str) -> str:
    if not isinstance(key, str):
        raise InputError(f"{path} has the key {key!r} ({type(key).__name__}); keys of records are text")
    return str(key)
