"""Run: what stays the same from step to step, the threads and processes that share the work among it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed
from jaxtyping import Float
from torch import Tensor

from vesalius.dictionaries.config import TrainConfig
from vesalius.dictionaries.kinds import Kind
from vesalius.dictionaries.training.layout import Layout
from vesalius.jobs.workers import Workers

CHUNK_ENTRIES = 3 << 20
"""Pre-activations of a chunk of rows: 12 MB, so that those of a few threads stay in cache."""
LATENTS = 512
"""Latents whose weights are updated together."""


@dataclass(frozen=True)
class Processes:
    """The processes that train one dictionary together, each on its share of every batch (torchrun).

    rank: number of this process. size: of all of them; alone, nothing is sent.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Processes:
        """The group that `torch.distributed.init_process_group` made, or this process alone."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return cls()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def share(self, n_rows: int) -> slice:
        """This process's rows of a batch."""
        return slice(n_rows * self.rank // self.size, n_rows * (self.rank + 1) // self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.size > 1 and tensor.device.type == "cpu" and torch.distributed.get_backend() == "nccl":
            # NCCL sends nothing that is not on its device.
            sent = tensor.to("cuda")
            torch.distributed.all_reduce(sent)
            tensor.copy_(sent)
        elif self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is raised in any process."""
        return bool(self.sum(torch.tensor(float(flag))) > 0) if self.size > 1 else flag

    def kth_largest(self, values: Float[Tensor, " value"], k: int) -> Float[Tensor, ""]:
        """The k-th largest of the values of all processes; the smallest when there are fewer, -inf without any."""
        everyone = self._gathered(values, k)
        if not len(everyone):
            return values.new_tensor(-torch.inf)
        return everyone.kthvalue(max(1, len(everyone) - k + 1)).values

    def _gathered(self, values: Tensor, k: int) -> Tensor:
        if self.size == 1:
            return values
        # Processes send equally many, so what one lacks to k is filled up, and left out again.
        mine = values.new_full((k,), -torch.inf)
        best = values.topk(min(k, len(values)), sorted=False).values
        mine[: len(best)] = best
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        torch.distributed.all_gather(everyone, mine)
        joined = torch.cat(everyone)
        return joined[joined > -torch.inf]

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            torch.distributed.barrier()


@dataclass(frozen=True)
class Run:
    """What stays the same from step to step. in_scale, out_scale: one factor per site."""

    layout: Layout
    config: TrainConfig
    kind: Kind
    in_scale: tuple[float, ...]
    out_scale: tuple[float, ...]
    workers: Workers
    processes: Processes
    device: torch.device

    @property
    def chunk_rows(self) -> int:
        """Rows that are encoded together."""
        # A function of the config alone: the numbers must not depend on the machine's cache or threads.
        return max(64, min(1024, CHUNK_ENTRIES // self.config.n_latents))

    def cuts(self, n: int, size: int | None = None) -> list[slice]:
        """Chunks of n rows (or latents, with a size); other devices than the CPU take all at once."""
        # On a GPU one large product is faster than several small ones, and there are no threads to share them.
        size = (size or self.chunk_rows) if self.device.type == "cpu" else max(n, 1)
        return [slice(start, min(start + size, n)) for start in range(0, n, size)]
