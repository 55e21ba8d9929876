"""Everything public says what it does."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import ModuleType

import pytest

import vesalius as vs

ROOMS = [import_module(f"vesalius.{name}") for name in vs._ROOMS]


def public(room: ModuleType) -> dict[str, object]:
    return {name: getattr(room, name) for name in getattr(room, "__all__", [])}


def undocumented(owner: str, thing: object) -> list[str]:
    """Names of a function or class, and of its own public methods, that have no docstring."""
    if not (inspect.isfunction(thing) or inspect.isclass(thing)) or not thing.__module__.startswith("vesalius"):
        return []
    # Dataclasses get a docstring made of their fields, which says nothing.
    made = f"{thing.__name__}("
    return [] if thing.__doc__ and not thing.__doc__.startswith(made) else [f"{owner}.{thing.__name__}"]


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.__name__)
def test_every_room_and_what_it_exports_has_a_docstring(room: ModuleType) -> None:
    assert room.__doc__
    assert public(room)
    assert [name for thing in public(room).values() for name in undocumented(room.__name__, thing)] == []


def test_every_public_name_of_the_package_has_a_docstring() -> None:
    names = [name for name in vs.__all__ if name not in vs._ROOMS]
    assert [found for name in names for found in undocumented("vesalius", getattr(vs, name))] == []


def test_a_function_without_docstring_is_found() -> None:
    def bare() -> None: ...

    bare.__module__ = "vesalius.made_up"
    assert undocumented("here", bare) == ["here.bare"]
