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
    from vesalius.studies import Question, Study

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
    beginning: str
    random_sets: int
    command: str

    def check(self) -> None:
        """Refuse what cannot be done before anything heavy is loaded."""
        if self.control is not None and self.control not in CONTROLS:
            raise UnknownNameError("control", self.control, CONTROLS)
        if self.random_sets < 4:
            raise InputError(f"--random-sets must be at least 4; got {self.random_sets}")
        if self.n < 1:
            raise InputError(f"--n must be positive; got {self.n}")
        folder = self.folder
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise InputError(
                f"cannot write to {self.folder}: {folder} is not a folder that can be written; choose another --out"
            )

    @property
    def folder(self) -> Path:
        name = Path(self.question).stem
        return self.out or Path("runs") / (name if self.control is None else f"{name}-{self.control}")


def study(request: Request) -> int:
    """Run the study and write its files; returns the exit code."""
    request.check()
    with bars() as progress:
        screen = Screen(progress)
        model = vs.load(request.model, sink=screen)
        question = vs.studies.question_for(
            request.question, model, n=request.n, seed=request.seed, beginning=request.beginning
        )
        note(
            f"{model.name}: {question.text} {question.sizes['discovery']} + {question.sizes['validation']} prompt pairs, beginning {question.beginning}"
        )
        if request.control is None:
            summary = _plain_study(request, model, question, screen)
        else:
            summary = _control_study(request, model, question, screen)
        report = vs.report.write(summary, request.folder)
    for sentence in summary["answer"]:
        say(sentence)
    say(str(report))
    return 1 if summary["stopped"] else 0


def _options(request: Request, **changes: Any) -> Any:
    return vs.studies.Options(
        seed=request.seed, random_sets=request.random_sets, **{"past_gate": request.past_gate, **changes}
    )


def _plain_study(request: Request, model: Model, question: Question, screen: Screen) -> dict[str, Any]:
    done = vs.studies.run_study(question, model, out=request.folder, options=_options(request), sink=screen)
    return vs.studies.summarise(done, command=request.command, timings=timings(screen, done))


def _control_study(request: Request, model: Model, question: Question, screen: Screen) -> dict[str, Any]:
    """The same study on the re-initialised model, which the trained model's claims are tested on as well."""
    trained = vs.studies.run_study(
        question, model, out=request.folder / "trained", options=_options(request), sink=screen
    )
    blank = vs.validate.reinitialised(model, request.seed)
    options = _options(request, past_gate=True, control=request.control)
    done = vs.studies.run_study(question, blank, out=request.folder, options=options, sink=screen)
    rows = vs.studies.claims_on(trained, blank, request.folder, screen)
    return vs.studies.summarise(done, command=request.command, timings=timings(screen, done), on_control=rows)


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
