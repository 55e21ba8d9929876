"""How the benchmarks measure: contenders in turn, in one process, on the same work, in processor seconds.

These machines are shared: seconds on the wall say how busy they are. Every round runs every contender once, in an order
that rotates, and takes the processor time of the whole process (all threads). What is quoted is the median over rounds
of the ratio within a round.
"""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

OURS = "vesalius"
RESULTS = Path(__file__).parent / "RESULTS.md"


@dataclass(frozen=True)
class Contender:
    """run(round) does `share` of the work and gives what it found, to be compared; None: compared elsewhere."""

    name: str
    run: Callable[[int], Tensor | None]
    share: float = 1.0


@dataclass
class Work:
    """One row of a table: contenders, the first is ours. same: (ours, theirs) -> largest difference of the answers."""

    name: str
    contenders: Sequence[Contender]
    same: Callable[[Tensor, Tensor], float] = lambda ours, theirs: float((ours - theirs).abs().max())
    allowed: float = 1e-3
    note: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)

    def round(self, number: int) -> None:
        """Every contender once. Stops the benchmark when the answers differ."""
        order = [self.contenders[(number + shift) % len(self.contenders)] for shift in range(len(self.contenders))]
        found = {}
        for contender in order:
            began = time.process_time()
            found[contender.name] = contender.run(number)
            spent = time.process_time() - began
            self.seconds.setdefault(contender.name, []).append(spent / contender.share)
        ours = self.contenders[0].name
        for name, answer in found.items():
            mine = found[ours]
            if name == ours or mine is None or answer is None:
                continue
            difference = self.same(mine, answer)
            self.differences[name] = max(self.differences.get(name, 0.0), difference)
            if difference > self.allowed:
                raise SystemExit(f"{self.name}: {name} gives another answer than {ours}, by {difference:.3g}")

    def ratio(self, name: str, ours: str) -> float:
        """Median over rounds of their processor time over ours."""
        pairs = zip(self.seconds[name], self.seconds[ours], strict=True)
        return statistics.median(theirs / mine for theirs, mine in pairs)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])


def ceiling(size: int = 2048, repeats: int = 3) -> float:
    """GFLOP per processor second of a float32 product, by PyTorch's own choice of library."""
    a = torch.randn(size, size)
    a @ a
    began = time.process_time()
    for _ in range(repeats):
        a @ a
    return 2 * size**3 * repeats / (time.process_time() - began) / 1e9


def machine() -> str:
    """Processor and versions, for the head of a table."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    threads = torch.get_num_threads()
    return f"{model}, {threads} threads, {torch.backends.cpu.get_cpu_capability()}, PyTorch {torch.__version__}"


def table(works: Sequence[Work]) -> str:
    """Rows of ratios: their processor time over ours; over each of ours, where there are several."""
    lines = ["| work | ours, CPU-s | against | ratio | largest difference |", "| --- | ---: | --- | ---: | ---: |"]
    for work in works:
        names = [contender.name for contender in work.contenders]
        for at, ours in enumerate(names):
            if at and not ours.startswith(OURS):
                continue
            label = f"{work.name}{ours.removeprefix(OURS) if at else ''}"
            lines += [
                f"| {label} | {work.median(ours):.3g} | {name} | {work.ratio(name, ours):.2f} | "
                f"{_shown(work.differences.get(name))} |"
                for name in names[at + 1 :]
            ]
    notes = [f"- *{work.name}*: {work.note}" for work in works if work.note]
    return "\n".join([*lines, "", *notes])


def _shown(difference: float | None) -> str:
    return "" if difference is None else f"{difference:.1e}"


def write(section: str, text: str) -> None:
    """Replace one section of RESULTS.md."""
    mark, end = f"<!-- {section} -->", f"<!-- end {section} -->"
    page = RESULTS.read_text() if RESULTS.exists() else "# Results\n\nWritten by the scripts beside this page.\n"
    block = f"{mark}\n{text.strip()}\n{end}"
    if mark in page:
        page = re.sub(f"{re.escape(mark)}.*?{re.escape(end)}", lambda _: block, page, flags=re.S)
    else:
        page = f"{page.rstrip()}\n\n{block}\n"
    RESULTS.write_text(page)
