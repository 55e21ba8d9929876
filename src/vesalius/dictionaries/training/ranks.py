"""Ranks: the processes that train one dictionary together, each on its share of every batch (torchrun).

One process is a group of one, for which nothing is sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """Number of this process, and of all of them."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """The group that `torch.distributed.init_process_group` made, or this process alone."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return cls()

    @property
    def leads(self) -> bool:
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

    def kth_largest(self, values: Tensor, k: int) -> Tensor:
        """[]: the k-th largest of the values of all processes; the smallest when there are fewer, -inf without any."""
        everyone = self._gathered(values, k)
        if not len(everyone):
            return values.new_tensor(-torch.inf)
        return everyone.kthvalue(max(1, len(everyone) - k + 1)).values

    def _gathered(self, values: Tensor, k: int) -> Tensor:
        if self.size == 1:
            return values
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
