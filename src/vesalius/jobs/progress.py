"""Progress: what long work reports, what it expects to cost, and what a terminal shows of it.

Work sends events to a sink and draws nothing itself. `shown` gives the sink that draws on standard error: bars while
something runs, if that is a terminal, and notes (the expected cost, deviations from the plan) as lines. `silent` is the
sink that draws nothing.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vesalius.errors import UnknownNameError

T = TypeVar("T")

EVENT_KINDS = ("start", "advance", "end", "note")


@dataclass(frozen=True)
class Event:
    """Something happened in a task: it started, advanced to `done` of `total`, ended, or has a `message` (note).

    The message of an advance, such as "fvu 0.21", stands beside its bar.
    """

    kind: str
    task: str
    done: int = 0
    total: int | None = None
    message: str = ""

    def __post_init__(self) -> None:
        if self.kind not in EVENT_KINDS:
            raise UnknownNameError("kind of event", self.kind, EVENT_KINDS)


Sink = Callable[[Event], None]


def silent(event: Event) -> None:
    """The sink that draws nothing."""


def track(items: Iterable[T], task: str, total: int | None = None, sink: Sink = silent) -> Iterator[T]:
    """The items, one by one, with a start event, an advance after each was used, and an end whatever happens."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    done = 0
    sink(Event("start", task, 0, total))
    try:
        for item in items:
            yield item
            done += 1
            sink(Event("advance", task, done, total))
    finally:
        sink(Event("end", task, done, total, "" if total in (None, done) else f"stopped after {done} of {total}"))


@dataclass(frozen=True)
class Estimate:
    """What a job will cost: wall time, forward passes, and bytes: the process's memory at its peak, and disk."""

    seconds: float
    forwards: float = 0.0
    memory_bytes: int = 0
    disk_bytes: int = 0

    def describe(self) -> str:
        """As one line of text, such as "about 12 min, 8,640 forward passes, 2.1 GB of memory"."""
        parts = [f"about {_duration(self.seconds)}"]
        if self.forwards:
            parts.append(f"{self.forwards:,.0f} forward passes")
        if self.memory_bytes:
            parts.append(f"{size_in_words(self.memory_bytes)} of memory")
        if self.disk_bytes:
            parts.append(f"{size_in_words(self.disk_bytes)} on disk")
        return ", ".join(parts)


def resident() -> int:
    """Bytes of memory that this process holds now; where that is not told, the most it has held."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return most_resident()


def most_resident() -> int:
    """The most bytes of memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kibibytes, macOS bytes.
    return peak if sys.platform == "darwin" else peak * 1024


def bars(console: Console) -> Progress:
    """Bars that disappear when their work is done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[message]}"),
        console=console,
        transient=True,
    )


class DrawingSink:
    """Draws events as bars and prints notes as lines."""

    def __init__(self, progress: Progress) -> None:
        self._bars = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        _note(self._bars.console, event)
        if event.kind == "note":
            return
        if event.task not in self._tasks:
            self._tasks[event.task] = self._bars.add_task(escape(event.task), total=event.total, message="")
        # An event without a message leaves the last one beside the bar.
        message: dict[str, Any] = {"message": escape(event.message)} if event.message else {}
        self._bars.update(self._tasks[event.task], completed=event.done, total=event.total, **message)
        if event.kind == "end":
            self._bars.remove_task(self._tasks.pop(event.task))


@contextmanager
def shown(sink: Sink | None) -> Iterator[Sink]:
    """The sink itself; None gives one that draws on standard error until the block ends, however it ends."""
    if sink is not None:
        yield sink
        return
    console = Console(stderr=True)
    # In a log file bars would be thousands of lines.
    if not console.is_terminal and not console.is_jupyter:
        yield lambda event: _note(console, event)
        return
    with bars(console) as progress:
        yield DrawingSink(progress)


def _note(console: Console, event: Event) -> None:
    """Print a note; other events print nothing."""
    if event.kind == "note":
        console.print(f"[dim]{escape(event.message or event.task)}[/]", highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def size_in_words(count: float) -> str:
    """A number of bytes as text, such as "2.1 GB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
