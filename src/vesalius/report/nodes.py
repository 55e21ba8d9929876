"""A small language for describing JSON as data: what keys there are, what they hold, what they mean.

A description can be held against a value (`check_node`) and printed (`rows`), so that the two cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vesalius.errors import InputError, NotFiniteError, UnknownNameError
from vesalius.jobs.untrusted import LARGEST

KINDS = ("text", "number", "whole number", "true or false")


@dataclass(frozen=True)
class Value:
    """One text, number, whole number or flag; `null` says that it may be absent, `one_of` lists the allowed texts."""

    kind: str
    doc: str = ""
    null: bool = False
    one_of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Items:
    """A list; with `length` exactly that many."""

    of: Node
    doc: str = ""
    null: bool = False
    length: int | None = None


@dataclass(frozen=True)
class Named:
    """An object with free keys, all values alike."""

    of: Node
    doc: str = ""
    null: bool = False


@dataclass(frozen=True)
class Object:
    """A JSON object with fixed keys, all of them required; `rest` describes further keys, where they are allowed."""

    fields: Mapping[str, Node]
    doc: str = ""
    null: bool = False
    rest: Value | None = None


Node = Value | Items | Named | Object


def text(doc: str, *, null: bool = False, one_of: tuple[str, ...] = ()) -> Value:
    """A text."""
    return Value("text", doc, null, one_of)


def number(doc: str = "", *, null: bool = True) -> Value:
    """A finite number; null (not measured) unless said otherwise."""
    return Value("number", doc, null)


def whole(doc: str, *, null: bool = False) -> Value:
    """A whole number."""
    return Value("whole number", doc, null)


def flag(doc: str, *, null: bool = False) -> Value:
    """True or false."""
    return Value("true or false", doc, null)


def numbers(doc: str, *, null: bool = False) -> Items:
    """A list of numbers, any of which may be null."""
    return Items(number(), doc, null)


def interval(doc: str, **more: Node) -> Object:
    """An estimate with both ends of its 95 % interval, and further fields after them."""
    bounds = {"estimate": number("mean"), "low": number("95 % interval, lower end"), "high": number("upper end")}
    return Object({**bounds, **more}, doc)


def estimate(doc: str) -> Object:
    """An interval with the number of examples behind it."""
    return interval(doc, n=whole("examples"))


def check_node(node: Node, value: Any, path: str) -> None:
    """Raises unless the value is as described, naming the path of the first difference.

    UnknownNameError for an unknown key, NotFiniteError for NaN or infinity, InputError for everything else.
    """
    if value is None:
        if not node.null:
            raise InputError(f"{path} is null; it must be {kind_of(node)}")
    elif isinstance(node, Value):
        _check_value(node, value, path)
    elif isinstance(node, Items):
        _check_items(node, value, path)
    else:
        _check_object(node, value, path)


def rows(node: Node, path: str) -> Iterator[tuple[str, str, str]]:
    """(path, kind, meaning) of a description and everything inside, in order; `[]` stands for any index."""
    yield path, kind_of(node) + (" or null" if node.null else ""), node.doc
    if isinstance(node, Items) and not isinstance(node.of, Value):
        yield from _inner(rows(node.of, f"{path}[]"))
    elif isinstance(node, Named) and not isinstance(node.of, Value):
        yield from _inner(rows(node.of, f"{path}.<name>"))
    elif isinstance(node, Object):
        for name, field in node.fields.items():
            yield from rows(field, f"{path}.{name}")
        if node.rest is not None:
            yield from rows(node.rest, f"{path}.<name>")


def kind_of(node: Node) -> str:
    """What a value of this description is, in words."""
    if isinstance(node, Value):
        return "one of " + ", ".join(f'"{name}"' for name in node.one_of) if node.one_of else node.kind
    if isinstance(node, Items):
        inner = node.of.kind if isinstance(node.of, Value) else "list" if isinstance(node.of, Items) else "object"
        inner += " or null" if node.of.null else ""
        return f"list of {inner}" + (f", length {node.length}" if node.length is not None else "")
    if isinstance(node, Named) and isinstance(node.of, Value):
        return f"object, name to {node.of.kind}" + (" or null" if node.of.null else "")
    return "object, by name" if isinstance(node, Named) else "object"


def _inner(found: Iterator[tuple[str, str, str]]) -> Iterator[tuple[str, str, str]]:
    """Without the row of the element itself, unless that row says something."""
    for number, row in enumerate(found):
        if number or row[2]:
            yield row


def _check_value(node: Value, value: Any, path: str) -> None:
    wrong = InputError(f"{path} must be {kind_of(node)}; got {_shown(value)}")
    if node.kind == "text":
        if not isinstance(value, str) or (node.one_of and value not in node.one_of):
            raise wrong
    elif node.kind == "true or false":
        if not isinstance(value, bool):
            raise wrong
    # To Python True is a whole number; in JSON it is not.
    elif isinstance(value, bool) or not isinstance(value, int if node.kind == "whole number" else (int, float)):
        raise wrong
    elif not abs(value) <= LARGEST:
        # A whole number of thousands of digits cannot even be written out.
        shown = value if isinstance(value, float) else "too large a number"
        raise NotFiniteError(f"{path} is {shown}; numbers that were not measured are null")


def _check_items(node: Items, value: Any, path: str) -> None:
    # A text is a sequence too, and would pass for a list of its letters.
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{path} must be {kind_of(node)}; got {_shown(value)}")
    if node.length is not None and len(value) != node.length:
        raise InputError(f"{path} has {len(value)} entries; it must have {node.length}")
    for index, item in enumerate(value):
        check_node(node.of, item, f"{path}[{index}]")


def _check_object(node: Named | Object, value: Any, path: str) -> None:
    if not isinstance(value, Mapping):
        raise InputError(f"{path} must be an object; got {_shown(value)}")
    if isinstance(node, Object):
        missing = [name for name in node.fields if name not in value]
        if missing:
            raise InputError(
                f"{path} lacks the key(s) {', '.join(missing)}; what was not measured is null, not left out"
            )
    for name, item in value.items():
        inner = node.of if isinstance(node, Named) else node.fields.get(name, node.rest)
        if inner is None:
            raise UnknownNameError(f"key in {path}", str(name), node.fields if isinstance(node, Object) else ())
        check_node(inner, item, f"{path}.{name}")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:
        # Of a whole number of thousands of digits.
        text = "a number"
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
