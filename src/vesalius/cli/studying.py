"""`vesalius study`: load, run, write summary and report, print the answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vesalius as vs
from vesalius.cli import checks
from vesalius.cli.screen import KEEP_HEAD, Screen, bars, note, say
from vesalius.errors import InputError
from vesalius.jobs.paths import check_writable
from vesalius.model.loading import look_up

if TYPE_CHECKING:
    from vesalius.model import Model
    from vesalius.studies import Options, Question, Study

CONTROLS = ("random-weights",)
STEPS = ("patching", "circuit", "describe", "validate")


@dataclass(frozen=True)
class Request:
    """The arguments of the command."""

    question: str
    model: str
    n: int | None
    """Prompt pairs per split; None is the default of a built-in question, or all of the user's own."""
    n_validation: int | None
    seed: int
    out: Path | None
    control: str | None
    past_gate: bool
    bos: str
    random_sets: int
    device: str | None
    """None is the GPU where there is one."""
    command: str

    def check(self) -> None:
        """Refuse what cannot be done before anything heavy is loaded."""
        checks.one_of("control", [] if self.control is None else [self.control], CONTROLS)
        checks.at_least("--n", self.n, 1)
        checks.at_least("--n-validation", self.n_validation, 1)
        checks.at_least("--random-sets", self.random_sets, checks.FEWEST_SETS)
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed must lie between 0 and 2**63 - 1; got {self.seed}")
        checks.device(self.device)
        checks.question(self.question)
        if self.n_validation is not None and self.question not in checks.QUESTIONS:
            raise InputError(
                "--n-validation is for built-in questions; of your own pairs, --n takes as many of each split"
            )
        check_writable(self.folder)
        look_up(self.model)

    @property
    def folder(self) -> Path:
        name = Path(self.question).stem
        return self.out or Path("runs") / (name if self.control is None else f"{name}-{self.control}")

    def options(self, **changes: Any) -> Options:
        """The study's options, with changes. Raises InputError for those that are out of range."""
        given = {"seed": self.seed, "random_sets": self.random_sets, "past_gate": self.past_gate}
        return vs.studies.Options(**{**given, **changes})


def study(request: Request) -> int:
    """Run the study and write its files; returns the exit code."""
    request.check()
    with bars() as progress:
        screen = Screen(progress)
        model = vs.load(request.model, device=checks.chosen_device(request.device), sink=screen)
        question = _question(request, model)
        note(_announcement(model, question))
        run = _plain_study if request.control is None else _control_study
        summary = run(request, model, question, screen)
        report = vs.report.write(summary, request.folder)
    for sentence in summary["answer"]:
        say(sentence)
    say(str(report))
    if summary["timings"]["ledger_head"]:
        note(KEEP_HEAD.format(summary["timings"]["ledger_head"]))
    return 1 if summary["stopped"] else 0


def _question(request: Request, model: Model) -> Question:
    """The question with its pairs; of the user's own pairs as many as --n says."""
    how: dict[str, Any] = {"seed": request.seed, "bos": request.bos}
    if request.question in checks.QUESTIONS:
        sizes = {"n": request.n, "n_validation": request.n_validation}
        how |= {name: size for name, size in sizes.items() if size is not None}
    question = vs.studies.question_for(request.question, model, **how)
    if request.n is None or request.question in checks.QUESTIONS:
        return question
    # Every corruption has the same clean prompts and labels, so that the same rows are drawn of each.
    some = {name: vs.data.files.subsample(p, request.n, request.seed) for name, p in question.corruptions.items()}
    return replace(question, corruptions=some)


def _announcement(model: Model, question: Question) -> str:
    sizes = f"{question.sizes['discovery']} + {question.sizes['validation']} prompt pairs"
    return f"{model.name}: {question.text} {sizes}, bos {question.bos}"


def _plain_study(request: Request, model: Model, question: Question, screen: Screen) -> dict[str, Any]:
    done = vs.studies.run_study(question, model, out=request.folder, options=request.options(), sink=screen)
    return _summary(request, done, screen)


def _control_study(request: Request, model: Model, question: Question, screen: Screen) -> dict[str, Any]:
    """The control's summary; the trained model's own study and page go into a folder inside."""
    found = vs.studies.random_weights_control(
        question, model, out=request.folder, options=request.options(), sink=screen
    )
    trained = _summary(request, found.trained, screen)
    vs.report.write(trained, request.folder / "trained")
    if found.control is None:
        return {**trained, "control": request.control}
    return _summary(request, found.control, screen, [dict(row) for row in found.rows])


def _summary(
    request: Request, done: Study, screen: Screen, on_control: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    return vs.studies.summarise(done, command=request.command, timings=timings(screen, done), on_control=on_control)


def timings(screen: Screen, done: Study) -> Mapping[str, Any]:
    """The part of the summary that differs between two runs with the same seed."""
    return {**screen.timings(), "steps": screen.seconds(STEPS), "sealed_at": done.sealed_at}
