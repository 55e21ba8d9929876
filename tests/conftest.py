"""Shapes in signatures are checked here, in the test run only and in every room; users pay nothing for them."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from typing import Any

import beartype
import jaxtyping
import pytest
import torch

# What users hand over is checked by these, in words of our own that are tested.
CHECK_THEMSELVES = {"Dictionary", "Pairs", "Raw", "Tokens", "TensorSource", "_checked", "logistic", "mean_difference"}


def holds_shape(hint: Any) -> bool:
    """Whether a type hint says something about the shape of a tensor."""
    if isinstance(hint, str):
        return any(f"{kind}[" in hint for kind in ("Float", "Int", "Bool"))
    return any(map(holds_shape, typing.get_args(hint))) or hasattr(hint, "dim_str")


def shapes_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, of the hints that hold shapes: what else is wrong gets our own messages, which are tested as such."""
    own = function.__qualname__.split(".")[0] in CHECK_THEMSELVES
    hints = {} if own else {name: hint for name, hint in function.__annotations__.items() if holds_shape(hint)}
    function.__annotations__ = hints
    return beartype.beartype(function) if hints else function


def only_with_shapes(checked: Any) -> Any:
    """jaxtyping's decorator, kept from what holds no shapes: a call through it costs more than most functions do."""

    def with_typechecker(*args: Any, **kwargs: Any) -> Any:
        decorator = checked(*args, **kwargs)

        def decorate(given: Any) -> Any:
            function = getattr(given, "__init__" if isinstance(given, type) else "__func__", given)
            function = getattr(function, "fget", function)
            hints = getattr(function, "__annotations__", {})
            return decorator(given) if any(map(holds_shape, hints.values())) else given

        return decorate

    return with_typechecker


# Before any test module imports vesalius: a module that is already loaded is not checked.
jaxtyping.install_import_hook("vesalius", "conftest.shapes_only")
jaxtyping.jaxtyped = only_with_shapes(jaxtyping.jaxtyped)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pretend", action="store_true", help="put every model on the device of pretend_device.py")


@pytest.fixture(scope="session", autouse=True)
def on_the_pretend_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --pretend every model lives on the pretend device, so that whole suites can be run there."""
    if not request.config.getoption("--pretend"):
        yield
        return
    import pretend_device
    import vesalius as vs

    plain = vs.Model.__init__

    def moved(self: vs.Model, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        plain(self, pretend_device.onto(module), *args, **kwargs)

    vs.Model.__init__ = moved  # type: ignore[method-assign]
    yield
    vs.Model.__init__ = plain  # type: ignore[method-assign]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are slower on two threads than on one, and numbers must not depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def demo() -> Any:
    """The packaged SmolLM2, loaded once."""
    import vesalius as vs

    return vs.load("smollm2-135m-instruct")
