"""A program: harvests in a child that is killed again and again, until one gets through.

Arguments: folder with the model, folder for the activations, seed. Two more children then harvest at once into a folder
`two` beside it. Prints how all ended (signal numbers), as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import vesalius as vs
from vesalius.jobs import Event, silent

TEXTS = [f"{number}: the " * (number % 40) + "he said 12" for number in range(160)]
MOST, KILLS = 60, 12


def run(model: vs.Model, out: Path, fatal: int) -> None:
    """A harvest that kills itself at its event number `fatal`."""
    seen = 0

    def sink(_: Event) -> None:
        nonlocal seen
        seen += 1
        if seen == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    harvest(model, out, sink if fatal else silent)


def harvest(model: vs.Model, out: Path, sink: object = silent) -> vs.data.ActivationStore:
    """About 20 shards of a few hundred rows."""
    return vs.data.harvest(
        model, TEXTS, sites=["layers.0.resid_post", "layers.0.mlp_post"], out=out, context=48, batch_tokens=480,
        shard_bytes=2**19, sink=sink,
    )  # fmt: skip


def child(model: vs.Model, out: Path, fatal: int, seconds: float | None) -> int:
    """The signal that ended a child, or 0."""
    pid = os.fork()
    if not pid:
        run(model, out, fatal)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def two_at_once(model: vs.Model, out: Path) -> list[int]:
    """How two children ended that were harvesting into one folder."""
    children = []
    for _ in range(2):
        children.append(os.fork())
        if not children[-1]:
            run(model, out, 0)
            os._exit(0)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main() -> None:
    """Children until one comes through."""
    torch.set_num_threads(1)
    model, out, chance = vs.load(Path(sys.argv[1])), Path(sys.argv[2]), random.Random(int(sys.argv[3]))
    began = time.perf_counter()
    harvest(model, out.with_name("timed"))
    whole, ended = time.perf_counter() - began, []
    while len(ended) < MOST and (len(ended) < KILLS or ended[-1] != 0):
        # Every other one of the first is killed by the clock. Each gets a tenth of the way, so that all are needed.
        seconds = chance.uniform(0.01, 0.15) * whole if len(ended) % 2 and len(ended) < KILLS else None
        ended.append(child(model, out, 0 if seconds else chance.randint(3, 12 if len(ended) < KILLS else 40), seconds))
    harvest(model, out)
    sys.stdout.write(json.dumps(ended + two_at_once(model, out.with_name("two"))))


if __name__ == "__main__":
    main()
