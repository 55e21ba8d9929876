"""A medical case with a planted shortcut: what a network that looks excellent rests on, and what that does elsewhere.

    audit       what a look at the single columns shows, before any network
    inspect     attribution, probes and concepts on the patients that the network was fitted to
    seal        what it uses, what the mark does, and what taking it away repairs, as claims
    validate    tested on fresh patients of the same hospital, and of another one
    compare     plain baselines beside each step

`vesalius.studies.cytology` has the patients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius import __version__
from vesalius.attribution import Explanation, examine, explain
from vesalius.concepts import fit_rows
from vesalius.concepts.erasure import Eraser
from vesalius.describe import Description, Prediction, claims_of
from vesalius.describe.description import Discovery
from vesalius.directions import Direction
from vesalius.inputs import Table
from vesalius.inputs.table import DISCOVERY, VALIDATION
from vesalius.interpretable import Fitted, fit_gam, fit_linear, fit_mlp
from vesalius.interpretable.fitted import score_of
from vesalius.intervention import Erase
from vesalius.jobs import Sink
from vesalius.model import Model
from vesalius.parts import Part
from vesalius.protocol import Claim, Evidence, Family, Verdict, content_hash
from vesalius.quantities import CARRIES, HELPS, MOVES, RAISES, REPAIRS, Quantity, Runs, column_part
from vesalius.quantities.pseudo_values import auroc
from vesalius.stats import Measurement, measure_share
from vesalius.studies.cytology import (
    CONCEPTS,
    DECAY,
    ELSEWHERE,
    FIRST,
    HIDDEN,
    MARK,
    STEPS,
    WIDTH,
    Shortcut,
    marked,
    marked_as,
    network_of,
    shortcut_question,
)
from vesalius.studies.study import Artefact, Options, Step, Study, Work, append_evidence, run_in
from vesalius.studies.task_circuit import FAMILY

BY_PAIRS, BY_LABELS = "the same patients with and without it", "its labels at home"
RESTS, CARRIED, USED = "the diagnosis rests on it", "the hidden layer carries it", "the hidden layer uses it"
PUT_ON = "put on the image of the same patient, it raises the odds of malignant"
COLUMN_HELD = "{}: with the mark's column held between its two levels, more patients of the other hospital are right"
ERASED = "network: with the mark erased inside (found by {}), more patients of the other hospital are right"
LEAST_GAIN, LEAST_AUROC, LEAST_ODDS, LEAST_SHARE, LEAST_LOSS = 0.02, 0.15, 1.0, 0.05, 0.02
"""Smallest worth claiming: share of patients that become right, AUROC over one half, log-odds, and shares of what
exchanging everything does (to the answer, and to the loss)."""
METHODS = ("integrated_gradients", "deep_lift", "shapley", "lime")
EXPLAINED, BACKGROUND = 12, 20
"""Patients whose diagnosis is explained one by one, and patients that they are compared with."""


@dataclass(frozen=True, eq=False)
class Audit:
    """What single columns show on discovery: AUROC of each for malignancy, either way round, the best first."""

    aurocs: tuple[tuple[str, float], ...]


@dataclass(frozen=True, eq=False)
class Inspection:
    """On discovery.

    attributed: method -> mean share of each column in the explanations of single patients, the largest first. beats:
    share of those patients for whom taking columns out in the order of integrated gradients beats 95 % of random
    orders. permuted: nats that each column's exchange costs. columns: the mark's column, and those of every concept.
    directions: of the mark and of every concept, in the hidden layer. erasers: of the mark there, by how it was found.
    gam: an additive model.
    """

    attributed: Mapping[str, tuple[tuple[str, float], ...]]
    beats: Measurement
    permuted: tuple[tuple[str, float], ...]
    columns: Mapping[str, Part]
    directions: Mapping[str, Direction]
    erasers: Mapping[str, Eraser]
    gam: Fitted


@dataclass(frozen=True, eq=False)
class Comparison:
    """accuracy: model -> split -> Measurement; rates of the network: split -> sensitivity and specificity."""

    accuracy: Mapping[str, Mapping[str, Measurement]]
    rates: Mapping[str, Mapping[str, Measurement]]


AUDIT = Artefact("audit", Audit)
INSPECTION = Artefact("inspection", Inspection)
TESTED = Artefact("tested", dict)
COMPARISON = Artefact("comparison", Comparison)


def _audit(work: Work[Shortcut]) -> Audit:
    table = work.ledger.open(work.question.table, DISCOVERY)
    sick = table.target.bool()
    columns = zip(table.columns, table.values.double().T, strict=True)
    return Audit(_largest({name: 0.5 + abs(auroc(column[sick], column[~sick])[0]) for name, column in columns}))


def _largest(found: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(found.items(), key=lambda pair: -abs(pair[1])))


def _inspect(work: Work[Shortcut]) -> Inspection:
    table = work.ledger.open(work.question.table, DISCOVERY)
    runs = Runs(work.model, table, seed=work.question.seed)
    explained = {method: _explained(work.model, table, method) for method in METHODS}
    better = [examine(one, randomise=False).deletion.p <= 0.05 for one in explained[METHODS[0]]]
    permuted = {name: runs.mean(HELPS.measure(runs, column_part(table, name), {})) for name in table.columns}
    names = (MARK, *CONCEPTS)
    return Inspection(
        {method: _shares(some) for method, some in explained.items()},
        measure_share("deletion beats random orders", better),
        _largest(permuted),
        {name: column_part(table, *CONCEPTS.get(name, (name,)), label=name) for name in names},
        {name: _direction(work.model, table, name) for name in names},
        _erasers(work.model, table),
        fit_gam(table, seed=work.question.seed),
    )


def _explained(model: Model, table: Table, method: str) -> list[Explanation]:
    """Why the odds of malignant are what they are, for the first patients, each against the others."""
    rows, given = table.values[:EXPLAINED], table.values[-BACKGROUND:]
    return [explain(model.module, row, _odds, method=method, baseline=given, names=table.columns) for row in rows]


def _odds(logits: Tensor) -> Tensor:
    return logits[:, 1] - logits[:, 0]


def _shares(explained: Sequence[Explanation]) -> tuple[tuple[str, float], ...]:
    """Mean share of every column in the sizes of an explanation's numbers."""
    sizes = torch.stack([one.shares.abs() / one.shares.abs().sum() for one in explained]).mean(0)
    return _largest(dict(zip(explained[0].names, sizes.tolist(), strict=True)))


def _direction(model: Model, table: Table, name: str) -> Direction:
    """Of a concept the difference of class means; of the mark what putting it on the same patients adds, which the
    diagnosis has no part in."""
    if name == MARK:
        high, low = (hidden(model, marked_as(table, one)).mean(0) for one in (True, False))
        return Direction(HIDDEN, high - low, MARK)
    found, large = hidden(model, table.values), torch.tensor([one == "large" for one in table.label(name)])
    return Direction(HIDDEN, found[large].mean(0) - found[~large].mean(0), name)


def hidden(model: Model, values: Float[Tensor, "row column"]) -> Float[Tensor, "row unit"]:
    """What the hidden layer holds for these patients."""
    return model.run(values, capture=HIDDEN)[HIDDEN]


def _erasers(model: Model, table: Table) -> dict[str, Eraser]:
    """LEACE of the mark in the hidden layer: from the same patients with and without it, and from its labels."""
    both = torch.cat([hidden(model, marked_as(table, one)) for one in (True, False)])
    which = torch.cat([torch.ones(len(table)), torch.zeros(len(table))]).long()
    own = hidden(model, table.values)
    return {
        BY_PAIRS: fit_rows(both.numpy(), which.numpy(), "leace"),
        BY_LABELS: fit_rows(own.numpy(), marked(table).long().numpy(), "leace"),
    }


def _seal(work: Work[Shortcut]) -> Family:
    asked, found = work.question, work[INSPECTION]
    table = work.ledger.open(asked.table, DISCOVERY)
    fresh, away = (asked.table.splits.count(name) for name in (VALIDATION, ELSEWHERE))
    own, gam = Runs(work.model, table, seed=asked.seed), Runs(found.gam.model, table, seed=asked.seed)
    claims: list[Claim] = []
    for name in (MARK, *CONCEPTS):
        direction, given = found.directions[name], {"label": name, "value": "marked" if name == MARK else "large"}
        claims += _claims(own, found.columns[name], HELPS, {}, f"{name}: {RESTS}", fresh)
        claims += _claims(own, direction, CARRIES, given, f"{name}: {CARRIED}", fresh)
        if name == MARK:
            # A concept's direction goes with the diagnosis, so that exchanging it says nothing about the concept.
            claims += _claims(own, direction, MOVES, {**given, "answers": [[1], [0]]}, f"{name}: {USED}", fresh)
    low, high = (float(marked_as(table, one)[0, -1]) for one in (False, True))
    change = {"low": low, "high": high, "class": "malignant"}
    mark = found.columns[MARK]
    claims += _claims(own, mark, RAISES, change, f"{MARK}: {PUT_ON}", fresh)
    held = {"value": [(low + high) / 2], "on": ELSEWHERE}
    claims += _claims(own, mark, REPAIRS, held, COLUMN_HELD.format("network"), away)
    claims += _claims(gam, mark, REPAIRS, held, COLUMN_HELD.format("additive model"), away)
    for how, eraser in found.erasers.items():
        part, given = erasing(eraser, how)
        claims += _claims(own, part, REPAIRS, {**given, "on": ELSEWHERE}, ERASED.format(how), away)
    return work.ledger.register(claims, study=asked.name)


def erasing(eraser: Eraser, label: str) -> tuple[Direction, dict[str, Any]]:
    """An eraser of one dimension as a direction that is held, and moved along another vector."""
    reads, writes = eraser.reads[0].float(), eraser.writes[0].float()
    part = Direction(HIDDEN, reads, label)
    along = (writes * reads.norm()).tolist()
    return part, {"value": [float(eraser.centre.float() @ part.vector)], "along": along}


def _claims(runs: Runs, part: Part, of: Quantity, given: Mapping[str, Any], words: str, n: int) -> list[Claim]:
    """One claim, of the sign that the words say, with the smallest effect worth claiming of its quantity."""
    mean, scale = runs.mean(of.measure(runs, part, given)), of.scale_of(runs, part, given)
    whole = abs(scale or 0.0)
    sizes = {"helps": LEAST_LOSS * whole, "moves": LEAST_SHARE * whole, "carries": LEAST_AUROC}
    size = {**sizes, "raises": LEAST_ODDS, "repairs": LEAST_GAIN}[of.name]
    nulls = tuple((name, size / 2) for name in of.nulls(runs, part, given))
    # What is raised, and what is repaired, is compared with the same patient as she is.
    control: Mapping[str, Any] | None = {} if of in (RAISES, REPAIRS) else None
    said = Prediction(of.name, given, mean, 1.0, f"{words}: {mean:+.3g}", words, 1, size, scale, nulls, control)
    setting = Discovery.of(runs, [part], study="shortcut", n=n)
    return [replace(claim, statement=words) for claim, _ in claims_of(Description(part, "", (said,)), setting)]


def _validate(work: Work[Shortcut]) -> dict[str, Evidence]:
    family, gam = work[FAMILY], work[INSPECTION].gam
    # Directions are named by their numbers, and have to be there while they are tested.
    kept = [erasing(eraser, how)[0] for how, eraser in work[INSPECTION].erasers.items()]
    assert all(part.ref for part in kept)
    for split in (VALIDATION, ELSEWHERE):
        table = work.ledger.open(work.question.table, split)
        for model in (work.model, gam.model):
            some = [
                claim
                for claim in family.claims
                if claim.parameters.get("on", VALIDATION) == split and claim.subject["model_hash"] == model.content_hash
            ]
            runs = Runs(model, table, seed=work.question.seed, sink=work.sink, name=split)
            append_evidence(work.ledger, some, runs, work.blocks.plan_hash, table.content_hash)
    return {claim.id: work.ledger.evidence(claim)[-1] for claim in family.claims}


def _compare(work: Work[Shortcut]) -> Comparison:
    asked, found = work.question, work[INSPECTION]
    tables = {name: asked.table.split(name) for name in (DISCOVERY, VALIDATION, ELSEWHERE)}
    without = {
        name: replace(table, values=table.values[:, :-1], columns=table.columns[:-1]) for name, table in tables.items()
    }
    again = fit_mlp(without[DISCOVERY], hidden=(WIDTH,), steps=STEPS, decay=DECAY, seed=asked.seed + FIRST)
    plain = fit_linear(tables[DISCOVERY], seed=asked.seed)
    bare = fit_linear(without[DISCOVERY], seed=asked.seed)
    outputs = {"network": _logits(work.model.module, tables)}
    outputs |= {
        f"network, mark erased inside, by {how}": _erased(work, one, tables) for how, one in found.erasers.items()
    }
    outputs |= {
        "network fitted again without the column": _logits(again.model.module, without),
        "additive model": _logits(found.gam.model.module, tables),
        "logistic regression": _logits(plain.model.module, tables),
        "logistic regression without the column": _logits(bare.model.module, without),
    }
    accuracy = {name: {at: score_of(one, tables[at]) for at, one in of.items()} for name, of in outputs.items()}
    commonest = int(tables[DISCOVERY].target.double().mean() > 0.5)
    accuracy["commonest diagnosis for everyone"] = {
        at: measure_share("commonest", (table.target == commonest).numpy()) for at, table in tables.items()
    }
    return Comparison(accuracy, {at: _rates(outputs["network"][at], tables[at]) for at in tables})


def _logits(net: Callable[[Tensor], Tensor], tables: Mapping[str, Table]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: net(table.values).double() for name, table in tables.items()}


def _erased(work: Work[Shortcut], eraser: Eraser, tables: Mapping[str, Table]) -> dict[str, Tensor]:
    edit = Erase(HIDDEN, reads=eraser.reads, writes=eraser.writes, centre=eraser.centre)
    return {name: work.model.run(one.values, interventions=[edit]).logits.double() for name, one in tables.items()}


def _rates(logits: Tensor, table: Table) -> dict[str, Measurement]:
    sick, said = table.target.bool().numpy(), logits.argmax(1).bool().numpy()
    return {
        "sensitivity": measure_share("sensitivity", said[sick]),
        "specificity": measure_share("specificity", ~said[~sick]),
    }


SHORTCUT: tuple[Step[Any], ...] = (
    Step("audit", AUDIT, _audit),
    Step("inspect", INSPECTION, _inspect),
    Step("seal", FAMILY, _seal),
    Step("validate", TESTED, _validate),
    Step("compare", COMPARISON, _compare),
)


def run_shortcut(asked: Shortcut | None = None, *, out: Path | None = None, sink: Sink | None = None) -> Study:
    """Run or resume the medical case (`shortcut_question` makes it).

    out: folder for its pieces and the ledger (None: nothing is kept). Raises InputError when it holds another study.
    """
    question = asked or shortcut_question()
    found = network_of(question)
    plan = content_hash({**question.plan(), "model": found.model.content_hash, "version": __version__})
    options = Options(seed=question.seed)
    return run_in(out, plan, question, found.model, options, SHORTCUT, _answer, sink)


def _answer(made: Mapping[str, Any]) -> tuple[str, ...]:
    by = {claim.statement: one for claim, one in zip(made["family"].claims, made["verdicts"], strict=True)}
    own, inspected = made["comparison"].accuracy["network"], made["inspection"]
    ranks = [[name for name, _ in some].index(MARK) + 1 for some in inspected.attributed.values()]
    accuracy = (
        f"On {own[VALIDATION].n} fresh patients of its own hospital the network is right in "
        f"{own[VALIDATION].estimate:.0%}, on {own[ELSEWHERE].n} of another one in {own[ELSEWHERE].estimate:.0%}."
    )
    used = (
        f"That its diagnosis rests on the scanner's mark is {by[f'{MARK}: {RESTS}'].outcome}; in explanations of "
        f"single patients the mark is number {' or '.join(map(str, sorted(set(ranks))))} of "
        f"{len(next(iter(inspected.attributed.values())))} columns."
    )
    held = {name: by[f"{name}: {RESTS}"].outcome for name in CONCEPTS}
    concepts = "That it rests on a concept of pathologists, more than on as many other columns: " + ", ".join(
        f"{name} {outcome}" for name, outcome in held.items()
    )
    repairs = {
        words: by[words]
        for words in (COLUMN_HELD.format("network"), *(ERASED.format(h) for h in (BY_PAIRS, BY_LABELS)))
    }
    ways = zip(("the column held", f"erased inside by {BY_PAIRS}", f"by {BY_LABELS}"), repairs.values(), strict=True)
    repaired = "That taking the mark away repairs the diagnosis elsewhere: " + "; ".join(
        f"{way} {one.outcome}{_gain(one)}" for way, one in ways
    )
    return accuracy, used, f"{concepts}.", f"{repaired}."


def _gain(verdict: Verdict) -> str:
    return "" if verdict.estimate is None else f" ({verdict.estimate:+.0%} of patients)"
