"""Runs that start in the middle: modules that were called before a place stand in with what they returned.

Of any module whose calls come in the same order for every input. The largest modules that are over before the place are
not run again at all; what is between them (sums, reshapes) is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vesalius.errors import InputError
from vesalius.model.hooks import CallTap, OutputTap, tapped


@dataclass(frozen=True, eq=False)
class Resumable:
    """A recorded run up to a place. outputs: module -> what its calls before the place returned, in order; calls inside
    of a larger one that stands in have none. What nothing after the place reads is NaN that takes no memory. tensor:
    what the place, a module, returned. result: what the whole run returned."""

    outputs: Mapping[nn.Module, tuple[Any, ...]]
    place: nn.Module
    tensor: Tensor
    result: Any

    def taken(self, rows: Tensor) -> Resumable:
        """The same of some of the examples."""
        size = len(self.tensor)

        def some(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != size:
                return value
            return _nothing_like(value[:1].expand(len(rows), *value.shape[1:])) if _is_nothing(value) else value[rows]

        outputs = {module: tuple(map(some, given)) for module, given in self.outputs.items()}
        return Resumable(outputs, self.place, self.tensor[rows], None)

    @contextmanager
    def standing_in(self, edited: Tensor) -> Iterator[None]:
        """While it lasts, calls of the network start at the place, which returns `edited`; one call at a time."""
        changed = []
        try:
            for module, outputs in self.outputs.items():
                given = (*outputs, edited) if module is self.place else outputs
                if "forward" in module.__dict__:
                    raise InputError(f"{type(module).__name__} has its forward replaced already")
                module.forward = _Standing(module.forward, given)
                changed.append(module)
            yield
        finally:
            for module in changed:
                del module.forward


class _Standing:
    """A module's forward whose first calls return what is given."""

    def __init__(self, forward: Callable[..., Any], given: tuple[Any, ...]) -> None:
        self._forward, self._given, self._calls = forward, given, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._calls += 1
        if self._calls <= len(self._given):
            return _copied(self._given[self._calls - 1])
        return self._forward(*args, **kwargs)


@dataclass(eq=False)
class _Call:
    module: nn.Module
    parent: _Call | None
    output: Any = None
    over: bool = False
    inner: list[_Call] = field(default_factory=list)


def record_to(network: nn.Module, place: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Resumable:
    """Run once, and keep what is needed to start at a module's output.

    Raises InputError for a module that is called more than once, or not at all, or returns no tensor.
    """
    stack: list[_Call] = []
    before: list[_Call] = []
    there: list[_Call] = []

    def enter(module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        call = _Call(module, stack[-1] if stack else None)
        if call.parent is not None:
            call.parent.inner.append(call)
        stack.append(call)
        if not there:
            before.append(call)

    def leave(module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        call = stack.pop()
        # A copy: the network may go on in place. What was returned inside of it is of no use any more.
        call.output, call.over = None if there else _copied(output), True
        for inner in [] if there else call.inner:
            inner.output = None
        if module is place:
            there.append(call)

    modules = list(network.modules())
    taps = [OutputTap(module, partial(leave, module)) for module in modules]
    calls = [CallTap(module, partial(enter, module)) for module in modules]
    over_then: list[_Call] = []

    def mark(_args: tuple[Any, ...], _output: Any) -> None:
        over_then[:] = [call for call in before if call.over]

    with torch.no_grad(), tapped([*taps, OutputTap(place, mark)], calls):
        result = network(*args, **kwargs)
    if len(there) != 1 or not isinstance(there[0].output, Tensor):
        raise InputError(
            f"the {type(place).__name__} is called {len(there)} times in a run; a run starts at a module that is "
            "called once and returns a tensor: name the module around it"
        )
    whole = Resumable(_standing(over_then, place), place, there[0].output, result)
    if not _gives(whole, network, args, kwargs):
        raise InputError(f"runs of this network that start at a {type(place).__name__} do not give what whole ones do")
    return _thinned(whole, network, args, kwargs)


def _thinned(whole: Resumable, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Resumable:
    """Without what nothing after the place reads: all that was recorded, or else one output after the other."""
    nothing = {module: tuple(map(_nothing_like, given)) for module, given in whole.outputs.items()}
    found = replace(whole, outputs=nothing)
    if _gives(found, network, args, kwargs):
        return found
    found = whole
    for module in whole.outputs:
        tried = replace(found, outputs={**found.outputs, module: nothing[module]})
        found = tried if _gives(tried, network, args, kwargs) else found
    return found


def _gives(tried: Resumable, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a run that starts there gives what the whole run gave."""
    with torch.no_grad(), tried.standing_in(tried.tensor.clone()):
        found = network(*args, **kwargs)
    return all(torch.equal(*both) for both in zip(_tensors(found), _tensors(tried.result), strict=True))


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and any(value.stride()) else value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _nothing_like(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return torch.full((), float("nan"), dtype=value.dtype, device=value.device).expand(value.shape)


def _is_nothing(value: Tensor) -> bool:
    return value.is_floating_point() and not any(value.stride()) and bool(value.flatten()[:1].isnan().all())


def _standing(over: list[_Call], place: nn.Module) -> dict[nn.Module, tuple[Any, ...]]:
    """The largest calls that are over; of each module all of its calls must be among them, or inside of them."""
    ended = set(map(id, over))
    largest = [call for call in over if call.parent is None or id(call.parent) not in ended]
    found: dict[nn.Module, tuple[Any, ...]] = {}
    for call in largest:
        found[call.module] = (*found.get(call.module, ()), *([] if call.module is place else [call.output]))
    inside = Counter(call.module for call in over if call not in largest)
    mixed = [module for module in found if inside[module]]
    if mixed:
        raise InputError(
            f"a {type(mixed[0]).__name__} is called by itself and inside of another module before the place; a run "
            "cannot start there"
        )
    return found
