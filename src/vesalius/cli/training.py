"""`vesalius train`: a sparse dictionary from harvested activations."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vesalius as vs
from vesalius.cli.screen import Screen, bars, say
from vesalius.jobs import Sink, silent


@dataclass(frozen=True)
class Request:
    """What was asked on the command line. fields: of TrainConfig; None is the default."""

    store: Path
    out: Path
    device: str
    fields: Mapping[str, Any]

    @property
    def config(self) -> vs.TrainConfig:
        """Raises InputError for values out of range, before the store is opened."""
        return vs.TrainConfig(**{name: value for name, value in self.fields.items() if value is not None})


def train(request: Request) -> None:
    """Train with a progress bar, and say what came out."""
    config = request.config
    store = vs.data.ActivationStore.open(request.store)
    with _process_group(request.device), bars() as progress:
        leads = os.environ.get("RANK", "0") == "0"
        sink: Sink = Screen(progress) if leads else silent
        coder = vs.dictionaries.train(store, config, request.out, device=request.device, sink=sink)
    if leads:
        for line in told(coder):
            say(line)
        say(str(request.out))


def told(coder: Any) -> list[str]:
    """What was trained and how well, line by line."""
    ends = coder.history.last()
    figures = f"fvu {ends['fvu']:.4f}, l0 {ends['l0']:.1f}, dead {ends['dead']:.1%}"
    return [repr(coder), f"{len(coder.history):,} steps; over the last 50 of them {figures}"]


@contextmanager
def _process_group(device: str) -> Iterator[None]:
    """The processes that torchrun started, when it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    # Late and at this one edge: other commands, such as `ledger`, start without torch.
    import torch.distributed

    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
