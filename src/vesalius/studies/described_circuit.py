"""What the members of a circuit of edges do: descriptions, claims of one sealed family, and how much they say.

The steps are those of a task's study, with the circuit that was found in the place of the one that it would search for;
the last puts what the descriptions say in the place of the members, on the prompts that the claims were tested on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vesalius import __version__
from vesalius.circuits import Circuit
from vesalius.describe import NO_ROLE, described
from vesalius.errors import InputError
from vesalius.jobs import Sink
from vesalius.model import Model
from vesalius.protocol import content_hash
from vesalius.stats import Measurement
from vesalius.studies.answer import percent, stood
from vesalius.studies.question import Question
from vesalius.studies.study import Artefact, Options, Step, Study, Work, run_in
from vesalius.studies.summary import short_row
from vesalius.studies.task_circuit import CIRCUIT, DESCRIPTIONS, DISCOVERY, TASK_CIRCUIT, TESTED

DESCRIBED = Artefact("described", Measurement)
RANDOM_SETS = 19


def describe_members(
    question: Question,
    model: Model,
    circuit: Circuit,
    *,
    out: Path | None = None,
    options: Options | None = None,
    sink: Sink | None = None,
) -> Study:
    """Describe and test every member of a circuit of edges, or go on with it.

    Its artefacts: those of a task's study without the patching of all components, and `described`, the share of the
    effect that is kept when every member does what its description says and nothing else.

    Raises InputError for a circuit without members, or of another model, and when `out` holds another study.
    """
    if not circuit.members:
        raise InputError("the circuit is empty: there are no members to describe")
    if circuit.setting.get("model", model.content_hash) != model.content_hash:
        raise InputError(f"the circuit was found in another model than {model.name}")
    chosen = options or Options(random_sets=RANDOM_SETS, past_gate=True, check=False)
    knobs = {name: getattr(chosen, name) for name in ("random_sets", "seed")}
    found = replace(circuit, scores=None)
    plan = content_hash(
        {**question.plan(), **knobs, "circuit": found.to_json(), "model": model.content_hash, "version": __version__}
    )
    return run_in(out, plan, question, model, chosen, _steps(found), _sentences, sink)


def _steps(circuit: Circuit) -> tuple[Step[Any], ...]:
    own = {step.name: step for step in TASK_CIRCUIT}
    given = Step("circuit", CIRCUIT, lambda _work: circuit)
    first = (own["gate"], own["record"], given, own["describe"], own["seal"], own["validate"])
    return (*first, Step("described", DESCRIBED, _described))


def _described(work: Work[Question]) -> Measurement:
    """On the prompts that the claims were tested on, which are open by now."""
    return described(work[DISCOVERY], work[TESTED].runs, work[CIRCUIT].members, work[DESCRIPTIONS].fits)


def _sentences(made: Mapping[str, Any]) -> list[str]:
    if "described" not in made:
        return []
    kept = made["described"]
    told, count = kept.diagnostics["with_a_value"], kept.diagnostics["members"]
    return [
        f"With what the descriptions say in the place of all {count} heads and MLPs of the circuit, {percent(kept)} of "
        f"what they do together is kept on fresh prompts; {told} of them have a description that says what they give.",
        stood(made),
    ]


def summarise_members(study: Study) -> dict[str, Any]:
    """The part of a circuit's summary that says what its members do: `share`, `members`, `claims`, `answer`."""
    if study.stopped is not None:
        return {"answer": [study.stopped], "share": None, "members": [], "claims": []}
    kept, fits, tested = study[DESCRIBED], study[DESCRIPTIONS].fits, study[TESTED]
    rows = [
        short_row(claim, verdict, tested.evidence.get(claim.id), study[DESCRIPTIONS].estimates.get(claim.id))
        for claim, verdict in zip(study.claims, study.verdicts, strict=True)
    ]
    members = [
        {
            "component": name,
            "role": NO_ROLE if fit is None else fit.label,
            "sentence": "" if fit is None else fit.sentence,
        }
        for name, fit in fits.items()
    ]
    return {
        "answer": list(study.answer),
        "share": {"estimate": kept.estimate, "low": kept.low, "high": kept.high, "n": kept.n, **kept.diagnostics},
        "members": members,
        "claims": rows,
        "ledger_head": study.ledger_head,
    }
