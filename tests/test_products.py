"""Products of edited runs are float32's, by whichever library; bfloat16 only where it was asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import tiny
from vesalius.errors import UnknownNameError
from vesalius.model import products

SIZES = [(1, 16, 3), (9, 48, 80), (33, 80, 48), (200, 576, 192)]


@pytest.fixture(params=["mkl", "onednn"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(products.VARIABLE, request.param)
    products.library.cache_clear()
    yield request.param
    products.library.cache_clear()


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((found.double() - exact).norm() / exact.norm()).detach())


@pytest.mark.parametrize("rows, width, out", SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_right_to_float32_rounding(library: str, rows: int, width: int, out: int, bias: bool) -> None:
    torch.manual_seed(rows)
    layer, x = nn.Linear(width, out, bias=bias), torch.randn(2, rows, width)
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    with torch.no_grad(), products.computing():
        inside = layer(x)
    assert inside.dtype == torch.float32
    assert error(inside, exact) < 1e-6
    assert torch.equal(inside, products.linear(x, layer.weight.detach(), layer.bias.detach() if bias else None))


def test_gpt2_s_transposed_layer_is_right_too(library: str) -> None:
    torch.manual_seed(0)
    layer, x = Conv1D(80, 48), torch.randn(3, 20, 48)
    exact = x.double() @ layer.weight.double() + layer.bias.double()
    with torch.no_grad(), products.computing():
        assert error(layer(x), exact) < 1e-6
    with torch.no_grad(), products.computing("bfloat16"):
        assert 1e-6 < error(layer(x), exact) < 2e-2


def test_the_other_library_is_really_taken(library: str) -> None:
    layer, x = nn.Linear(576, 192), torch.randn(200, 576)
    with torch.no_grad(), torch.profiler.profile() as seen, products.computing():
        layer(x)
    called = {event.key for event in seen.key_averages()}
    assert ("mkldnn::_linear_pointwise" in called) == (library == "onednn")


def test_bfloat16_rounds_and_only_inside() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 80), torch.randn(30, 48)
    with torch.no_grad():
        before = layer(x)
        with products.computing("bfloat16"):
            inside = layer(x)
            assert torch.equal(layer(x), inside)
        assert torch.equal(layer(x), before)
    assert inside.dtype == torch.float32
    assert 1e-4 < error(inside, before.double()) < 2e-2


def test_gradients_and_other_dtypes_are_left_alone(library: str) -> None:
    layer, x = nn.Linear(48, 80), torch.randn(30, 48, requires_grad=True)
    for compute in products.COMPUTE:
        with products.computing(compute):
            (gradient,) = torch.autograd.grad(layer(x).sum(), [x])
        assert torch.allclose(gradient, layer.weight.sum(0).expand_as(x), atol=1e-6)
        wide = nn.Linear(48, 80).double()
        with torch.no_grad(), products.computing(compute):
            assert torch.equal(wide(x.double()), nn.functional.linear(x.double(), wide.weight, wide.bias))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), products.computing():
        assert layer(x).dtype == torch.bfloat16


def test_two_weights_at_one_address_are_not_mixed_up() -> None:
    x = torch.randn(30, 48)
    with torch.no_grad(), products.computing("bfloat16"):
        for seed in range(5):
            torch.manual_seed(seed)
            weight = torch.randn(80, 48)
            assert error(nn.functional.linear(x, weight), x.double() @ weight.double().T) < 2e-2


def test_unknown_words_are_refused_with_the_known(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="'float8'; known: bfloat16, float32"), products.computing("float8"):
        pass
    monkeypatch.setenv(products.VARIABLE, "blas")
    products.library.cache_clear()
    with pytest.raises(UnknownNameError, match="known: mkl, onednn"):
        products.library()
    products.library.cache_clear()


def test_the_choice_is_by_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(products.VARIABLE, raising=False)
    for capability, vendor, expected in [
        ("AVX512", "vendor_id : AuthenticAMD", "onednn"),
        ("AVX512", "vendor_id : GenuineIntel", "mkl"),
        ("AVX2", "vendor_id : AuthenticAMD", "mkl"),
    ]:
        products.library.cache_clear()
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda value=capability: value)
        monkeypatch.setattr(products, "_vendor", lambda value=vendor: value)
        assert products.library() == expected
    products.library.cache_clear()


@pytest.mark.parametrize(
    ("n", "kv", "scale"), [(1, 6, None), (64, 2, None), (65, 6, 0.3), (200, 3, None), (1100, 1, None)]
)
def test_attention_by_blocks_is_causal_attention(n: int, kv: int, scale: float | None) -> None:
    drawn = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(2, heads, n, 8, generator=drawn) for heads in (6, kv, kv))
    plain = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    torch.testing.assert_close(products.by_blocks(q, k, v, scale), plain, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_bfloat16_modules_give_what_they_gave(make: Callable[[], nn.Module], library: str) -> None:
    module, ids = make(), torch.arange(2 * 20).view(2, 20) % 50 + 3
    exact = module(ids)[0].detach()
    short = copy.deepcopy(module).bfloat16()
    halves = products.Halves()
    with torch.no_grad():
        plain = short(ids)[0].float()
        with halves:
            found = short(ids)[0].float()
        with halves:  # again, by the weights as they were laid out
            assert torch.equal(short(ids)[0].float(), found)
    error, allowed = (found - exact).abs().max(), (plain - exact).abs().max()
    assert error < 2 * allowed + 1e-4, f"{error} against {allowed}"
    if library == "mkl":
        assert torch.equal(found, plain)


@pytest.mark.usefixtures("library")
def test_graphs_and_other_dtypes_pass_by_untouched() -> None:
    layer, x = torch.nn.Linear(4, 3), torch.randn(2, 4)
    short = torch.nn.Linear(4, 3, dtype=torch.bfloat16)
    with products.Halves() as halves:
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        out = short(x.bfloat16())
    assert out.requires_grad
    assert not halves._laid_out._cache


@pytest.mark.parametrize("rows", [1, 9, 700])
def test_a_laid_out_weight_multiplies_any_number_of_rows(rows: int, library: str) -> None:
    drawn = torch.Generator().manual_seed(rows)
    weight, bias, x = (torch.randn(*shape, generator=drawn).bfloat16() for shape in ((80, 48), (80,), (rows, 48)))
    for given in (None, bias):
        exact = nn.functional.linear(x.float(), weight.float(), None if given is None else given.float())
        torch.testing.assert_close(products.Half(weight, 512).linear(x, given).float(), exact, atol=0.05, rtol=0.01)
        if library == "mkl":
            assert torch.equal(products.Half(weight, 512).linear(x, given), nn.functional.linear(x, weight, given))


@pytest.mark.usefixtures("library")
def test_a_weight_that_was_changed_is_laid_out_anew() -> None:
    layer, x = nn.Linear(48, 32, dtype=torch.bfloat16), torch.randn(9, 48).bfloat16()
    with torch.no_grad(), products.Halves() as halves:
        before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.bias.mul_(2)
    with torch.no_grad(), halves:
        torch.testing.assert_close(layer(x), 2 * before, atol=0.05, rtol=0.02)
