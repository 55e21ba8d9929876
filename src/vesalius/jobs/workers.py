"""Workers: pieces of work on several threads, in each of which PyTorch uses one thread (or `inside` of them).

Threads of our own instead of PyTorch's: a piece stays in one core's cache from product to product, no thread waits
between products, and results do not depend on the number of threads.
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

    n: threads; default as many as PyTorch uses. With one thread, or on a device other than the CPU, none is started
    and PyTorch's setting stays as it is. inside: threads that PyTorch uses in each of them.
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
            # PyTorch keeps the number per thread, but setting it in one thread also sets what new threads start with.
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
    # Reading the number fixes it for this thread, before the others set theirs.
    torch.get_num_threads()
    barrier.wait()
