"""The study of a task: from a question to tested claims.

    gate        does the model do the task, overall and per template (discovery prompts)
    patching    exact effect of every component alone, all corruptions, both directions
    circuit     the smallest set by the stated rule, with measured edges
    describe    what the members are, on discovery; each description makes claims
    seal        all claims become one family in the ledger; only then
    validate    the validation split is opened, once, and every claim is tested on it against its controls

Every finished piece is kept on disk under the plan's hash: a killed study goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from vesalius import __version__
from vesalius.circuits import (
    Circuit,
    Effects,
    component_effects,
    edges_from_json,
    edges_to_json,
    find_circuit,
    find_edges,
)
from vesalius.describe import (
    GOES_FIRST,
    ROLES,
    WHERE_IT_ACTS,
    Descriptions,
    Discovery,
    causal,
    claims_of,
    describe,
    describe_circuit,
)
from vesalius.describe.circuit import needed_draws
from vesalius.jobs import Event, Sink
from vesalius.model import Model
from vesalius.protocol import Claim, Evidence, Family, content_hash
from vesalius.protocol.ledger import Ledger
from vesalius.quantities import TOTAL_EFFECT, Runs
from vesalius.quantities.circuit import ABLATIONS, Floats, PartSet, random_sets, stored
from vesalius.quantities.contrast import EMBED, Contrast
from vesalius.studies.answer import sentences
from vesalius.studies.forecast import expected_cost, power_note
from vesalius.studies.gate import FEWEST_ROWS, PREFERENCE, Gate, gate
from vesalius.studies.question import Question
from vesalius.studies.study import (
    Artefact,
    Options,
    Step,
    StoppedError,
    Study,
    Work,
    append_evidence,
    from_array,
    json_array,
    run_in,
)
from vesalius.validate import prepare

# Random sets under the ablations that no claim is about: for the page, where they are drawn beside the circuit.
DRAWS_TO_SHOW = 19

GATE = Artefact("gate", Gate)
DISCOVERY = Artefact("discovery", Runs)
EFFECTS = Artefact("effects", Effects)
CIRCUIT = Artefact("circuit", Circuit)
DESCRIPTIONS = Artefact("descriptions", Descriptions)
FAMILY = Artefact("family", Family)


@dataclass(frozen=True, eq=False)
class Tested:
    """What the validation split showed.

    with_only: ablation -> [set, example], the metric with only that set kept; set 0 is the circuit, set 1 nothing, the
    rest random. without: ablation -> [set, example], with the set ablated; set 0 is the circuit, set 1 everything. The
    embeddings are not among what is removed (but in set 1): without them there is no prompt, and any set would do.
    smaller: [member, example], the circuit kept without that member (resample ablation of the rest). evidence: by
    claim.
    """

    runs: Runs
    gate: Gate
    with_only: Mapping[str, Floats]
    without: Mapping[str, Floats]
    smaller: Floats
    evidence: Mapping[str, Evidence]


TESTED = Artefact("tested", Tested)


def _gate(work: Work[Question]) -> Gate:
    """On discovery. Stops the study of a model that does not do the task, unless told to go on."""
    found = gate(work.model, work.question.split("discovery")[work.question.main], "discovery")
    if found.passed or work.options.past_gate:
        return found
    raise StoppedError(
        f"{work.model.name} prefers the answer to the distractor in {found.preference.estimate:.0%} of "
        f"{found.preference.n} discovery prompts, with a mean logit difference of {found.logit_diff.estimate:+.2f} "
        f"(needed: {PREFERENCE:.0%}, above 0, and {FEWEST_ROWS} prompts of templates that it gets right): it does not "
        "do this task well enough for its mechanism to be looked for. --past-gate (past_gate=True) goes on all the "
        "same.",
        found,
    )


def _opened(work: Work[Question], split: str) -> Contrast:
    """A split of every corruption, from the ledger, which records what claims are made from and tested on."""
    opened = {name: work.ledger.open(pairs, split) for name, pairs in work.question.corruptions.items()}
    return replace(work.question.contrast(split), corruptions=opened)


def _runs(work: Work[Question], contrast: Contrast, split: str) -> Runs:
    """Runs by the study's options; what is measured on them is kept under the split's name."""
    return Runs(
        work.model,
        contrast,
        components=work.question.components,
        seed=work.options.seed,
        check=work.options.check,
        sink=work.sink,
        blocks=work.blocks,
        name=split,
    )


def _record(work: Work[Question]) -> Runs:
    """Runs on the discovery prompts of templates that passed; says what the study will cost, and what it can decide."""
    runs = _runs(work, _opened(work, "discovery").subset(work[GATE].used), "discovery")
    expected = expected_cost(runs, work.options.random_sets, DRAWS_TO_SHOW, work.question.sizes["validation"])
    work.sink(Event("note", "cost", message=f"expected cost: {expected.describe()}"))
    for sentence in power_note(work.question):
        work.sink(Event("note", "power", message=sentence))
    return runs


def _patching(work: Work[Question]) -> Effects:
    with work.counting(work[DISCOVERY]):
        return component_effects(work[DISCOVERY])


def _circuit(work: Work[Question]) -> Circuit:
    runs = work[DISCOVERY]
    with work.counting(runs):
        found = find_circuit(runs, work[EFFECTS])
        kept = runs.stored("edges", lambda: json_array(edges_to_json(find_edges(runs, found.members))))
    return replace(found, edges=edges_from_json(from_array(kept), found.members))


def _describe(work: Work[Question]) -> Descriptions:
    """The members' descriptions and every claim of the study, kept with every digit.

    A study that is resumed on another machine, or with another number of threads, must find the very same ones, so they
    are read back and never made again.
    """
    runs, members = work[DISCOVERY], work[CIRCUIT].members

    def make() -> dict[str, NDArray[Any]]:
        setting = replace(
            Discovery.of(runs, members, study=work.question.name, n=work.question.sizes["validation"]),
            seed=work.options.seed,
        )
        found = describe(setting, ROLES, GOES_FIRST, WHERE_IT_ACTS)
        whole = describe_circuit(setting, members, work.options.random_sets)
        claims = [*_of_members(setting, found), *claims_of(whole, setting)]
        estimates = {claim.id: mean for claim, mean in claims}
        return json_array(replace(found, claims=tuple(c for c, _ in claims), estimates=estimates).to_json())

    with work.counting(runs):
        kept = runs.stored("descriptions and claims", make)
    return Descriptions.from_json(from_array(kept), *members)


def _of_members(setting: Discovery, found: Descriptions) -> list[tuple[Claim, float]]:
    """The claims of every member's role, and that the member matters, where no role says so already."""
    claims: list[tuple[Claim, float]] = []
    for member in setting.members:
        fit = found.fits[str(member)]
        role = claims_of(fit, setting) if fit is not None else ()
        claims += role
        plain = causal(setting, member)
        if plain is not None and all(claim.quantity != TOTAL_EFFECT.name for claim, _ in role):
            claims += claims_of(plain, setting)
    return claims


def _seal(work: Work[Question]) -> Family:
    family = work.ledger.register(work[DESCRIPTIONS].claims, study=work.question.name)
    work[DISCOVERY].forget()
    return family


def _validate(work: Work[Question]) -> Tested:
    contrast = _opened(work, "validation")
    passed = gate(work.model, contrast.pairs, "validation")
    # All of its prompts: to leave out what the model gets wrong would choose the test data by their outcome.
    runs = _runs(work, contrast, "validation")
    with work.counting(runs):
        return test_family(
            work.ledger, work[FAMILY], work[CIRCUIT], runs, passed, work.options.random_sets, work.blocks.plan_hash
        )


TASK_CIRCUIT: tuple[Step[Any], ...] = (
    Step("gate", GATE, _gate),
    Step("record", DISCOVERY, _record),
    Step("patching", EFFECTS, _patching),
    Step("circuit", CIRCUIT, _circuit),
    Step("describe", DESCRIPTIONS, _describe),
    Step("seal", FAMILY, _seal),
    Step("validate", TESTED, _validate),
)


def run_study(
    question: Question,
    model: Model,
    *,
    out: Path | None = None,
    options: Options | None = None,
    steps: Sequence[Step[Any]] = TASK_CIRCUIT,
    sink: Sink | None = None,
) -> Study:
    """Run or resume a study. out: folder for blocks and ledger (None: nothing is kept). sink: None shows progress.

    A model that does not do the task gives a Study whose `stopped` says so (unless options.past_gate). Raises
    InputError when `out` holds another study, or clean and corrupted prompts do not differ in their effect.
    """
    chosen = options or Options()
    return run_in(out, _plan(question, model, chosen), question, model, chosen, steps, sentences, sink)


def _plan(question: Question, model: Model, options: Options) -> str:
    """What a study computes, as a hash. Going past the gate is left out: it changes whether, not what."""
    knobs = {name: getattr(options, name) for name in ("random_sets", "seed", "control")}
    return content_hash({**question.plan(), **knobs, "model": model.content_hash, "version": __version__})


def test_family(
    ledger: Ledger,
    family: Family,
    circuit: Circuit,
    runs: Runs,
    passed: Gate,
    draws: int,
    plan_hash: str,
    *,
    other_model: bool = False,
) -> Tested:
    """Measure everything the family claims, once, and append one piece of evidence per claim.

    Claims that have their evidence (a resumed study) are not measured again.
    """
    measured = _circuit_runs(circuit, runs, draws)
    # All of them, also those that are done: what this finds is kept, and its cost must not depend on interruptions.
    prepare(family.claims, runs)
    data_hash = runs.pairs.content_hash
    evidence = append_evidence(ledger, family.claims, runs, plan_hash, data_hash, other_model=other_model)
    runs.forget()
    return Tested(runs, passed, *measured, evidence)


def _circuit_runs(circuit: Circuit, runs: Runs, draws: int) -> tuple[dict[str, Floats], dict[str, Floats], Floats]:
    """What the circuit and random sets do alone, what is lost without them, and the circuit without each member."""
    members = circuit.members
    random = random_sets(runs, members, draws, runs.seed)
    others = random_sets(runs, members, needed_draws(draws), runs.seed, outside=True)
    alone, lost = {}, {}
    for ablation in ABLATIONS:
        claimed = ablation == "resample"
        drawn, compared = (random, others) if claimed else (random[:DRAWS_TO_SHOW], [])
        alone[ablation] = stored(runs, "with only", [members, (), *drawn], ablation)
        parts = [tuple(part for part in some if part != EMBED) for some in (members, *compared)]
        lost[ablation] = stored(runs, "without", [parts[0], runs.components, *parts[1:]], ablation)
    smaller: list[PartSet] = [tuple(m for m in members if m != part) for part in members]
    return alone, lost, stored(runs, "with only", smaller, "resample")
