"""What the terminal shows: messages, progress bars. The only place that draws progress."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from vesalius.jobs import Event
from vesalius.jobs import progress as drawing
from vesalius.jobs.progress import most_resident

KEEP_HEAD = "Ledger head, to keep elsewhere for vesalius ledger verify --head: {}"

console = Console(stderr=True)
output = Console()


def say(text: str) -> None:
    """A line of the result, on standard output."""
    output.print(escape(text), highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """A line that is not part of the result, on standard error."""
    console.print(f"[dim]{escape(text)}[/]", highlight=False, soft_wrap=True)


def fail(message: str) -> int:
    """Print an error; gives the exit code 2."""
    console.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    return 2


def warn(message: Warning | str, *_: Any) -> None:
    """Stands in for `warnings.showwarning`."""
    console.print(f"[yellow]warning:[/] {escape(str(message))}", highlight=False, soft_wrap=True)


def bars() -> Progress:
    return drawing.bars(console)


class Screen:
    """An event sink that draws bars and remembers when each step of a study began."""

    def __init__(self, progress: Progress) -> None:
        self._draw = drawing.DrawingSink(progress)
        self._marks: list[tuple[str, float]] = []
        self._began = time.monotonic()

    def __call__(self, event: Event) -> None:
        if event.kind == "note":
            self._marks.append((event.task, time.monotonic()))
        self._draw(event)

    def timings(self) -> dict[str, Any]:
        """Of a summary, what differs between two runs with the same seed."""
        return {
            "seconds": round(self.elapsed, 3),
            "peak_memory_bytes": most_resident(),
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def seconds(self, steps: tuple[str, ...]) -> list[dict[str, Any]]:
        """Wall seconds of each step of a study, in order; of the last study when several were run."""
        marks = [(name, at) for name, at in self._marks if name in steps]
        last = max((number for number, (name, _) in enumerate(marks) if name == steps[0]), default=0)
        began = marks[last:]
        ends = [*(at for _, at in began[1:]), time.monotonic()][: len(began)]
        return [{"name": name, "seconds": round(end - at, 3)} for (name, at), end in zip(began, ends, strict=True)]

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began
