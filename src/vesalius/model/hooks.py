"""The only place that registers hooks.

A `Tap` names a tensor (a module's input or output) and a function to call with it; a `CallTap` sees a module's whole
call, an `OutputTap` its arguments and whole output. `tapped` installs them for the length of a `with` block and always
removes them. Several taps on one tensor share one hook and run in the order given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from vesalius.errors import InterventionError

Visit = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True, eq=False)
class Tap:
    """Call `visit(tensor)` when `module` has its input or output; a returned tensor replaces it."""

    module: nn.Module
    side: str
    """`in` or `out`: the first tensor. `out.1.0`: item 0 of item 1; `in.1`, `in.mask`: that argument."""
    visit: Visit


@dataclass(frozen=True, eq=False)
class CallTap:
    """Call `visit(args, kwargs)` when `module` is called; reads only."""

    module: nn.Module
    visit: Callable[[tuple[Any, ...], dict[str, Any]], None]


@dataclass(frozen=True, eq=False)
class OutputTap:
    """Call `visit(args, output)` when `module` returns; a returned value replaces the whole output."""

    module: nn.Module
    visit: Callable[[tuple[Any, ...], Any], Any]


@contextmanager
def tapped(taps: Sequence[Tap | OutputTap], calls: Sequence[CallTap] = ()) -> Iterator[None]:
    """Install taps; remove them on success, exception and ctrl-C."""
    # One hook per tensor: PyTorch runs several in the order of their registration, and taps have an order of their own.
    grouped: dict[tuple[int, str], list[Tap]] = {}
    for tap in taps:
        if isinstance(tap, Tap):
            grouped.setdefault((id(tap.module), tap.side), []).append(tap)
    handles = []
    try:
        for same in grouped.values():
            handles.append(_register(same[0].module, same[0].side, [tap.visit for tap in same]))
        # Registered after the taps, so that they see the call with the taps' edits.
        for call in calls:
            handles.append(call.module.register_forward_pre_hook(_on_call(call), with_kwargs=True))
        for whole in taps:
            if isinstance(whole, OutputTap):
                handles.append(whole.module.register_forward_hook(_on_return(whole)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_return(tap: OutputTap) -> Callable[..., Any]:
    return lambda _, args, output: tap.visit(args, output)


def _on_call(call: CallTap) -> Callable[..., None]:
    def visit(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call.visit(args, kwargs)

    return visit


def _register(module: nn.Module, side: str, visits: list[Visit]) -> Any:
    which, *path = side.split(".")
    if which == "in":
        on_input = partial(_on_argument, path) if path else _on_input
        return module.register_forward_pre_hook(
            lambda _, args, kwargs: on_input(visits, args, kwargs), with_kwargs=True
        )
    on_output = partial(_on_item, path) if path else _on_output
    return module.register_forward_hook(lambda _, __, output: on_output(visits, output))


def _through(visits: list[Visit], tensor: Tensor) -> Tensor:
    for visit in visits:
        changed = visit(tensor)
        tensor = tensor if changed is None else changed
    return tensor


def _on_input(visits: list[Visit], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The input is the first positional argument, else the first keyword that is a tensor (hidden_states)."""
    if args and isinstance(args[0], Tensor):
        changed = _through(visits, args[0])
        return None if changed is args[0] else ((changed, *args[1:]), kwargs)
    name = next((key for key, value in kwargs.items() if isinstance(value, Tensor)), None)
    if name is None:
        raise InterventionError("this module was called without a tensor input, so its input cannot be read or edited")
    changed = _through(visits, kwargs[name])
    return None if changed is kwargs[name] else (args, {**kwargs, name: changed})


def _on_argument(path: list[str], visits: list[Visit], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One argument, by number or by keyword, or an item of it."""
    within: Any = args if path[0].isdigit() else kwargs
    changed = _changed(within, path, visits, "was called with")
    if changed is within:
        return None
    return (changed, kwargs) if within is args else (args, changed)


def _on_item(path: list[str], visits: list[Visit], output: Any) -> Any:
    changed = _changed(output, path, visits, "returns")
    return None if changed is output else changed


def _changed(value: Any, path: list[str], visits: list[Visit], verb: str) -> Any:
    """The value with the tensor at a path inside it changed; the same object when it was not."""
    if not path:
        if not isinstance(value, Tensor):
            raise InterventionError(f"that item of what this module {verb} is {_described(value)}, not a tensor")
        return _through(visits, value)
    key = _key_of(value, path[0], verb)
    changed = _changed(value[key], path[1:], visits, verb)
    if changed is value[key]:
        return value
    # What the module returned may be kept by others, so it is copied and never changed in place.
    if not isinstance(value, tuple):
        copied = copy(value)
        copied[key] = changed
        return copied
    items = [changed if number == key else item for number, item in enumerate(value)]
    # A named tuple takes its items one by one.
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def _key_of(value: Any, name: str, verb: str) -> Any:
    if isinstance(value, tuple | list) and name.isdigit() and int(name) < len(value):
        return int(name)
    if isinstance(value, Mapping) and name in value:
        return name
    raise InterventionError(f"this module {verb} {_described(value)}, which has no item {name!r}")


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a mapping with keys {', '.join(map(str, value))}" if value else "an empty mapping"
    return f"a {type(value).__name__}{f' of {len(value)}' if isinstance(value, tuple | list) else ''}"


def _on_mapping(visits: list[Visit], output: MutableMapping[str, Any]) -> Any:
    name = next(key for key, value in output.items() if isinstance(value, Tensor))
    changed = _through(visits, output[name])
    if changed is output[name]:
        return None
    copied = copy(output)
    copied[name] = changed
    return copied


def _on_output(visits: list[Visit], output: Any) -> Any:
    """The output is a tensor, a tuple or list whose first item is, or a mapping (a ModelOutput) that holds one."""
    if isinstance(output, Tensor):
        changed = _through(visits, output)
        return None if changed is output else changed
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        changed = _through(visits, output[0])
        if changed is output[0]:
            return None
        rest = (changed, *output[1:])
        return list(rest) if isinstance(output, list) else rest
    if isinstance(output, MutableMapping) and any(isinstance(value, Tensor) for value in output.values()):
        return _on_mapping(visits, output)
    raise InterventionError(
        f"this module returns {_described(output)} with no tensor first; name the item, module:<path>|out.1 or "
        "|out.<name>"
    )
