"""Studies: named steps that make named artefacts, one after the other.

A study of a task's circuit, of a dictionary or of a concept is a list of steps. Every step sees what the steps before
it made; what it makes has a name and a type, and what it cost is kept.
"""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from vesalius import __version__
from vesalius.errors import FileFormatError, InputError, UnknownNameError
from vesalius.jobs import Blocks, Event, Sink, track
from vesalius.jobs.progress import shown
from vesalius.jobs.untrusted import parse_json
from vesalius.model import Model
from vesalius.patching.plan import Cost
from vesalius.protocol import Claim, Evidence, Verdict, canonical_json
from vesalius.protocol.ledger import Ledger
from vesalius.quantities import Runs
from vesalius.validate import check

T = TypeVar("T")
Q = TypeVar("Q", bound="Asked")
FEWEST_SETS = 4


@dataclass(frozen=True)
class Options:
    """Knobs of a study. random_sets: draws of the random-set control; the smallest p it can give is 1 / (draws + 1).

    past_gate: go on where the model does not do the task. check: run random cells plainly too. control: the name of the
    control that this is, kept in the summary. Raises InputError for fewer than `FEWEST_SETS` random sets.
    """

    seed: int = 0
    past_gate: bool = False
    random_sets: int = 99
    check: bool = True
    control: str | None = None

    def __post_init__(self) -> None:
        if self.random_sets < FEWEST_SETS:
            raise InputError(f"random_sets must be at least {FEWEST_SETS}; got {self.random_sets}")


@dataclass(frozen=True)
class Artefact(Generic[T]):
    """The name of what a step makes, and its type."""

    name: str
    type: type[T]


class Asked(Protocol):
    """The question of a study: what is asked, and on which data."""

    @property
    def name(self) -> str: ...

    @property
    def text(self) -> str: ...


class Counted(Protocol):
    """What knows its cost, such as Runs."""

    cost: Cost


class StoppedError(Exception):
    """A step found that the study has nothing to go on with; the message is the study's answer.

    made: the step's artefact, where it made one all the same.
    """

    def __init__(self, message: str, made: Any = None) -> None:
        super().__init__(message)
        self.made = made


@dataclass(frozen=True)
class Step(Generic[T]):
    """One step. run: from the study so far to its artefact."""

    name: str
    makes: Artefact[T]
    run: Callable[[Work[Any]], T]


class Work(Mapping[str, Any], Generic[Q]):
    """A study that is being made: its question, model and options, where pieces are kept, and the artefacts so far.

    ledger: one that is open, or the path of one that is opened, or made, when it is first asked for: a study that stops
    before it claims anything leaves none behind.
    """

    def __init__(
        self, question: Q, model: Model, options: Options, blocks: Blocks, ledger: Ledger | Path, sink: Sink
    ) -> None:
        self.question, self.model, self.options = question, model, options
        self.blocks, self.sink = blocks, sink
        self._ledger = ledger
        self.costs: list[tuple[str, Cost]] = []
        self._spent = Cost()
        self._made: dict[str, Any] = {}

    @overload
    def __getitem__(self, key: Artefact[T], /) -> T: ...
    @overload
    def __getitem__(self, key: str, /) -> Any: ...
    def __getitem__(self, key: Artefact[Any] | str, /) -> Any:
        """An artefact. Raises UnknownNameError for one that no step has made."""
        return _found(self._made, key)

    # Mapping's own two wait for a KeyError, which is no error of this package.
    def __contains__(self, key: object) -> bool:
        return _name(key) in self._made

    def get(self, key: Artefact[Any] | str, default: Any = None, /) -> Any:
        """An artefact, or the default where no step has made it."""
        return self._made.get(_name(key), default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    @property
    def ledger(self) -> Ledger:
        """Where claims are sealed and their evidence is kept."""
        if isinstance(self._ledger, Path):
            self._ledger = Ledger(self._ledger)
        return self._ledger

    def close(self) -> None:
        """Close the ledger, if it was opened."""
        if isinstance(self._ledger, Ledger):
            self._ledger.close()

    def take(self, step: Step[Any]) -> None:
        """Run a step. Raises what the step raises, TypeError when it makes something else than it says."""
        self.sink(Event("note", step.name, message=step.name))
        self._spent = Cost()
        try:
            self._keep(step, step.run(self))
        except StoppedError as reason:
            if reason.made is not None:
                self._keep(step, reason.made)
            raise

    def _keep(self, step: Step[Any], made: Any) -> None:
        if not isinstance(made, step.makes.type):
            raise TypeError(f"step {step.name!r} makes a {step.makes.type.__name__}; got {type(made).__name__}")
        self._made[step.makes.name] = made
        if self._spent != Cost():
            self.costs.append((step.name, self._spent))

    @contextmanager
    def counting(self, runs: Counted) -> Iterator[None]:
        """Put what these runs cost inside on the bill of the step."""
        before = runs.cost
        yield
        self._spent = self._spent + (runs.cost - before)


@dataclass(frozen=True, eq=False)
class Study:
    """A finished (or stopped) study; `studies.summarise(study)` makes the summary of it.

    Its artefacts by name: `study["circuit"]`, `study.circuit`. stopped: why it went no further, None when it did.
    answer: sentences, computed from verdicts and measurements. verdicts: of the family, in its order.
    """

    question: Any
    model: Model
    options: Options
    artefacts: Mapping[str, Any]
    stopped: str | None = None
    answer: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    costs: tuple[tuple[str, Cost], ...] = ()
    ledger_head: str = ""
    sealed_at: str | None = None
    """When the validation split was first opened; the family was sealed just before."""

    @overload
    def __getitem__(self, key: Artefact[T], /) -> T: ...
    @overload
    def __getitem__(self, key: str, /) -> Any: ...
    def __getitem__(self, key: Artefact[Any] | str, /) -> Any:
        """An artefact. Raises UnknownNameError for one that no step has made."""
        return _found(self.artefacts, key)

    def __contains__(self, key: Artefact[Any] | str) -> bool:
        return _name(key) in self.artefacts

    def get(self, key: Artefact[T]) -> T | None:
        """An artefact, or None where no step has made it."""
        found: T | None = self.artefacts.get(key.name)
        return found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self.artefacts:
            made = ", ".join(self.artefacts) if not name.startswith("_") else ""
            raise AttributeError(f"this study has no {name!r}; its artefacts: {made}")
        return self.artefacts[name]

    def _repr_html_(self) -> str:
        """The answer and a table of claims, for notebooks."""
        answer = "".join(f"<p>{escape(sentence)}</p>" for sentence in self.answer)
        if not self.claims:
            return answer
        rows = "".join(map(_row, self.claims, self.verdicts))
        heads = "".join(f"<th>{name}</th>" for name in ("verdict", "claim", "estimate", "95 % interval", "n"))
        return f"{answer}<table><tr>{heads}</tr>{rows}</table>"


def run_steps(
    work: Work[Any], steps: Sequence[Step[Any]], answer: Callable[[Mapping[str, Any]], Sequence[str]]
) -> Study:
    """Run steps in order until the last, or until one says that there is nothing to go on with."""
    stopped = None
    for step in steps:
        try:
            work.take(step)
        except StoppedError as reason:
            stopped = str(reason)
            break
    family = work.get("family")
    openings = () if family is None else work.ledger.openings()
    verdicts = () if family is None else work.ledger.verdicts(family)
    return Study(
        work.question,
        work.model,
        work.options,
        dict(work),
        stopped,
        answer=_stopped(stopped, family) if stopped else tuple(answer({**work, "verdicts": verdicts})),
        claims=() if family is None else family.claims,
        verdicts=verdicts,
        costs=tuple(work.costs),
        ledger_head="" if family is None else work.ledger.verify().head,
        sealed_at=next((opening.at for opening in openings if opening.split == "validation"), None),
    )


def run_in(
    out: Path | None,
    plan: str,
    question: Asked,
    model: Model,
    options: Options,
    steps: Sequence[Step[Any]],
    answer: Callable[[Mapping[str, Any]], Sequence[str]],
    sink: Sink | None,
) -> Study:
    """Run or resume a study. plan: hash of what is computed. Raises InputError when `out` holds another study."""
    with shown(sink) as screen, tempfile.TemporaryDirectory() as folder:
        blocks = _blocks(out, plan, screen) if out is not None else Blocks(None, plan)
        path = (out or Path(folder)) / "ledger.sqlite"
        with closing(Work(question, model, options, blocks, path, screen)) as work:
            return run_steps(work, steps, answer)


def _blocks(out: Path, plan: str, sink: Sink) -> Blocks:
    """Where the study's pieces are kept. Raises InputError when the folder holds those of another study."""
    folder, ledger = out / "blocks", out / "ledger.sqlite"
    if ledger.exists():
        Ledger(ledger).close()  # refuses a file that is none before anything is written beside it
    try:
        return Blocks(folder, plan, sink)
    except FileFormatError:
        raise
    except InputError as error:
        raise InputError(
            f"{out} holds another study (other pairs, model, options or version of vesalius), and nothing of it was "
            f"changed; choose another folder, or delete {out} to start afresh. {error}"
        ) from error


def untested(ledger: Ledger, claims: Sequence[Claim]) -> list[Claim]:
    """Those without their evidence: of a study that is resumed, not all."""
    return [claim for claim in claims if not any(one.measured for one in ledger.evidence(claim))]


def append_evidence(
    ledger: Ledger,
    claims: Sequence[Claim],
    runs: Runs,
    plan_hash: str,
    data_hash: str,
    *,
    other_model: bool = False,
) -> dict[str, Evidence]:
    """Evidence by claim: one piece for each that has none. What they need together is prepared before."""
    for claim in track(untested(ledger, claims), "test claims", sink=runs.sink):
        ledger.append(check(claim, runs=runs, data_hash=data_hash, plan_hash=plan_hash, version=__version__,
                            created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                            allow_other_model=other_model))  # fmt: skip
    return {claim.id: ledger.evidence(claim)[-1] for claim in claims}


def json_array(data: Any) -> dict[str, NDArray[Any]]:
    """JSON data as an array of bytes, every digit of its numbers included."""
    return {"json": np.frombuffer(canonical_json(data).encode("ascii"), dtype=np.uint8)}


def from_array(arrays: Mapping[str, NDArray[Any]]) -> Any:
    return parse_json(arrays["json"].tobytes().decode("utf-8"), finite=False, values=None)


def _stopped(reason: str, family: Any) -> tuple[str, ...]:
    return (reason, "Nothing is claimed.") if family is None else (reason,)


def _name(key: Any) -> Any:
    return key.name if isinstance(key, Artefact) else key


def _found(made: Mapping[str, Any], key: Artefact[Any] | str) -> Any:
    if _name(key) not in made:
        raise UnknownNameError("artefact", _name(key), made)
    return made[_name(key)]


def _row(claim: Claim, verdict: Verdict) -> str:
    outcome = f"{verdict.outcome} ({verdict.reason})" if verdict.reason else verdict.outcome
    estimate = "" if verdict.estimate is None else f"{verdict.estimate:+.3g}"
    interval = "" if verdict.low is None or verdict.high is None else f"{verdict.low:+.3g} to {verdict.high:+.3g}"
    cells = (outcome, claim.statement, estimate, interval, str(verdict.n))
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
