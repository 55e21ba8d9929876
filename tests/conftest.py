"""Shapes in signatures are checked here, in the test run only; users pay nothing for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch

# `inputs` and `intervention` are left out: they check what users hand over themselves, and those messages are tested.
TRUNK = ["activations", "adapters", "attention", "hooks", "metric", "model", "parts", "site", "sweeps", "taps"]

# Before any test module imports vesalius: a module that is already loaded is not checked.
jaxtyping.install_import_hook([f"vesalius.{name}" for name in TRUNK], "beartype.beartype")


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
