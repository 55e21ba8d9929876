"""A medical case with a planted shortcut: what a network that looks excellent rests on, and what that does elsewhere.

    audit       what a look at the single columns shows, before any network
    inspect     attributions, probes and concepts on the patients that the network was fitted to
    seal        what it uses, what the mark does, and what erasing it repairs, as claims
    validate    tested on fresh patients of the same hospital, and of another one
    compare     plain baselines beside each step

The patients are those of the Wisconsin cytology data (Street, Wolberg and Mangasarian 1993); which hospital they are of
is made up, and so is the scanner's mark: at home it goes with malignancy, elsewhere every image has it. Nothing here
is medical advice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vesalius import __version__
from vesalius.concepts import fit_rows
from vesalius.data import builtin_table
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
from vesalius.seeds import generator_for
from vesalius.site import Site
from vesalius.stats import Measurement, measure_share
from vesalius.studies.study import Artefact, Options, Step, Study, Work, append_evidence, run_in
from vesalius.studies.task_circuit import FAMILY

ELSEWHERE = "elsewhere"
MARK = "scanner mark"
LABELLED = "scanner mark, by labels"
COLUMN_HELD = "{}: with the mark's column held between its two levels, more patients of the other hospital are right"
ERASED = "network: with the mark's direction (found by {}) erased inside, more patients of the other hospital are right"
CONCEPTS: Mapping[str, tuple[str, ...]] = {
    "size": ("mean radius", "mean perimeter", "mean area"),
    "irregularity": ("mean compactness", "mean concavity", "mean concave points"),
    "texture": ("mean texture", "mean smoothness"),
}
"""What a pathologist looks at in the nuclei, as groups of columns."""
AT_HOME = 0.98
"""Share of patients at home whose mark goes with the diagnosis."""
SIZES = {DISCOVERY: 200, VALIDATION: 170}
"""Patients; all others are of the other hospital."""
HIDDEN = Site("module", module="hidden.0")
WIDTH, STEPS, DECAY = 16, 200, 0.1
LEAST_GAIN, LEAST_AUROC, LEAST_ODDS, LEAST_SHARE, LEAST_LOSS = 0.03, 0.15, 1.0, 0.05, 0.02
"""Smallest worth claiming: share of patients that become right, AUROC over one half, log-odds, and shares of what
exchanging everything does (to the answer, and to the loss)."""


@dataclass(frozen=True, eq=False)
class Shortcut:
    """The question, with the patients; planted: whether the mark goes with malignancy at home."""

    table: Table
    seed: int = 0
    planted: bool = True
    name: str = "shortcut"

    @property
    def text(self) -> str:
        """The question in words."""
        return "Does a network that tells malignant from benign use what pathologists use, or a mark of the scanner?"

    def plan(self) -> dict[str, Any]:
        """What the question is, for hashing."""
        return {"table": self.table.content_hash, "seed": self.seed, "planted": self.planted, "name": self.name}


def shortcut_question(seed: int = 0, *, planted: bool = True) -> Shortcut:
    """The case. seed: for who is of which hospital, the mark, and the network's first weights. planted: False leaves
    the mark without any connection at home, a control on which nothing should be found."""
    whole = builtin_table("breast_cancer")
    columns = whole.columns[:10]
    generator = generator_for("patients", seed)
    order = torch.randperm(len(whole), generator=generator)
    ends = np.cumsum(list(SIZES.values()))
    splits = np.array([DISCOVERY, VALIDATION, ELSEWHERE])[np.searchsorted(ends, np.arange(len(whole)), side="right")]
    target = whole.target[order]
    with_it = torch.rand(len(whole), generator=generator) < AT_HOME
    coin = torch.rand(len(whole), generator=generator) < 0.5
    home = torch.from_numpy(splits != ELSEWHERE)
    marked = torch.where(home, (with_it == target.bool()) if planted else coin, True)
    shade = 0.5 + 0.25 * (2.0 * marked - 1) + 0.075 * torch.randn(len(whole), generator=generator)
    values = torch.cat([whole.values[order][:, :10], shade[:, None]], 1)
    labels = {MARK: tuple("marked" if one else "clean" for one in marked.tolist())}
    patients = tuple(f"patient {number}" for number in order.tolist())
    table = Table(
        values, (*columns, MARK), target, whole.classes, labels, {"patient": patients}, tuple(splits), "cytology"
    )
    return Shortcut(_with_concepts(table), seed, planted)


def _with_concepts(table: Table) -> Table:
    """Labels large or small of every concept: over or under the median of its standardised columns on discovery."""
    own = torch.tensor([split == DISCOVERY for split in table.splits])
    rows = (table.values - table.values[own].mean(0)) / table.values[own].std(0)
    labels = dict(table.labels)
    for name, columns in CONCEPTS.items():
        level = rows[:, [table.column(one) for one in columns]].mean(1)
        high = level > level[own].median()
        labels[name] = tuple("large" if one else "small" for one in high.tolist())
    return replace(table, labels=labels)


@dataclass(frozen=True, eq=False)
class Audit:
    """What single columns show on discovery: AUROC of each for malignancy, either way round, the best first."""

    aurocs: tuple[tuple[str, float], ...]
    majority: float


@dataclass(frozen=True, eq=False)
class Inspection:
    """On discovery. attributed: share of the integrated gradients (absolute) of each column, the largest first;
    permuted: nats that each column's exchange costs; directions: of the mark and every concept, in the hidden layer;
    columns: the mark's column, and those of every concept, as parts; gam: an additive model of the same patients."""

    attributed: tuple[tuple[str, float], ...]
    permuted: tuple[tuple[str, float], ...]
    directions: Mapping[str, Direction]
    columns: Mapping[str, Part]
    gam: Fitted


@dataclass(frozen=True, eq=False)
class Comparison:
    """Accuracies by model and place, sensitivity and specificity of the network, and the baselines.

    accuracy: name -> place -> Measurement; rates: place -> "sensitivity", "specificity" -> Measurement.
    """

    accuracy: Mapping[str, Mapping[str, Measurement]]
    rates: Mapping[str, Mapping[str, Measurement]]


AUDIT = Artefact("audit", Audit)
INSPECTION = Artefact("inspection", Inspection)
TESTED = Artefact("tested", dict)
COMPARISON = Artefact("comparison", Comparison)


def network_of(asked: Shortcut) -> Fitted:
    """The network that the study is about, fitted to the discovery patients."""
    return fit_mlp(asked.table.split(DISCOVERY), hidden=(WIDTH,), steps=STEPS, decay=DECAY, seed=asked.seed)


def _audit(work: Work[Shortcut]) -> Audit:
    table = work.question.table.split(DISCOVERY)
    sick = table.target.bool()
    found = {name: 0.5 + abs(auroc(column[sick], column[~sick])[0]) for name, column in _columns(table)}
    share = float(sick.double().mean())
    return Audit(_largest(found), max(share, 1 - share))


def _columns(table: Table) -> list[tuple[str, Tensor]]:
    return [(name, table.values[:, number].double()) for number, name in enumerate(table.columns)]


def _largest(found: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(found.items(), key=lambda pair: -abs(pair[1])))


def _inspect(work: Work[Shortcut]) -> Inspection:
    table = work.ledger.open(work.question.table, DISCOVERY)
    runs = Runs(work.model, table, seed=work.question.seed)
    gradients = integrated_gradients(work.model.module, table.values, steps=64).abs().mean(0)
    shares = (gradients / gradients.sum()).tolist()
    permuted = {name: runs.mean(HELPS.measure(runs, column_part(table, name), {})) for name in table.columns}
    hidden = work.model.run(table.values, capture=HIDDEN)[HIDDEN]
    directions = {LABELLED: _by_labels(hidden, table, MARK, LABELLED)}
    directions |= {name: _by_labels(hidden, table, name, name) for name in CONCEPTS}
    directions[MARK] = Direction(HIDDEN, _moved_by_the_mark(work.model, table)[0], MARK)
    gam = fit_gam(table, seed=work.question.seed)
    attributed = _largest(dict(zip(table.columns, shares, strict=True)))
    columns = {name: column_part(table, *CONCEPTS.get(name, (name,)), label=name) for name in (MARK, *CONCEPTS)}
    return Inspection(attributed, _largest(permuted), directions, columns, gam)


def _by_labels(hidden: Tensor, table: Table, name: str, label: str) -> Direction:
    """The difference of class means."""
    some = torch.tensor([one in ("marked", "large") for one in table.label(name)])
    return Direction(HIDDEN, hidden[some].mean(0) - hidden[~some].mean(0), label)


def _moved_by_the_mark(model: Model, table: Table) -> tuple[Tensor, Tensor]:
    """What putting the mark on the image of the same patient adds to the hidden layer, and the layer's mean over both
    versions. The diagnosis is the same in both, so that it is not taken along."""
    high, low = (model.run(_marked_as(table, one), capture=HIDDEN)[HIDDEN] for one in (True, False))
    return (high - low).mean(0), torch.cat([high, low]).mean(0)


def _marked_as(table: Table, marked: bool) -> Tensor:
    """The same patients, all with the mark as it is on average where it is, or where it is not."""
    values = table.values.clone()
    values[:, -1] = values[_marked(table) == marked, -1].mean()
    return values


def integrated_gradients(
    net: Callable[[Tensor], Tensor], values: Tensor, *, steps: int = 32, number: int = 1, against: int = 0
) -> Tensor:
    """[row, column] of the difference of two logits, from the mean row (Sundararajan et al. 2017, arXiv:1703.01365)."""
    start, total = values.mean(0), torch.zeros_like(values)
    for step in range(steps):
        at = (start + (step + 0.5) / steps * (values - start)).requires_grad_()
        logits = net(at)
        total += torch.autograd.grad((logits[:, number] - logits[:, against]).sum(), at)[0]
    return (values - start) * total / steps


def _seal(work: Work[Shortcut]) -> Family:
    asked, found = work.question, work[INSPECTION]
    table = work.ledger.open(asked.table, DISCOVERY)
    sizes = {name: asked.table.splits.count(name) for name in (VALIDATION, ELSEWHERE)}
    own, other = Runs(work.model, table, seed=asked.seed), Runs(found.gam.model, table, seed=asked.seed)
    claims: list[Claim] = []
    for name in (MARK, *CONCEPTS):
        part = found.columns[name]
        direction, value = found.directions[name], "marked" if name == MARK else "large"
        given = {"label": name, "value": value}
        claims += _claims(own, part, HELPS, {}, f"{name}: the diagnosis rests on it", sizes[VALIDATION])
        claims += _claims(own, direction, CARRIES, given, f"{name}: the hidden layer carries it", sizes[VALIDATION])
        answers = {**given, "answers": [[1], [0]]}
        claims += _claims(own, direction, MOVES, answers, f"{name}: the hidden layer uses it", sizes[VALIDATION])
    mark = found.columns[MARK]
    low, high = (float(_marked_as(table, one)[0, -1]) for one in (False, True))
    change = {"low": low, "high": high, "class": "malignant"}
    words = f"{MARK}: put on the image of the same patient, it raises the odds of malignant"
    claims += _claims(own, mark, RAISES, change, words, sizes[VALIDATION])
    for runs, part, at, words in _repairs(work, own, other, (low + high) / 2):
        claims += _claims(runs, part, REPAIRS, {"value": [at], "on": ELSEWHERE}, words, sizes[ELSEWHERE])
    return work.ledger.register(claims, study=asked.name)


def _repairs(work: Work[Shortcut], own: Runs, gam: Runs, middle: float) -> list[tuple[Runs, Part, float, str]]:
    """What is held, at which value, and what is claimed of it."""
    found, table = work[INSPECTION], own.data
    assert isinstance(table, Table)
    mark, pairs, labelled = found.columns[MARK], found.directions[MARK], found.directions[LABELLED]
    centre = _moved_by_the_mark(work.model, table)[1]
    ways = (
        (own, mark, middle, COLUMN_HELD.format("network")),
        (gam, mark, middle, COLUMN_HELD.format("additive model")),
        (own, pairs, float(centre @ pairs.vector), ERASED.format("patients with and without it")),
        (own, labelled, float(centre @ labelled.vector), ERASED.format("labels at home")),
    )
    return list(ways)


def _marked(table: Table) -> Tensor:
    return torch.tensor([one == "marked" for one in table.label(MARK)])


def _claims(runs: Runs, part: Part, of: Quantity, given: Mapping[str, Any], words: str, n: int) -> list[Claim]:
    """One claim, with the smallest effect worth claiming of its quantity."""
    mean = runs.mean(of.measure(runs, part, given))
    scale = of.scale_of(runs, part, given)
    whole = abs(scale or 0.0)
    sizes = {
        "helps": LEAST_LOSS * whole,
        "moves": LEAST_SHARE * whole,
        "carries": LEAST_AUROC,
        "raises": LEAST_ODDS,
        "repairs": LEAST_GAIN,
    }
    size = sizes[of.name]
    nulls = tuple((name, size / 2) for name in of.nulls(runs, part, given))
    # What is raised, and what is repaired, is compared with the patient as she is.
    control: Mapping[str, Any] | None = {} if of in (RAISES, REPAIRS) else None
    said = Prediction(of.name, given, mean, 1.0, f"{words}: {mean:+.3g}", words, 1, size, scale, nulls, control)
    setting = Discovery.of(runs, [part], study="shortcut", n=n)
    return [replace(claim, statement=words) for claim, _ in claims_of(Description(part, "", (said,)), setting)]


def _validate(work: Work[Shortcut]) -> dict[str, Evidence]:
    family, gam = work[FAMILY], work[INSPECTION].gam
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
    asked = work.question
    tables = {name: asked.table.split(name) for name in (DISCOVERY, VALIDATION, ELSEWHERE)}
    fit = tables[DISCOVERY]
    without = {name: _without_mark(table) for name, table in tables.items()}
    outputs: dict[str, Mapping[str, Tensor]] = {
        "network": _logits(work.model.module, tables),
        "network, mark erased from its hidden layer": _erased(work, tables),
        "network fitted again without the column": _logits(
            fit_mlp(without[DISCOVERY], hidden=(WIDTH,), steps=STEPS, decay=DECAY, seed=asked.seed).model.module,
            without,
        ),
        "additive model": _logits(work[INSPECTION].gam.model.module, tables),
        "logistic regression": _logits(fit_linear(fit, seed=asked.seed).model.module, tables),
        "logistic regression without the column": _logits(
            fit_linear(without[DISCOVERY], seed=asked.seed).model.module, without
        ),
    }
    accuracy = {
        name: {place: score_of(logits, tables[place]) for place, logits in of.items()} for name, of in outputs.items()
    }
    commonest = int(fit.target.double().mean() > 0.5)
    accuracy["commonest diagnosis"] = {
        place: measure_share("commonest", (table.target == commonest).numpy()) for place, table in tables.items()
    }
    return Comparison(accuracy, {place: _rates(outputs["network"][place], tables[place]) for place in tables})


def _without_mark(table: Table) -> Table:
    return replace(table, values=table.values[:, :-1], columns=table.columns[:-1])


def _logits(net: Callable[[Tensor], Tensor], tables: Mapping[str, Table]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: net(table.values).double() for name, table in tables.items()}


def _erased(work: Work[Shortcut], tables: Mapping[str, Table]) -> dict[str, Tensor]:
    """Logits after LEACE of the mark in the hidden layer, fitted on discovery."""
    fit = tables[DISCOVERY]
    eraser = fit_rows(work.model.run(fit.values, capture=HIDDEN)[HIDDEN].numpy(), _marked(fit).long().numpy(), "leace")
    edit = Erase(HIDDEN, reads=eraser.reads, writes=eraser.writes, centre=eraser.centre)
    return {name: work.model.run(table.values, interventions=[edit]).logits.double() for name, table in tables.items()}


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
    return run_in(out, plan, question, found.model, options, SHORTCUT, lambda made: _answer(question, made), sink)


def _answer(asked: Shortcut, made: Mapping[str, Any]) -> tuple[str, ...]:
    family, verdicts = made["family"], made["verdicts"]
    by = {claim.statement: verdict for claim, verdict in zip(family.claims, verdicts, strict=True)}
    own = made["comparison"].accuracy["network"]
    home, away = own[VALIDATION].estimate, own[ELSEWHERE].estimate
    rank = [name for name, _ in made["inspection"].attributed].index(MARK) + 1
    first = (
        f"On {own[VALIDATION].n} fresh patients of its own hospital the network is right in {home:.0%}, on "
        f"{own[ELSEWHERE].n} of another one in {away:.0%}."
    )
    used = by[f"{MARK}: the diagnosis rests on it"]
    second = f"That its diagnosis rests on the scanner's mark is {used.outcome}"
    second += f"; by attribution the mark is number {rank} of {len(asked.table.columns)} columns."
    held = [name for name in CONCEPTS if by[f"{name}: the diagnosis rests on it"].outcome == "SUPPORTED"]
    third = f"Of what pathologists use it rests on {', '.join(held)}." if held else (
        "That it rests on what pathologists use more than on as many other columns is not shown for any of "
        f"{', '.join(CONCEPTS)}."
    )  # fmt: skip
    return first, second, third, _repaired(by)


def _repaired(by: Mapping[str, Verdict]) -> str:
    found = next(verdict for words, verdict in by.items() if words.startswith(COLUMN_HELD.format("network")))
    gain = "" if found.estimate is None else f" ({found.estimate:+.0%} of patients)"
    return f"That taking the mark away repairs the diagnosis elsewhere is {found.outcome}{gain}."
