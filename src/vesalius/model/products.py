"""Matrix products of edited runs: the same float32 arithmetic by the faster library, or bfloat16 on request.

PyTorch carries two libraries for float32 products on x86 and always takes MKL, which leaves AVX-512 unused on
processors that are not Intel's. The other, oneDNN, rounds alike (both sum in float32) and is more than twice as fast
there. Its bfloat16 products gain a fifth when a weight was laid out for it beforehand, and causal attention in bfloat16
takes half the time in blocks of queries. No module is changed: a mode acts on the calls inside a `with` block.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vesalius.errors import UnknownNameError

T = TypeVar("T")
COMPUTE = ("float32", "bfloat16")
VARIABLE = "VESALIUS_PRODUCTS"
"""Environment variable: `mkl` or `onednn` instead of what the processor's name says."""
_LIBRARIES = ("mkl", "onednn")
_LINEAR = torch.nn.functional.linear
_ATTENTION = torch.nn.functional.scaled_dot_product_attention
# Below this many rows oneDNN's preparations cost more than they save.
_FEWEST_ROWS = 8
_QUERIES = 64


@cache
def library() -> str:
    """`onednn` or `mkl`: by the processor, never by the clock, so that the same machine gives the same digits.

    Raises UnknownNameError for another word in the environment variable.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted and wanted not in _LIBRARIES:
        raise UnknownNameError(f"library in {VARIABLE}", wanted, _LIBRARIES)
    if wanted:
        return wanted
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
    return "onednn" if wide and "GenuineIntel" not in _vendor() else "mkl"


def _vendor() -> str:
    try:
        return next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("vendor_id"))
    except (OSError, StopIteration):
        # On other systems platform.processor() says "AMD64 Family ...". Unknown counts as Intel: then nothing changes.
        return "AuthenticAMD" if "AMD" in platform.processor() else "GenuineIntel"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [*any, in] times weight [out, in] transposed, plus bias, without a graph; float32 by `library()`."""
    if _suits(x, weight, bias):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return _LINEAR(x, weight, bias)


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    given = [t for t in (x, weight, bias) if t is not None]
    plain = all(t.dtype == torch.float32 and t.device.type == "cpu" and _bare(t) for t in given)
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    enough = x.ndim > 0 and x.numel() >= _FEWEST_ROWS * x.shape[-1]
    return plain and enough and not graph and not torch.is_autocast_enabled("cpu") and library() == "onednn"


def _bare(tensor: Tensor) -> bool:
    """Whether a tensor is its numbers; one of a kind of its own (torchao's quantised weights) multiplies itself."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


@contextmanager
def computing(compute: str = "float32") -> Iterator[None]:
    """Linear layers called inside a `with` block compute in float32, or in bfloat16: factors rounded, float32 results.

    Raises UnknownNameError for another word.
    """
    if compute not in COMPUTE:
        raise UnknownNameError("compute", compute, COMPUTE)
    if compute == "float32" and library() == "mkl":
        yield
        return
    with _Linears(compute):
        yield


class _Linears(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
    """Stands in for `linear` and `addmm` (GPT-2's Conv1D) where it computes the same and no graph is wanted."""

    def __init__(self, compute: str) -> None:
        super().__init__()
        self._rounds = compute == "bfloat16"
        self._rounded: _PerWeight[Tensor] = _PerWeight()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # Every call of PyTorch in the block passes here, so nothing is allocated for those that are left alone.
        if func is _LINEAR and not kwargs:
            return self._linear(*args)
        if func is torch.addmm and not kwargs and args[0].ndim == 1:
            return self._linear(args[1], args[2].t(), args[0])
        return func(*args, **kwargs) if kwargs else func(*args)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self._rounds or x.dtype != torch.float32 or not _bare(weight) or torch.is_grad_enabled():
            return linear(x, weight, bias)
        product = _LINEAR(x.bfloat16(), self._rounded.of(weight, Tensor.bfloat16)).float()
        return product if bias is None else product + bias


class _PerWeight(Generic[T]):
    """Something computed once for each weight, and again when the weight has changed."""

    def __init__(self) -> None:
        # The weight is kept as well: while it lives, no other tensor can get its address.
        self._cache: dict[int, tuple[Tensor, int, T]] = {}

    def of(self, weight: Tensor, compute: Callable[[Tensor], T]) -> T:
        known = self._cache.get(weight.data_ptr())
        # PyTorch counts in-place changes of a tensor in _version.
        if known is None or known[0].shape != weight.shape or known[1] != weight._version:
            known = self._cache[weight.data_ptr()] = weight, weight._version, compute(weight.detach())
        return known[2]


@cache
def _short_supported() -> bool:
    """Whether oneDNN can lay out bfloat16 weights on this processor; without AVX-512 it cannot, asked for or not."""
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(asked()) if asked is not None else torch.backends.cpu.get_cpu_capability() == "AVX512"


class Half:
    """A bfloat16 weight [out, in]; where that pays it is laid out once, for products of about this many rows."""

    def __init__(self, weight: Tensor, rows: int) -> None:
        self._laid_out = weight.device.type == "cpu" and library() == "onednn" and _short_supported()
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows) if self._laid_out else weight

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [*any, in], bfloat16 like the bias, times the weight transposed, plus the bias; without a graph."""
        if not self._laid_out:
            return _LINEAR(x, self._weight, bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, bias, "none", [], "")
        return product


class Halves(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
    """A mode in which bfloat16 modules run faster, without a graph; one instance can be entered many times.

    Weights are laid out for the product once and kept; causal attention goes by blocks of queries and skips the keys
    behind each block. Rounding differs from that of PyTorch's kernels no more than theirs do from each other. Does
    nothing where `library()` is mkl, since those processors have instructions for bfloat16.
    """

    def __init__(self) -> None:
        super().__init__()
        self._laid_out: _PerWeight[Half] = _PerWeight()
        self._acts = library() == "onednn"

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self._acts and func is _LINEAR and not kwargs and _short(*args):
            x, weight, *bias = args
            return self._laid_out.of(weight, partial(Half, rows=x.numel() // x.shape[-1])).linear(x, *bias)
        if self._acts and func is _ATTENTION and len(args) == 3 and _short(*args) and _causal(args, kwargs or {}):
            q, k, v = args
            return by_blocks(q, k, v, (kwargs or {}).get("scale"))
        return func(*args, **kwargs) if kwargs else func(*args)


def _short(*tensors: Tensor | None) -> bool:
    """Whether all are bfloat16 on the cpu, and no graph is wanted."""
    return not torch.is_grad_enabled() and all(
        t is None or (t.dtype == torch.bfloat16 and t.device.type == "cpu" and _bare(t)) for t in tensors
    )


def _causal(tensors: Sequence[Tensor], options: Mapping[str, Any]) -> bool:
    q, k, v = tensors
    plain = options.get("attn_mask") is None and not options.get("dropout_p") and q.ndim == k.ndim == v.ndim == 4
    grouped = options.get("enable_gqa") or q.shape[1] == k.shape[1]
    return bool(plain and options.get("is_causal") and grouped and q.shape[2:] == k.shape[2:] == v.shape[2:])


def by_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention, softmax(q k^T scale) v, in blocks of queries.

    q: [batch, head, pos, d_head]; k, v: the same, or with fewer heads (grouped-query attention). scale: default
    1 / sqrt(d_head).
    """
    k, v = (t if t.shape[1] == q.shape[1] else t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    n, block = q.shape[2], max(_QUERIES, q.shape[2] // 8)
    # Laid out as [batch, pos, head, d_head], so that models which join the heads next need no copy.
    values = q.new_empty(q.shape[0], n, *q.shape[1::2]).transpose(1, 2)
    later = torch.full((block, block), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    q = q.contiguous() * (q.shape[3] ** -0.5 if scale is None else scale)
    k, v = k.contiguous().transpose(2, 3), v.contiguous()
    for start in range(0, n, block):
        end = min(start + block, n)
        scores = q[:, :, start:end] @ k[..., :end]
        scores[..., start:] += later[: end - start, : end - start]
        values[:, :, start:end] = scores.softmax(-1) @ v[:, :, :end]
    return values
