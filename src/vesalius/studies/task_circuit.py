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
from vesalius.circuits import Circuit, Edge, Effects, decompose, find_circuit, find_edges, kept
from vesalius.describe import Context, Descriptions, describe
from vesalius.inputs import Pairs
from vesalius.jobs import Blocks, Event, Sink, silent
from vesalius.ledger import Ledger
from vesalius.model import Model
from vesalius.records import Claim, Evidence, Family, Verdict, content_hash
from vesalius.site import Site
from vesalius.studies.cost import estimate_study
from vesalius.studies.gate import FEWEST_ROWS, Gate, gate
from vesalius.studies.question import Question
from vesalius.studies.testing import Tested, measure_claims
from vesalius.sweeps.evaluate import Cost
from vesalius.validate.circuit import circuit_claims

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """Knobs of a study. random_sets: draws of the random-set control, and so the smallest p it can give: 1 / (draws + 1)."""

    seed: int = 0
    past_gate: bool = False
    random_sets: int = 99
    check: bool = True
    control: str | None = None


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


def run_study(
    question: Question, model: Model, *, out: Path | None = None, options: Options | None = None, sink: Sink = silent
) -> Study:
    """Run or resume a study. out: folder for blocks and ledger (None: nothing is kept).

    A model that does not do the task gives a Study whose `stopped` says so (unless options.past_gate). Raises InputError
    when `out` holds another study.
    """
    if out is not None:
        return _Runner(question, model, out, options or Options(), sink).run()
    with tempfile.TemporaryDirectory() as folder:
        return _Runner(question, model, Path(folder), options or Options(), sink).run()


class _Runner:
    def __init__(self, question: Question, model: Model, out: Path, options: Options, sink: Sink) -> None:
        self.question, self.model, self.options, self.sink = question, model, options, sink
        knobs = {name: getattr(options, name) for name in ("random_sets", "past_gate", "seed", "control")}
        self.plan = content_hash({**question.plan(), **knobs, "model": model.content_hash, "version": __version__})
        self.out = out
        self.costs: list[tuple[str, Cost]] = []

    def run(self) -> Study:
        discovery = self.question.split("discovery")
        passed = gate(self.model, discovery[self.question.main], "discovery")
        stopped = self._stop(passed)
        if stopped:
            return Study(self.question, self.model, self.options, passed, stopped)
        self.blocks = Blocks(self.out / "blocks", self.plan, self.sink)
        rows = passed.rows if len(passed.rows) >= FEWEST_ROWS else list(range(len(passed.labels)))
        bench = self.bench({name: pairs.subset(rows) for name, pairs in discovery.items()})
        self.sink(
            Event(
                "note", "cost", message=f"expected cost: {estimate_study(bench, self.options.random_sets).describe()}"
            )
        )
        with Ledger(self.out / "ledger.sqlite") as ledger:
            return self._study(passed, bench, ledger)

    def _stop(self, passed: Gate) -> str | None:
        if passed.passed or self.options.past_gate:
            return None
        accuracy = passed.accuracy
        return (
            f"{self.model.name} prefers the answer in {accuracy['estimate']:.0%} of {int(accuracy['n'])} discovery prompts, "
            f"with a mean logit difference of {passed.logit_diff['estimate']:+.2f}: it does not do this task well enough for "
            "its mechanism to be looked for. --past-gate goes on all the same."
        )

    def bench(self, corruptions: Mapping[str, Pairs]) -> Bench:
        return Bench(self.model, corruptions, self.options.seed, self.options.check, self.sink)

    def _study(self, passed: Gate, bench: Bench, ledger: Ledger) -> Study:
        effects = self._step("decompose", bench, lambda: decompose(bench, self.blocks))
        circuit = self._step("circuit", bench, lambda: self._circuit(bench, effects))
        context = self._context(bench, circuit)
        descriptions = self._step("describe", bench, lambda: describe(context))
        family = ledger.register(self._claims(bench, circuit, descriptions), study=self.question.name)
        bench.forget()
        tested = self._test(ledger, family, circuit)
        self.costs.append(("validate", tested.bench.cost))
        verdicts = ledger.verdicts(family)
        evidence = {claim.id: ledger.evidence(claim)[-1] for claim in family.claims}
        head = ledger.verify().head
        return Study(
            self.question, self.model, self.options, passed, None, effects, circuit, descriptions, bench, tested, family,
            verdicts, evidence, tuple(self.costs), head, ledger.openings()[0].at,
        )  # fmt: skip

    def _step(self, name: str, bench: Bench, work: Callable[[], T]) -> T:
        self.sink(Event("note", name, message=name))
        before = bench.cost
        result = work()
        self.costs.append((name, bench.cost - before))
        return result

    def _circuit(self, bench: Bench, effects: Effects) -> Circuit:
        found = find_circuit(bench, effects, self.blocks)
        stored = self.blocks.get("edges", lambda: _edge_arrays(find_edges(bench, found.members)))
        edges = zip(stored["source"], stored["target"], stored["weight"], strict=True)
        return replace(found, edges=tuple(Edge(str(s), str(t), float(w)) for s, t, w in edges))

    def _context(self, bench: Bench, circuit: Circuit) -> Context:
        made = Context.of(bench, circuit.members, study=self.question.name, n=self.question.sizes["validation"])
        return replace(made, parents=self._parents(), seed=self.options.seed)

    def _parents(self) -> tuple[str, ...]:
        """Hashes of the data that claims are made from: the whole discovery split, failed templates too."""
        return tuple(pairs.content_hash for pairs in self.question.split("discovery").values())

    def _claims(self, bench: Bench, circuit: Circuit, found: Descriptions) -> list[Claim]:
        total = self._ablated(bench)
        return [*found.claims, *circuit_claims(bench, circuit.members, total, self.options.random_sets, self._common())]

    def _common(self) -> dict[str, Any]:
        return {
            "n": self.question.sizes["validation"], "seed": self.options.seed, "parents": self._parents(),
            "study": self.question.name, "subject_model": self.model.content_hash,
        }  # fmt: skip

    def _ablated(self, bench: Bench) -> float:
        """Mean effect of giving every component its corrupted value, in logits (discovery)."""
        nothing: list[tuple[Site, ...]] = [()]
        empty = bench.stored(self.blocks, "nothing kept", lambda: {"values": kept(bench, nothing, "resample")[0]})[
            "values"
        ]
        return float(np.mean(bench.metric("clean").double().numpy() - empty))

    def _test(self, ledger: Ledger, family: Family, circuit: Circuit) -> Tested:
        self.sink(Event("note", "validate", message="validate"))
        opened = {name: ledger.open(pairs, "validation") for name, pairs in self.question.corruptions.items()}
        passed = gate(self.model, opened[self.question.main], "validation")
        rows = passed.rows if len(passed.rows) >= FEWEST_ROWS else list(range(len(passed.labels)))
        bench = self.bench({name: pairs.subset(rows) for name, pairs in opened.items()})
        provenance = {
            "data_hash": opened[self.question.main].content_hash, "model_hash": self.model.content_hash, "plan_hash": self.plan,
            "version": __version__,
        }  # fmt: skip
        return measure_claims(ledger, family, circuit, bench, passed, self.blocks, self.options.random_sets, provenance)


def _edge_arrays(edges: tuple[Edge, ...]) -> dict[str, Any]:
    return {
        "source": np.array([e.source for e in edges], dtype=np.str_),
        "target": np.array([e.target for e in edges], dtype=np.str_),
        "weight": np.array([e.weight for e in edges], dtype=np.float64),
    }
