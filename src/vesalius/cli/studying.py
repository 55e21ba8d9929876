"""`vesalius study`: load, run, write summary and report, print the answer."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vesalius as vs
from vesalius.cli.screen import Screen, bars, note, say
from vesalius.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from vesalius.model import Model
    from vesalius.studies import Options, Question, Study

CONTROLS = ("random-weights",)
STEPS = ("decompose", "circuit", "describe", "validate")


@dataclass(frozen=True)
class Request:
    """What was asked on the command line."""

    question: str
    model: str
    n: int
    seed: int
    out: Path | None
    control: str | None
    past_gate: bool
    bos: str
    random_sets: int
    command: str

    def check(self) -> None:
        """Refuse what cannot be done before anything heavy is loaded."""
        if self.control is not None and self.control not in CONTROLS:
            raise UnknownNameError("control", self.control, CONTROLS)
        if self.n < 1:
            raise InputError(f"--n must be positive; got {self.n}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed must lie between 0 and 2**63 - 1; got {self.seed}")
        vs.studies.check_question(self.question)
        self.options()
        self._check_folder()

    def _check_folder(self) -> None:
        folder = self.folder.absolute()
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise InputError(
                f"cannot write to {self.folder}: {folder} is no folder that can be written; give another --out"
            )

    @property
    def folder(self) -> Path:
        name = Path(self.question).stem
        return self.out or Path("runs") / (name if self.control is None else f"{name}-{self.control}")

    def options(self, **changes: Any) -> Options:
        """The study's knobs. Raises InputError for those that are out of range."""
        asked = {"seed": self.seed, "random_sets": self.random_sets, "past_gate": self.past_gate}
        return vs.studies.Options(**{**asked, **changes})


def study(request: Request) -> int:
    """Run the study and write its files; returns the exit code."""
    request.check()
    with bars() as progress:
        screen = Screen(progress)
        model = vs.load(request.model, sink=screen)
        question = vs.studies.question_for(request.question, model, n=request.n, seed=request.seed, bos=request.bos)
        note(_announcement(model, question))
        run = _plain_study if request.control is None else _control_study
        summary = run(request, model, question, screen)
        report = vs.report.write(summary, request.folder)
    for sentence in summary["answer"]:
        say(sentence)
    say(str(report))
    return 1 if summary["stopped"] else 0


def _announcement(model: Model, question: Question) -> str:
    sizes = f"{question.sizes['discovery']} + {question.sizes['validation']} prompt pairs"
    return f"{model.name}: {question.text} {sizes}, bos {question.bos}"


def _plain_study(request: Request, model: Model, question: Question, screen: Screen) -> dict[str, Any]:
    return _studied(request, model, question, screen, request.folder, request.options())[1]


def _control_study(request: Request, model: Model, question: Question, screen: Screen) -> dict[str, Any]:
    """The same study on the re-initialised model, which the trained model's claims are tested on as well.

    The trained model's own study goes into a folder inside; when it stops at the gate there is nothing to compare with.
    """
    inside = request.folder / "trained"
    trained, summary = _studied(request, model, question, screen, inside, request.options())
    vs.report.write(summary, inside)
    if trained.stopped:
        return {**summary, "control": request.control}
    blank = vs.validate.reinitialised(model, request.seed)
    options = request.options(past_gate=True, control=request.control)
    rows = vs.studies.claims_on(trained, blank, request.folder, screen)
    return _studied(request, blank, question, screen, request.folder, options, rows)[1]


def _studied(
    request: Request, model: Model, question: Question, screen: Screen, out: Path, options: Options,
    on_control: list[dict[str, Any]] | None = None,
) -> tuple[Study, dict[str, Any]]:  # fmt: skip
    done = vs.studies.run_study(question, model, out=out, options=options, sink=screen)
    summary = vs.studies.summarise(done, command=request.command, timings=timings(screen, done), on_control=on_control)
    return done, summary


def timings(screen: Screen, done: Study) -> Mapping[str, Any]:
    """The part of the summary that differs between two runs with one seed."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "steps": screen.seconds(STEPS),
        "seconds": round(screen.elapsed, 3),
        # Linux counts kibibytes, macOS bytes.
        "peak_memory_bytes": peak if sys.platform == "darwin" else peak * 1024,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "sealed_at": done.sealed_at,
    }
