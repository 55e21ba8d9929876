"""`vesalius study shortcut` and `vesalius study by-design`: studies of tables, with data and models of their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import vesalius as vs
from vesalius.cli.screen import KEEP_HEAD, Screen, bars, note, say
from vesalius.errors import InputError
from vesalius.jobs.paths import check_writable

CONTROL = "no-mark"
SECONDS = {"shortcut": "one to two minutes", "by-design": "one to two minutes"}


@dataclass(frozen=True)
class Request:
    """The arguments of the command."""

    question: str
    seed: int
    out: Path | None
    control: str | None
    command: str

    def check(self) -> None:
        """Refuse what cannot be done before anything heavy is loaded."""
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed must lie between 0 and 2**63 - 1; got {self.seed}")
        if self.control is not None and (self.question != "shortcut" or self.control != CONTROL):
            raise InputError(f"--control {CONTROL} is for the study shortcut; got {self.control!r} for {self.question}")
        check_writable(self.folder)

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / (self.question if self.control is None else f"{self.question}-{self.control}")


def study(request: Request) -> int:
    """Run the study and write its files; returns the exit code."""
    request.check()
    with bars() as progress:
        screen = Screen(progress)
        note(f"{request.question}: everything is fitted here; {SECONDS[request.question]} on one core")
        if request.question == "shortcut":
            asked = vs.studies.shortcut_question(request.seed, planted=request.control is None)
            done = vs.studies.run_shortcut(asked, out=request.folder, sink=screen)
            summary = vs.studies.summarise_shortcut(done, command=request.command, timings=screen.timings())
            report = vs.report.write_shortcut(summary, request.folder)
        else:
            compared = vs.studies.by_design_question(seed=request.seed)
            done = vs.studies.run_by_design(compared, out=request.folder, sink=screen)
            summary = vs.studies.summarise_by_design(done, command=request.command, timings=screen.timings())
            report = vs.report.write_by_design(summary, request.folder)
    for sentence in done.answer:
        say(sentence)
    say(str(report))
    if done.ledger_head:
        note(KEEP_HEAD.format(done.ledger_head))
    return 0
