"""The only place that registers hooks.

A `Tap` names a tensor (module, input or output) and a function of it; a `CallTap` sees a module's whole call, an
`OutputTap` its arguments and whole output. `tapped` installs them for the length of a `with` block and always removes
them. Several taps on one tensor share one hook and run in the order given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vesalius.errors import InterventionError

Visit = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True, eq=False)
class Tap:
    """Call `visit(tensor)` when `module` has its input or output; a returned tensor replaces it."""

    module: nn.Module
    side: str
    visit: Visit


@dataclass(frozen=True, eq=False)
class CallTap:
    """Call `visit(args, kwargs)` when `module` is called; changes nothing."""

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
    grouped: dict[tuple[int, str], list[Tap]] = {}
    for tap in taps:
        if isinstance(tap, Tap):
            grouped.setdefault((id(tap.module), tap.side), []).append(tap)
    handles = []
    try:
        for same in grouped.values():
            handles.append(_register(same[0].module, same[0].side, [tap.visit for tap in same]))
        # After the taps, so that they see the call as it is made.
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
    if side == "in":
        return module.register_forward_pre_hook(
            lambda _, args, kwargs: _on_input(visits, args, kwargs), with_kwargs=True
        )
    return module.register_forward_hook(lambda _, __, output: _on_output(visits, output))


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


def _on_named(visits: list[Visit], output: MutableMapping[str, Any]) -> Any:
    name = next(key for key, value in output.items() if isinstance(value, Tensor))
    changed = _through(visits, output[name])
    if changed is output[name]:
        return None
    made = copy(output)
    made[name] = changed
    return made


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
        return _on_named(visits, output)
    raise InterventionError(
        f"this module returns {type(output).__name__}, not a tensor; its output cannot be read or edited"
    )
