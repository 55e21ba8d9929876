"""Progress on a terminal or in a notebook: what long work shows when nobody says otherwise.

Work tells events to a sink (`jobs.Sink`) and draws nothing. `shown` gives the sink that draws: bars while something
runs, where somebody is watching, and notes (what it will cost, what was run otherwise than planned) as lines, both on
standard error. `jobs.silent` is the sink that says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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

from vesalius.jobs import Event, Sink


def bars(console: Console) -> Progress:
    """Bars that go away when their work is done."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[told]}"), console=console, transient=True,
    )  # fmt: skip


class Drawn:
    """A sink that draws events as bars and prints notes as lines."""

    def __init__(self, progress: Progress) -> None:
        self._bars = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        _note(self._bars.console, event)
        if event.kind == "note":
            return
        if event.task not in self._tasks:
            self._tasks[event.task] = self._bars.add_task(escape(event.task), total=event.total, told="")
        told: dict[str, Any] = {"told": escape(event.message)} if event.message else {}
        self._bars.update(self._tasks[event.task], completed=event.done, total=event.total, **told)
        if event.kind == "end":
            self._bars.remove_task(self._tasks.pop(event.task))


@contextmanager
def shown(sink: Sink | None) -> Iterator[Sink]:
    """The sink itself; None gives one that draws on standard error until the block ends, however it ends."""
    if sink is not None:
        yield sink
        return
    console = Console(stderr=True)
    if not console.is_terminal and not console.is_jupyter:
        yield lambda event: _note(console, event)
        return
    with bars(console) as progress:
        yield Drawn(progress)


def _note(console: Console, event: Event) -> None:
    """Where nobody watches there is nothing to redraw: notes alone."""
    if event.kind == "note":
        console.print(f"[dim]{escape(event.message or event.task)}[/]", highlight=False, soft_wrap=True)
