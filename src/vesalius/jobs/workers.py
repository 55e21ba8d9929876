"""Workers: pieces of work on several threads, each of them single-threaded inside unless told otherwise.

Threads of our own instead of PyTorch's: a piece stays in one core's cache from product to product, nobody waits between
products, and results don't depend on how many threads there are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """Maps functions over pieces of work, in order. Use in a `with` block.

    n: threads; default as many as PyTorch uses. On one thread, and on other devices than the CPU, no thread is started
    and PyTorch's own setting is left alone. inside: threads of PyTorch's that each of them uses.
    """

    def __init__(self, n: int | None = None, device: torch.device | None = None, inside: int = 1) -> None:
        on_cpu = device is None or device.type == "cpu"
        self.n = (n or torch.get_num_threads()) if on_cpu else 1
        self._inside = inside
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self.n > 1:
            before = torch.get_num_threads()
            barrier = threading.Barrier(self.n + 1)
            self._pool = ThreadPoolExecutor(self.n, "vesalius", partial(_begin, self._inside), (barrier,))
            for _ in range(self.n):
                self._pool.submit(lambda: None)
            barrier.wait()
            # The number is kept per thread, but setting it in one also sets what new threads start with.
            torch.set_num_threads(before)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def map(self, fn: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """The results, in the order of the items. Raises the first exception of an item."""
        return list(self.each(fn, items))

    def each(self, fn: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """The results, in the order of the items, each when it is there."""
        if self._pool is None:
            yield from map(fn, items)
            return
        for future in [self._pool.submit(fn, item) for item in items]:
            yield future.result()


def _begin(threads: int, barrier: threading.Barrier) -> None:
    torch.set_num_threads(threads)
    torch.get_num_threads()  # makes PyTorch take note of this thread's number before others set theirs
    barrier.wait()
