"""A program: runs a small study in a child that is killed again and again, until one gets through.

Arguments: folder, seed. Prints one line of JSON: how the children ended (signal numbers), and the last one's summary.
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

import solvable
from vesalius.jobs import Event

MOST, EARLY, BY_CLOCK = 40, 4, 2
"""Children at most; how many are killed near their start, where every study comes by; how many by the clock."""


def run(out: Path, fatal: int) -> None:
    """A study that kills itself at its event number `fatal`."""
    seen = 0

    def sink(_: Event) -> None:
        nonlocal seen
        seen += 1
        if seen == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    solvable.small_study(out, sink)


def child(out: Path, fatal: int, seconds: float | None) -> int:
    """The signal that ended a child, or 0."""
    pid = os.fork()
    if not pid:
        run(out, fatal)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    """Children until one comes through, then the summary of what is there."""
    torch.set_num_threads(1)
    out, chance = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    # On a fast machine the clock may come too late for a kill, so nothing is counted on there.
    ended = [child(out, chance.randint(2, 12), None) for _ in range(EARLY)]
    ended += [child(out, 10**9, chance.uniform(0.05, 0.6)) for _ in range(BY_CLOCK)]
    while len(ended) < MOST:
        ended.append(child(out, chance.randint(2, 60), None))
        if ended[-1] == 0:
            break
    study = solvable.small_study(out)
    sys.stdout.write(json.dumps({"ended": ended, "summary": solvable.timeless(solvable.summary_of(study))}))


if __name__ == "__main__":
    main()
