"""The study of a task: from a question to tested claims.

    gate        does the model do the task, overall and per template (discovery prompts)
    decompose   exact effect of every component alone, all corruptions, both directions
    circuit     the smallest set by the stated rule, with measured edges
    describe    roles of the members, scored on discovery; each role makes claims
    seal        all claims become one family in the ledger; only then
    validate    the validation split is opened, once, and every claim is tested on it against its controls
    report      summary.json, report.html and ledger.sqlite

Every finished piece is kept on disk under the plan's hash: a killed study goes on where it was.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vesalius import __version__
from vesalius.bench import Bench
from vesalius.circuits import Circuit, Effects, decompose, find_circuit, find_edges, kept
from vesalius.describe import Context, Descriptions, describe
from vesalius.errors import FileFormatError, InputError
from vesalius.inputs import Pairs
from vesalius.jobs import Blocks, Event, Sink
from vesalius.jobs.progress import shown
from vesalius.model import Model
from vesalius.patching.cost import Cost
from vesalius.protocol import Claim, Evidence, Family, Verdict, content_hash
from vesalius.protocol.ledger import Ledger
from vesalius.site import Site
from vesalius.studies.answer import html
from vesalius.studies.cost import estimate_study
from vesalius.studies.gate import ACCURACY, FEWEST_ROWS, Gate, gate
from vesalius.studies.kept import edges_from_arrays, edges_to_arrays, found_from_arrays, found_to_arrays
from vesalius.studies.question import Question
from vesalius.studies.testing import Tested, measure_claims
from vesalius.validate.circuit import circuit_claims

T = TypeVar("T")
FEWEST_SETS = 4


@dataclass(frozen=True)
class Options:
    """Knobs of a study. random_sets: draws of the random-set control; the smallest p it can give is 1 / (draws + 1).

    Raises InputError for fewer than `FEWEST_SETS` of them.
    """

    seed: int = 0
    past_gate: bool = False
    random_sets: int = 99
    check: bool = True
    control: str | None = None

    def __post_init__(self) -> None:
        if self.random_sets < FEWEST_SETS:
            raise InputError(f"random_sets must be at least {FEWEST_SETS}; got {self.random_sets}")


@dataclass(frozen=True, eq=False)
class Study:
    """A finished (or stopped) study; `studies.summarise(study)` makes the summary of it."""

    question: Question
    model: Model
    options: Options
    gate: Gate
    stopped: str | None = None
    effects: Effects | None = None
    circuit: Circuit | None = None
    descriptions: Descriptions | None = None
    discovery: Bench | None = None
    tested: Tested | None = None
    family: Family | None = None
    verdicts: tuple[Verdict, ...] = ()
    evidence: Mapping[str, Evidence] = field(default_factory=dict)
    costs: tuple[tuple[str, Cost], ...] = ()
    ledger_head: str = ""
    sealed_at: str | None = None
    """When the validation split was first opened; the family was sealed just before."""

    def _repr_html_(self) -> str:
        return html(self)


def run_study(
    question: Question,
    model: Model,
    *,
    out: Path | None = None,
    options: Options | None = None,
    sink: Sink | None = None,
) -> Study:
    """Run or resume a study. out: folder for blocks and ledger (None: nothing is kept). sink: None shows progress.

    A model that does not do the task gives a Study whose `stopped` says so (unless options.past_gate). Raises
    InputError when `out` holds another study, or clean and corrupted prompts do not differ in their effect.
    """
    chosen = options or Options()
    with shown(sink) as told:
        if out is not None:
            return _Runner(question, model, out, _blocks(out, question, model, chosen, told), chosen, told).run()
        with tempfile.TemporaryDirectory() as folder:
            blocks = Blocks(None, _plan(question, model, chosen))
            return _Runner(question, model, Path(folder), blocks, chosen, told).run()


def _plan(question: Question, model: Model, options: Options) -> str:
    """What a study computes, as a hash. Going past the gate is left out: it changes whether, not what."""
    knobs = {name: getattr(options, name) for name in ("random_sets", "seed", "control")}
    return content_hash({**question.plan(), **knobs, "model": model.content_hash, "version": __version__})


def _blocks(out: Path, question: Question, model: Model, options: Options, sink: Sink) -> Blocks:
    """Where the study's pieces are kept. Raises InputError when the folder holds those of another study."""
    folder, plan, ledger = out / "blocks", _plan(question, model, options), out / "ledger.sqlite"
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


class _Runner:
    def __init__(
        self, question: Question, model: Model, out: Path, blocks: Blocks, options: Options, sink: Sink
    ) -> None:
        self.question, self.model, self.options, self.sink = question, model, options, sink
        self.out, self.blocks = out, blocks
        self.costs: list[tuple[str, Cost]] = []

    def run(self) -> Study:
        discovery = self.question.split("discovery")
        passed = gate(self.model, discovery[self.question.main], "discovery")
        stopped = self._stop(passed)
        if stopped:
            return Study(self.question, self.model, self.options, passed, stopped)
        bench = self._bench(discovery, passed, "discovery")
        expected = estimate_study(bench, self.options.random_sets)
        self.sink(Event("note", "cost", message=f"expected cost: {expected.describe()}"))
        with Ledger(self.out / "ledger.sqlite") as ledger:
            return self._study(passed, bench, ledger)

    def _stop(self, passed: Gate) -> str | None:
        if passed.passed or self.options.past_gate:
            return None
        accuracy = passed.accuracy
        return (
            f"{self.model.name} prefers the answer in {accuracy['estimate']:.0%} of {int(accuracy['n'])} discovery "
            f"prompts, with a mean logit difference of {passed.logit_diff['estimate']:+.2f} (needed: {ACCURACY:.0%}, "
            f"above 0, and {FEWEST_ROWS} prompts of templates that it gets right): it does not do this task well "
            "enough for its mechanism to be looked for. --past-gate goes on all the same."
        )

    def _bench(self, corruptions: Mapping[str, Pairs], passed: Gate, split: str) -> Bench:
        """Prompts of templates that passed the gate; all of them when too few did (past the gate only)."""
        rows = passed.rows if len(passed.rows) >= FEWEST_ROWS else range(len(passed.labels))
        chosen = {name: pairs.subset(rows) for name, pairs in corruptions.items()}
        return Bench(self.model, chosen, self.options.seed, self.options.check, self.sink, self.blocks, split)

    def _study(self, passed: Gate, bench: Bench, ledger: Ledger) -> Study:
        effects = self._step("decompose", bench, lambda: decompose(bench))
        circuit = self._step("circuit", bench, lambda: self._circuit(bench, effects))
        descriptions, claims = self._step("describe", bench, lambda: self._described(bench, circuit))
        family = ledger.register(claims, study=self.question.name)
        bench.forget()
        tested = self._test(ledger, family, circuit)
        tested.bench.forget()
        self.costs.append(("validate", tested.bench.cost))
        evidence = {claim.id: ledger.evidence(claim)[-1] for claim in family.claims}
        return Study(
            self.question, self.model, self.options, passed, None, effects, circuit, descriptions, bench, tested,
            family, ledger.verdicts(family), evidence, tuple(self.costs), ledger.verify().head, ledger.openings()[0].at,
        )  # fmt: skip

    def _step(self, name: str, bench: Bench, work: Callable[[], T]) -> T:
        self.sink(Event("note", name, message=name))
        before = bench.cost
        result = work()
        self.costs.append((name, bench.cost - before))
        return result

    def _circuit(self, bench: Bench, effects: Effects) -> Circuit:
        found = find_circuit(bench, effects)
        stored = bench.stored("edges", lambda: edges_to_arrays(find_edges(bench, found.members)))
        return replace(found, edges=edges_from_arrays(stored))

    def _described(self, bench: Bench, circuit: Circuit) -> tuple[Descriptions, tuple[Claim, ...]]:
        """Descriptions of the members, and every claim of the study."""

        def work() -> dict[str, Any]:
            found = describe(self._context(bench, circuit))
            total = self._ablated(bench)
            whole = circuit_claims(bench, circuit.members, total, self.options.random_sets, self._common())
            return found_to_arrays(found, [*found.claims, *whole])

        return found_from_arrays(bench.stored("descriptions and claims", work))

    def _context(self, bench: Bench, circuit: Circuit) -> Context:
        made = Context.of(bench, circuit.members, study=self.question.name, n=self.question.sizes["validation"])
        return replace(made, parents=self._parents(), seed=self.options.seed)

    def _parents(self) -> tuple[str, ...]:
        """Hashes of the data that claims are made from: the whole discovery split, failed templates too."""
        return tuple(pairs.content_hash for pairs in self.question.split("discovery").values())

    def _common(self) -> dict[str, Any]:
        return {
            "n": self.question.sizes["validation"], "seed": self.options.seed, "parents": self._parents(),
            "study": self.question.name, "subject_model": self.model.content_hash,
        }  # fmt: skip

    def _ablated(self, bench: Bench) -> float:
        """Mean effect of giving every component its corrupted value, in logits (discovery)."""
        nothing: list[tuple[Site, ...]] = [()]
        empty = kept(bench, nothing, "resample")[0]
        return float(np.mean(bench.metric("clean").double().numpy() - empty))

    def _test(self, ledger: Ledger, family: Family, circuit: Circuit) -> Tested:
        self.sink(Event("note", "validate", message="validate"))
        opened = {name: ledger.open(pairs, "validation") for name, pairs in self.question.corruptions.items()}
        main = opened[self.question.main]
        passed = gate(self.model, main, "validation")
        provenance = {
            "data_hash": main.content_hash, "model_hash": self.model.content_hash,
            "plan_hash": self.blocks.plan_hash, "version": __version__,
        }  # fmt: skip
        bench = self._bench(opened, passed, "validation")
        return measure_claims(ledger, family, circuit, bench, passed, self.options.random_sets, provenance)
