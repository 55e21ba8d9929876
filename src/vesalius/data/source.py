"""Source: shuffled rows of activations, from a store on disk, from a model as it runs, or from tensors in memory.

A row is one token: one vector per site. Whatever is fitted to rows (dictionaries, probes) takes a Source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import count
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vesalius.errors import InputError, NotFiniteError
from vesalius.seeds import generator_for
from vesalius.site import Site

Rows = tuple[Float[Tensor, "batch _"], ...]
"""One tensor [batch, width] per site; row i of each is the same token."""


@runtime_checkable
class Source(Protocol):
    """Rows to train on. The same seed gives the same batches, so that an interrupted run goes on exactly."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """In the order of the tensors of a batch."""
        ...

    @property
    def widths(self) -> tuple[int, ...]:
        """Length of a row at each site."""
        ...

    @property
    def n_rows(self) -> int | None:
        """Rows of one epoch; None for a stream of unknown length."""
        ...

    @property
    def content_hash(self) -> str:
        """Of everything that the batches of a seed depend on."""
        ...

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Rows]:
        """Endless batches, every epoch in a new order; float32 unless the source was made with another dtype.

        Every batch is full: one that reaches past the end of an epoch goes on with the next. start: batches to skip;
        the next one is that which would have followed them. Raises InputError for a batch_size under 1, and
        for a seed or start under 0.
        """
        ...

    def sample(self, n: int, *, seed: int) -> Rows:
        """n different rows at random, for statistics; fewer when there are fewer. Raises InputError for n under 1."""
        ...


class TensorSource:
    """A Source of plain tensors in memory: x, or (x, y) and so on, [n, width] each, row i of each the same token.

    sites: names for the tensors; by default module:tensor0|out and so on, which no model has. dtype: of the batches.

    Raises InputError for shapes or dtypes that don't fit, NotFiniteError for NaN and infinity.
    """

    def __init__(
        self, *tensors: Float[Tensor, "n _"], sites: Sequence[Site | str] = (), dtype: torch.dtype = torch.float32
    ) -> None:
        _check_tensors(tensors)
        named = tuple(Site.parse(site) for site in sites) or _unnamed(len(tensors))
        if len(named) != len(tensors):
            raise InputError(f"{len(named)} sites were given for {len(tensors)} tensors; give one each, or none")
        self._tensors, self._sites, self._dtype = tuple(t.detach() for t in tensors), named, dtype

    @property
    def sites(self) -> tuple[Site, ...]:
        return self._sites

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(tensor.shape[1] for tensor in self._tensors)

    @property
    def n_rows(self) -> int:
        return self._tensors[0].shape[0]

    @cached_property
    def content_hash(self) -> str:
        """sha256 of the values, their shapes and dtypes, the sites, and the dtype of the batches."""
        digest = hashlib.sha256(str(self._dtype).encode())
        for site, tensor in zip(self._sites, self._tensors, strict=True):
            digest.update(f"{site}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Rows]:
        """As `Source.batches`."""
        check_batches(batch_size, seed, start)
        orders = _endless(self.n_rows, seed, start * batch_size)
        return rebatched(((self._tensors, order) for order in orders), batch_size, self._dtype)

    def sample(self, n: int, *, seed: int) -> Rows:
        """As `Source.sample`."""
        check_sample(n, seed)
        index = torch.randperm(self.n_rows, generator=generator_for("sample", seed))[:n].to(self._tensors[0].device)
        return tuple(tensor[index].to(self._dtype) for tensor in self._tensors)


def as_source(given: Any) -> Source:
    """A Source as it is; a tensor [n, width], or a tuple or list of such, as a TensorSource.

    Raises InputError for anything else, and as `TensorSource`.
    """
    # Not isinstance: that would look every property up, and hash what may be gigabytes.
    if all(callable(getattr(given, name, None)) for name in ("batches", "sample")):
        return given
    if isinstance(given, Tensor):
        return TensorSource(given)
    if isinstance(given, tuple | list) and given and all(isinstance(item, Tensor) for item in given):
        return TensorSource(*given)
    raise InputError(
        f"activations must be a store, a stream, a tensor [n, width] or a tuple of such tensors; got "
        f"{type(given).__name__}"
    )


def rebatched(
    pools: Iterator[tuple[Rows, Int[Tensor, " batch"]]], batch_size: int, dtype: torch.dtype
) -> Iterator[Rows]:
    """Full batches out of pools of rows, each pool with the order in which its rows come; no row is left out."""
    rest: Rows = ()
    for tensors, row_order in pools:
        order, at = row_order.to(tensors[0].device), 0
        if rest:
            # What was left of the last pool is filled up first, so that every batch is full.
            at = batch_size - len(rest[0])
            rest = tuple(torch.cat([old, new[order[:at]]]) for old, new in zip(rest, tensors, strict=True))
            if len(rest[0]) < batch_size:
                continue
            yield tuple(tensor.to(dtype) for tensor in rest)
        end = at + (len(order) - at) // batch_size * batch_size
        for start in range(at, end, batch_size):
            index = order[start : start + batch_size]
            yield tuple(tensor[index].to(dtype) for tensor in tensors)
        rest = tuple(tensor[order[end:]] for tensor in tensors) if end < len(order) else ()


def check_batches(batch_size: int, seed: int, start: int) -> None:
    """Raise InputError when these cannot be arguments of `batches`."""
    _check_whole("batch_size", batch_size, 1)
    _check_whole("seed", seed, 0)
    _check_whole("start", start, 0)


def check_sample(n: int, seed: int) -> None:
    """Raise InputError when these cannot be arguments of `sample`."""
    _check_whole("n", n, 1)
    _check_whole("seed", seed, 0)


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number, at least {least}; got {value!r}")


def _check_tensors(tensors: Sequence[Tensor]) -> None:
    if not tensors:
        raise InputError("no tensors: give at least one, [n, width]")
    for number, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor) or tensor.ndim != 2 or not tensor.is_floating_point() or not tensor.numel():
            given = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(f"tensor {number} must hold floating-point rows [n, width], at least one; got {given}")
        if len(tensor) != len(tensors[0]):
            raise InputError(
                f"tensor {number} has {len(tensor)} rows and tensor 0 has {len(tensors[0])}; row i of each must be "
                "the same token"
            )
        bad = ~torch.isfinite(tensor).all(1)
        if bool(bad.any()):
            raise NotFiniteError(f"tensor {number} holds NaN or infinity, first in row {int(bad.nonzero()[0])}")


def _unnamed(n: int) -> tuple[Site, ...]:
    return tuple(Site("module", module=f"tensor{number}") for number in range(n))


def _endless(n: int, seed: int, skip: int) -> Iterator[Tensor]:
    """The order of every epoch, less the first `skip` rows of all."""
    first, at = divmod(skip, n)
    for epoch in count(first):
        yield torch.randperm(n, generator=generator_for("epoch", seed, epoch))[at if epoch == first else 0 :]
