"""Accuracy against interpretability: models that can be read, and a black box with explanations afterwards, on the same
tables.

    fit         every model on every table's discovery rows, and how well a reader would be served: see `Served`
    seal        for each model, what its strongest columns do, as claims of the same kind for all of them
    validate    tested on fresh rows
    score       accuracy on fresh rows, with plain baselines

Of every model, by design or not, the same is said and tested: which way a column pushes the answer, and that the answer
rests on it. What differs is how much of the model that tells: `fidelity`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vesalius import __version__
from vesalius.data import builtin_table
from vesalius.describe import Description, claims_of
from vesalius.describe.description import Discovery
from vesalius.errors import InputError
from vesalius.inputs import Table
from vesalius.inputs.table import DISCOVERY, VALIDATION
from vesalius.interpretable import (
    Fitted,
    KANConfig,
    describe_columns,
    fit_ebm,
    fit_gam,
    fit_kan,
    fit_linear,
    fit_mlp,
    weights_of,
)
from vesalius.interpretable.kan import equal_mlp
from vesalius.jobs import Sink, track
from vesalius.protocol import Evidence, Family, content_hash
from vesalius.quantities import Runs
from vesalius.stats import Measurement, measure, measure_share
from vesalius.studies.study import Artefact, Options, Step, Study, Work, append_evidence, run_in
from vesalius.studies.summary import short_row
from vesalius.studies.task_circuit import FAMILY

TABLES = ("breast_cancer", "wine", "iris", "diabetes")
SCHEMA = "vesalius/by-design/1"
STRONGEST = 3
"""Columns of each model about which claims are made."""
LINEAR, GAM, EBM, KAN, MLP = "linear", "additive (GAM)", "boosted (EBM)", "KAN", "MLP"
EQUAL_MLP = "MLP of the KAN's size"
CERTAIN = 7.0
"""Log-odds from which a model counts as certain."""
BY_DESIGN = (LINEAR, GAM, EBM, KAN)
Fit = Callable[[Table, int], Fitted]


def _kan(table: Table, seed: int) -> Fitted:
    return fit_kan(table, KANConfig(hidden=(2,), grids=(3,), steps=25, sparsity=0.003, seed=seed))


def _mlp(table: Table, seed: int, width: int) -> Fitted:
    """With few steps and a strong decay: longer, it learns these small tables by heart, and would be a straw man."""
    return fit_mlp(table, hidden=(width,), steps=100, decay=1.0, seed=seed)


FITS: Mapping[str, Fit] = {
    LINEAR: lambda table, seed: fit_linear(table, seed=seed),
    GAM: lambda table, seed: fit_gam(table, seed=seed),
    EBM: lambda table, seed: fit_ebm(table, rounds=300, seed=seed),
    KAN: _kan,
    MLP: lambda table, seed: _mlp(table, seed, 32),
}


@dataclass(frozen=True, eq=False)
class ByDesign:
    """The question, with the tables by name, each with splits."""

    tables: Mapping[str, Table]
    seed: int = 0
    name: str = "by-design"

    @property
    def text(self) -> str:
        """The question in words."""
        return "What does a model that can be read cost in accuracy, and what do explanations of a black box leave out?"

    def plan(self) -> dict[str, Any]:
        """What the question is, for hashing."""
        hashes = {name: table.content_hash for name, table in self.tables.items()}
        return {"tables": hashes, "seed": self.seed, "name": self.name, "fits": list(fits())}


def fits() -> dict[str, Fit]:
    """The models that can be fitted here: boosted ones where interpret-core is installed."""
    return {name: fit for name, fit in FITS.items() if name != EBM or find_spec("interpret") is not None}


def by_design_question(tables: Sequence[str] | Mapping[str, Table] = TABLES, *, seed: int = 0) -> ByDesign:
    """The question on some of scikit-learn's tables, by name, or on tables of your own.

    Raises UnknownNameError for another name, InputError for no tables.
    """
    found = tables if isinstance(tables, Mapping) else {name: builtin_table(name) for name in tables}
    if not found:
        raise InputError("no tables to compare models on")
    return ByDesign({name: one if one.splits else one.divided(seed) for name, one in found.items()}, seed)


@dataclass(frozen=True, eq=False)
class Served:
    """A model of one table. said: what is said of its columns; weights: numbers that were fitted; to_read: numbers a
    reader has to look at to know all that it does (of a black box, all of them)."""

    table: str
    model: str
    fitted: Fitted
    said: tuple[Description, ...]
    weights: int
    to_read: int


@dataclass(frozen=True, eq=False)
class Scored:
    """On fresh rows. fidelity: R² of a sum of column curves that was fitted to the model's own answers on discovery."""

    score: Measurement
    fidelity: Measurement


SERVED = Artefact("served", tuple)
TESTED = Artefact("tested", dict)
SCORES = Artefact("scores", dict)


def _fit(work: Work[ByDesign]) -> tuple[Served, ...]:
    asked, made = work.question, []
    wanted = [(name, table) for name, table in asked.tables.items()]
    for name, table in track(wanted, "fit models", sink=work.sink):
        some = work.ledger.open(table, DISCOVERY)
        found = {model: fit(some, asked.seed) for model, fit in fits().items()}
        width = equal_mlp(some, weights_of(found[KAN]))
        found[EQUAL_MLP] = _mlp(some, asked.seed, width)
        made += [_served(name, model, one, some, asked.seed) for model, one in found.items()]
    return tuple(made)


def _served(table: str, model: str, found: Fitted, rows: Table, seed: int) -> Served:
    said = describe_columns(Runs(found.model, rows, seed=seed), found)[:STRONGEST]
    weights = weights_of(found)
    return Served(table, model, found, said, weights, found.complexity if model in BY_DESIGN else weights)


def _seal(work: Work[ByDesign]) -> Family:
    asked, claims = work.question, []
    for one in work[SERVED]:
        table = asked.tables[one.table]
        runs = Runs(one.fitted.model, table.split(DISCOVERY), seed=asked.seed)
        n = table.splits.count(VALIDATION)
        setting = Discovery.of(runs, [said.part for said in one.said], study=asked.name, n=n)
        claims += [
            replace(claim, statement=f"{one.model}, {one.table}: {claim.statement}")
            for said in one.said
            for claim, _ in claims_of(said, setting)
        ]
    return work.ledger.register(claims, study=asked.name)


def _validate(work: Work[ByDesign]) -> dict[str, Evidence]:
    family = work[FAMILY]
    opened = {name: work.ledger.open(table, VALIDATION) for name, table in work.question.tables.items()}
    for one in work[SERVED]:
        table = opened[one.table]
        runs = Runs(one.fitted.model, table, seed=work.question.seed, name=VALIDATION)
        append_evidence(work.ledger, _of(family, one), runs, work.blocks.plan_hash, table.content_hash)
    return {claim.id: work.ledger.evidence(claim)[-1] for claim in family.claims}


def _of(family: Family, one: Served) -> list[Any]:
    return [claim for claim in family.claims if claim.subject["model_hash"] == one.fitted.model.content_hash]


def _score(work: Work[ByDesign]) -> dict[tuple[str, str], Scored]:
    found = {}
    for one in work[SERVED]:
        table = work.question.tables[one.table]
        fresh = table.split(VALIDATION)
        fidelity = fidelity_of(one.fitted, table.split(DISCOVERY), fresh)
        found[one.table, one.model] = Scored(one.fitted.score(fresh), fidelity)
    for name, table in work.question.tables.items():
        found[name, "commonest, or mean"] = Scored(_baseline(table), measure("fidelity", [0.0, 0.0]))
    return found


def fidelity_of(found: Fitted, rows: Table, fresh: Table) -> Measurement:
    """How much of what a model says on fresh rows a sum of curves of the columns says as well, R²; the curves are
    fitted to its answers on other rows.

    Of classes the logit of the last one less that of the first. A model that is a sum of curves has about 1; what a
    black box loses is what no list of column effects can tell. Certain is certain: past log-odds of 7 (1 in 1,000) all
    count alike.
    """
    surrogate = fit_gam(_answers(found, rows))
    both = [_answers(one, fresh).target.double() for one in (found, surrogate)]
    wanted, told = (one.clamp(-CERTAIN, CERTAIN) for one in both) if found.classes else both
    values = 1 - (told - wanted) ** 2 / wanted.var(correction=0)
    return measure("fidelity", values.numpy(), groups=fresh.groups, clusters=fresh.clusters)


def _answers(found: Fitted, table: Table) -> Table:
    """The table with the model's own answer as the number to predict."""
    logits = found.model.run(table.values.float()).logits.double()
    answer = logits[:, -1] - logits[:, 0] if logits.shape[1] > 1 else logits[:, 0]
    return replace(table, target=answer.float(), classes=(), splits=(), rows_of=None)


def _baseline(table: Table) -> Measurement:
    """The commonest class, or the mean, of discovery on fresh rows."""
    fit, fresh = table.split(DISCOVERY), table.split(VALIDATION)
    if table.classes:
        commonest = int(fit.target.mode().values)
        return measure_share("accuracy", (fresh.target == commonest).numpy())
    target = fresh.target.double()
    values = 1 - (target - fit.target.double().mean()) ** 2 / target.var(correction=0)
    return measure("R²", values.numpy())


BY_DESIGN_STEPS: tuple[Step[Any], ...] = (
    Step("fit", SERVED, _fit),
    Step("seal", FAMILY, _seal),
    Step("validate", TESTED, _validate),
    Step("score", SCORES, _score),
)


def run_by_design(asked: ByDesign | None = None, *, out: Path | None = None, sink: Sink | None = None) -> Study:
    """Run or resume the comparison (`by_design_question` makes it).

    out: folder for the ledger (None: nothing is kept). Raises InputError when it holds another study.
    """
    question = asked or by_design_question()
    first = next(iter(question.tables.values())).split(DISCOVERY)
    # A study is of one model; of these many, the black box of the first table stands for all in its name.
    model = FITS[MLP](first, question.seed).model
    plan = content_hash({**question.plan(), "model": model.content_hash, "version": __version__})
    options = Options(seed=question.seed)
    return run_in(out, plan, question, model, options, BY_DESIGN_STEPS, lambda made: _answer(question, made), sink)


def _answer(asked: ByDesign, made: Mapping[str, Any]) -> tuple[str, ...]:
    scores, sentences = made["scores"], []
    for table in asked.tables:
        own = {one.model: scores[table, one.model] for one in made["served"] if one.table == table}
        best = max((name for name in own if name in BY_DESIGN), key=lambda name: own[name].score.estimate)
        what = own[MLP].score.name
        sentences.append(
            f"{table}: the best model that can be read is the {best} one ({what} {own[best].score.estimate:.2f}), the "
            f"black box has {own[MLP].score.estimate:.2f}; column curves tell {own[best].fidelity.estimate:.0%} and "
            f"{own[MLP].fidelity.estimate:.0%} of what they say."
        )
    held = sum(verdict.outcome == "SUPPORTED" for verdict in made["verdicts"])
    return (*sentences, f"Of {len(made['verdicts'])} statements about columns {held} were supported on fresh rows.")


def summarise_by_design(study: Study, *, command: str, timings: Mapping[str, Any]) -> dict[str, Any]:
    """The summary as a dict: per table and model score, fidelity, sizes and how many of its claims held; per claim
    `verdict`, `estimate`, `interval` and `n`."""
    evidence, scores = study.get(TESTED) or {}, study[SCORES]
    rows = {
        claim.id: short_row(claim, verdict, evidence.get(claim.id))
        for claim, verdict in zip(study.claims, study.verdicts, strict=True)
    }
    models = []
    for one in study[SERVED]:
        claims = [rows[claim.id] for claim in _of(study["family"], one)]
        scored = scores[one.table, one.model]
        models.append({
            "table": one.table, "model": one.model, "by_design": one.model in BY_DESIGN,
            "score": _short(scored.score), "fidelity": _short(scored.fidelity), "weights": one.weights,
            "to_read": one.to_read, "claims": len(claims),
            "supported": sum(row["verdict"] == "SUPPORTED" for row in claims),
            "refuted": sum(row["verdict"] == "REFUTED" for row in claims),
            "said": [said.sentence for said in one.said],
        })  # fmt: skip
    tables = [
        {"name": name, "rows": len(table), "columns": len(table.columns), "classes": list(table.classes),
         "baseline": _short(scores[name, "commonest, or mean"].score)}
        for name, table in study.question.tables.items()
    ]  # fmt: skip
    return {
        "schema": SCHEMA,
        "question": study.question.text,
        "answer": list(study.answer),
        "tables": tables,
        "models": models,
        "claims": list(rows.values()),
        "missing": [name for name in FITS if name not in fits()],
        "seed": study.question.seed,
        "timings": {"sealed_at": study.sealed_at, "ledger_head": study.ledger_head or None, **timings},
        "command": command,
    }


def _short(found: Measurement) -> dict[str, Any]:
    return {name: getattr(found, name) for name in ("name", "estimate", "low", "high", "n")}
