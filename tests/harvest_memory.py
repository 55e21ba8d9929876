"""A program: harvests into the folder it is given, and prints the bytes stored and how far memory grew meanwhile.

In a process of its own, since what the allocator holds depends on what ran before.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import tiny
import vesalius as vs
from vesalius.jobs import Event


def main() -> None:
    """A small harvest, after which the allocator has what it needs, and a large one."""
    model, held = vs.Model(tiny.llama(hidden_size=768, intermediate_size=768, layers=1)), [0]

    def sink(event: Event) -> None:
        if event.kind == "advance":
            held.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    for name, documents in (("first", 300), ("second", 900)):
        held.clear()
        store = vs.data.harvest(
            model, [[5, 6, 7, 8] * 12] * documents, sites=["embed"], out=Path(sys.argv[1]) / name, context=48,
            shard_bytes=2**21, sink=sink,
        )  # fmt: skip
    sys.stdout.write(f"{sum(shard.bytes for shard in store.manifest.shards)} {max(held) - held[0]}")


if __name__ == "__main__":
    main()
