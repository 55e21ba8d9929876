"""On another device than the CPU every entry point works, and gives the CPU's numbers: shown on the pretend device.

What is wrong there would stop on CUDA with "Expected all tensors to be on the same device".
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import pretend_device
import tiny
import vesalius as vs
from entries import ENTRIES, ON_THE_CPU, ROUNDED, on_the_cpu
from pretend_device import onto
from vesalius.patching.plain import ROUNDING, rounding


@pytest.fixture(scope="module", autouse=True)
def a_second_device() -> Iterator[None]:
    pretend_device.device()
    yield


BACKWARD = ("attribution", "lenses", "overlooked", "input attribution")


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry not in BACKWARD])
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_what_takes_a_model_works_on_another_device_and_gives_the_cpus_numbers(family: str, entry: str) -> None:
    compare(family, entry)


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_so_does_what_takes_gradients(family: str) -> None:
    """In a process of its own, because the first backward pass of a process fixes which devices there are. It ends at
    once when all is compared: the engine's thread for the pretend device does not always survive the end of Python."""
    pairs = [(family, entry) for entry in BACKWARD]
    code = f"import conftest, os, test_devices; [test_devices.compare(*one) for one in {pairs!r}]; os._exit(0)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)


def compare(family: str, entry: str) -> None:
    """What an entry point finds on the pretend device, with what it finds on the CPU."""
    pretend_device.device()
    expected = ENTRIES[entry](tiny.model(family))
    found = ENTRIES[entry](vs.Model(onto(tiny.FAMILIES[family]())))
    assert expected.keys() == found.keys()
    for name in expected:
        if entry in ON_THE_CPU:
            assert _device(found[name]) == "cpu", name
        torch.testing.assert_close(
            on_the_cpu(found[name]),
            on_the_cpu(expected[name]),
            rtol=1e-3,
            atol=ROUNDED if name == "rounded" else 1e-5,
            msg=name,
        )


def _device(value: Any) -> str:
    return value.device.type if isinstance(value, Tensor) else "cpu"


MIXED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "add": lambda here, there: here + there,
    "in place": lambda here, there: there.add_(here),
    "where": lambda here, there: torch.where(there > 0, there, here),
    "product": lambda here, there: here @ there,
    "cat": lambda here, there: torch.cat([here, there]),
    "compare": lambda here, there: torch.equal(here, there),
    "a CPU tensor indexed from there": lambda here, there: here[there.long()],
    "written from here": lambda here, there: there.__setitem__(torch.tensor([0, 1]), here[:2]),
    "a draw by a generator of the CPU": lambda _, there: torch.randn_like(there).normal_(generator=torch.Generator()),
}


@pytest.mark.parametrize("what", MIXED)
def test_the_pretend_device_raises_where_cuda_does(what: str) -> None:
    here, there = torch.ones(3), torch.ones(3, device=pretend_device.device())
    with pytest.raises(RuntimeError, match=r"same device|generator"):
        MIXED[what](here, there)
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()


def test_the_pretend_device_allows_what_cuda_allows() -> None:
    there = torch.arange(3.0, device=pretend_device.device())
    assert (there + torch.tensor(1.0)).tolist() == [1, 2, 3]
    assert there[torch.tensor([2, 0])].tolist() == [2, 0]
    assert int(there[1]) == 1
    assert there.cpu().numpy().tolist() == [0, 1, 2]
    assert torch.ones(3).to(there).device == there.device


def test_prompts_that_lie_elsewhere_are_brought_to_the_cpu_where_runs_are_planned() -> None:
    plain, where = tiny.pairs(), pretend_device.device()
    names = ("clean", "corrupted", "answer", "distractor", "lengths")
    moved = vs.Pairs(**{name: getattr(plain, name).to(where) for name in names})
    assert moved.content_hash == plain.content_hash
    model = vs.Model(onto(tiny.llama()))
    tokens = vs.Tokens(plain.clean.to(where), plain.real.to(where))
    assert tokens.ids.device.type == "cpu"
    assert model.run(tokens).logits.device == where
    found = [vs.sweep(model, pairs, sites="layers.1.mlp_out", sink=lambda _: None).values for pairs in (plain, moved)]
    assert torch.equal(*found)


def test_the_self_check_knows_that_a_gpu_rounds_products() -> None:
    here: Any = SimpleNamespace(model=tiny.model("llama"))
    there: Any = SimpleNamespace(model=SimpleNamespace(device=torch.device("cuda"), module=here.model.module))
    assert rounding(here) == rounding(there) == ROUNDING
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert rounding(here) == ROUNDING
        assert rounding(there) == 8 * 2**-10
    finally:
        torch.set_float32_matmul_precision(before)
