"""The random-weights control: the same study on a model without mechanism, and the trained model's claims on it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vesalius import __version__
from vesalius.circuits import Circuit
from vesalius.jobs import Blocks, Sink, silent
from vesalius.jobs.progress import shown
from vesalius.model import Model
from vesalius.protocol import Evidence, Family, Verdict, content_hash
from vesalius.protocol.ledger import Ledger
from vesalius.quantities import Runs
from vesalius.studies.gate import gate
from vesalius.studies.question import Question
from vesalius.studies.study import Options, Study
from vesalius.studies.summary import claim_rows
from vesalius.studies.task_circuit import CIRCUIT, FAMILY, run_study, test_family
from vesalius.validate import reinitialised

RANDOM_WEIGHTS = "random-weights"


@dataclass(frozen=True, eq=False)
class Controlled:
    """A study and its random-weights control. control: None when the trained model's study stopped at the gate.

    rows: the trained model's claims on the control, as in a summary's `claims`.
    """

    trained: Study
    control: Study | None
    rows: tuple[Mapping[str, Any], ...] = ()

    def _repr_html_(self) -> str:
        if self.control is None:
            return self.trained._repr_html_()
        return f"<h4>trained</h4>{self.trained._repr_html_()}<h4>random weights</h4>{self.control._repr_html_()}"


def random_weights_control(
    question: Question,
    model: Model,
    *,
    out: Path | None = None,
    options: Options | None = None,
    sink: Sink | None = None,
) -> Controlled:
    """A study, the same study on the model with random weights (past its gate), and the trained model's claims there.

    out: folder of the control's study; the trained model's goes into `trained` inside. When that stops at the gate
    there is nothing to compare with. Raises as `run_study`.
    """
    chosen = options or Options()
    with shown(sink) as screen:
        trained = run_study(question, model, out=None if out is None else out / "trained", options=chosen, sink=screen)
        if trained.stopped:
            return Controlled(trained, None)
        blank = reinitialised(model, chosen.seed)
        rows = claims_on(trained, blank, out, screen)
        changed = replace(chosen, past_gate=True, control=RANDOM_WEIGHTS)
        return Controlled(trained, run_study(question, blank, out=out, options=changed, sink=screen), tuple(rows))


def claims_on(trained: Study, model: Model, folder: Path | None = None, sink: Sink = silent) -> list[dict[str, Any]]:
    """Rows (as in a summary's `claims`) of a finished study's claims, tested on another model.

    The same claims, data and controls; only the model differs, so whatever is supported here does not depend on what
    training made. folder: where the ledger and the finished pieces of this test are kept; None: nowhere. [] for a
    stopped study.
    """
    if FAMILY not in trained:
        return []
    plan = content_hash([trained[FAMILY].id, model.content_hash, trained.options.random_sets, __version__])
    with tempfile.TemporaryDirectory() as temporary:
        where = Path(temporary) if folder is None else folder
        where.mkdir(parents=True, exist_ok=True)
        blocks = Blocks(None if folder is None else where / "trained-claims", plan, sink)
        verdicts, evidence = _tested(trained, model, where / "trained-claims.sqlite", blocks, sink)
    return claim_rows(trained, verdicts, evidence)


def _tested(
    trained: Study, model: Model, path: Path, blocks: Blocks, sink: Sink
) -> tuple[tuple[Verdict, ...], Mapping[str, Evidence]]:
    """In a ledger of its own."""
    family: Family = trained[FAMILY]
    circuit: Circuit = trained[CIRCUIT]
    question = trained.question
    with Ledger(path) as ledger:
        for pairs in question.corruptions.values():
            ledger.open(pairs, "discovery")  # what the claims were made from
        on = {"study": f"{family.study}, on {model.name}", "control_model": model.content_hash}
        sealed = ledger.register(family.claims, **on)
        opened = {name: ledger.open(pairs, "validation") for name, pairs in question.corruptions.items()}
        contrast = replace(question.contrast("validation"), corruptions=opened)
        runs = Runs(
            model,
            contrast,
            components=question.components,
            seed=trained.options.seed,
            sink=sink,
            blocks=blocks,
            name="validation",
        )
        tested = test_family(
            ledger,
            sealed,
            circuit,
            runs,
            gate(model, contrast.pairs, "validation"),
            trained.options.random_sets,
            blocks.plan_hash,
            other_model=True,
        )
        return ledger.verdicts(sealed), tested.evidence
