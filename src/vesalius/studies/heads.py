"""The study of a model's heads in any text: where each looks and what it writes, tested on other documents.

read        attention of every head on the documents for discovery
describe    a role for each head that one fits; each makes claims
seal        all claims become one family in the ledger; only then
validate    the other documents are opened, and every claim is tested there against other heads
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vesalius import __version__
from vesalius.describe import HEADS_IN_TEXT, OTHERWISE_IN_TEXT, Description, Descriptions, Discovery, claimed_apart
from vesalius.describe import describe as best_descriptions
from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Corpus
from vesalius.jobs import Event, Sink
from vesalius.model import Model
from vesalius.parts import Part
from vesalius.protocol import Claim, Evidence, Family, Verdict, content_hash
from vesalius.quantities import TARGETS, Runs, heads_and_mlps
from vesalius.quantities.heads_in_text import seen_in, unreadable
from vesalius.studies.explain import by_subject, outcome_of
from vesalius.studies.explaining import RANDOM_NETWORK, Halves, halved
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
from vesalius.studies.summary import short_row
from vesalius.studies.task_circuit import DESCRIPTIONS, DISCOVERY, FAMILY
from vesalius.validate import reinitialised

SCHEMA = "vesalius/heads/1"
NO_ROLE_FITS = "looks nowhere in particular"
OF_A_DOCUMENT = 2
"""Contexts that are taken of one: a verdict counts documents, and every token of a context says something."""


@dataclass(frozen=True, eq=False)
class DescribingHeads:
    """The question of a study of heads in text. halves: the documents, for discovery and for validation."""

    heads: tuple[Part, ...]
    halves: Halves
    context: int
    baseline: str | None = None
    seed: int = 0
    name: str = "heads"

    @property
    def corpus(self) -> Corpus:
        """Contexts of the documents, in two splits."""
        return self.halves.corpus

    @property
    def text(self) -> str:
        """The question in words."""
        return f"What do {len(self.heads):,} heads do in any text, and does it hold on fresh texts?"

    def plan(self) -> dict[str, Any]:
        """What the question is, for hashing."""
        own = {name: getattr(self, name) for name in ("name", "context", "baseline", "seed")}
        return {**own, "bos": self.halves.bos, "heads": list(map(str, self.heads)), "corpus": self.corpus.content_hash}


def describing_heads(
    model: Model,
    corpus: Any,
    *,
    tokens: int = 20_000,
    context: int = 128,
    bos: str = "auto",
    column: str = "text",
    baseline: str | None = None,
    seed: int = 0,
) -> tuple[Model, DescribingHeads]:
    """The question, about all heads, and the model: another than the given one for the baseline `random-network`.

    corpus, tokens, context, bos, column: as for `explaining`. Raises InputError for a model whose attention is not read
    or that has no tokenizer, and for too few documents, saying how many tokens would do.
    """
    if baseline not in (None, RANDOM_NETWORK):
        raise UnknownNameError("baseline for heads", str(baseline), [RANDOM_NETWORK])
    refused = unreadable(model)
    if refused:
        raise InputError(refused)
    heads = tuple(part for part in heads_and_mlps(model) if part.writes[0].kind == "z")
    half = halved(model, corpus, len(heads), tokens=tokens, context=context, bos=bos, column=column, most=OF_A_DOCUMENT)
    asked = DescribingHeads(heads, half, context, baseline, seed)
    return (model if baseline is None else reinitialised(model, seed)), asked


TESTED_HEADS = Artefact("tested", dict)


def _runs(work: Work[DescribingHeads], split: str) -> Runs:
    opened = work.ledger.open(work.question.corpus, split)
    return Runs(work.model, opened, seed=work.question.seed, sink=work.sink, blocks=work.blocks, name=split)


def _read(work: Work[DescribingHeads]) -> Runs:
    asked = work.question
    read = " and ".join(f"{count:,}" for count in asked.halves.tokens.values())
    message = f"{len(asked.heads):,} heads; {read} tokens to discover and to test on, each read once, at about twice "
    work.sink(Event("note", "cost", message=f"{message}the cost of running the model"))
    runs = _runs(work, "discovery")
    seen_in(runs)
    return runs


def _describe(work: Work[DescribingHeads]) -> Descriptions:
    made = work.blocks.get("descriptions and claims", lambda: json_array(_claimed(work).to_json()))
    return Descriptions.from_json(from_array(made))


def _claimed(work: Work[DescribingHeads]) -> Descriptions:
    asked, runs = work.question, work[DISCOVERY]
    n = len(asked.corpus.split("validation"))
    setting = replace(Discovery.of(runs, asked.heads, study=asked.name, n=n), seed=asked.seed)
    found = best_descriptions(setting, HEADS_IN_TEXT, otherwise=OTHERWISE_IN_TEXT)
    return claimed_apart(found, setting, work.sink)


def _seal(work: Work[DescribingHeads]) -> Family:
    claims = work[DESCRIPTIONS].claims
    if not claims:
        raise StoppedError(f"No role fits any of the {len(work.question.heads):,} heads.")
    return work.ledger.register(claims, study=work.question.name)


def _validate(work: Work[DescribingHeads]) -> dict[str, Evidence]:
    runs, family = _runs(work, "validation"), work[FAMILY]
    return append_evidence(work.ledger, family.claims, runs, work.blocks.plan_hash, runs.source_hash)


HEADS: tuple[Step[Any], ...] = (
    Step("read", DISCOVERY, _read),
    Step("describe", DESCRIPTIONS, _describe),
    Step("seal", FAMILY, _seal),
    Step("validate", TESTED_HEADS, _validate),
)


def describe_heads(model: Model, asked: DescribingHeads, *, out: Path | None = None, sink: Sink | None = None) -> Study:
    """Run or resume a study of heads in text (`describing_heads` makes its question).

    out: folder for what was found so far and the ledger (None: nothing is kept). A study in which no role fits any head
    says so as `stopped`. Raises InputError when `out` holds another study.
    """
    plan = content_hash({**asked.plan(), "model": model.content_hash, "version": __version__})
    return run_in(out, plan, asked, model, Options(seed=asked.seed), HEADS, lambda made: _answer(asked, made), sink)


def _answer(asked: DescribingHeads, made: Mapping[str, Any]) -> tuple[str, ...]:
    by_part = by_subject(made["family"].claims, made["verdicts"])
    outcomes = {name: outcome_of(verdicts) for name, verdicts in by_part.items()}
    counts = Counter(outcomes.values())
    fits: Mapping[str, Description | None] = made["descriptions"].fits
    kinds = Counter(fit.label for name, fit in fits.items() if fit is not None and outcomes.get(name) == "SUPPORTED")
    listed = "; ".join(f"{label} ({count})" for label, count in kinds.most_common())
    return (
        f"Of {len(asked.heads):,} heads, {len(by_part):,} have a role on discovery: {counts['SUPPORTED']:,} supported "
        f"on fresh documents, {counts['REFUTED']:,} refuted, {counts['NOT SPECIFIC']:,} true but not specific, "
        f"{counts['INCONCLUSIVE']:,} inconclusive.",
        *([f"Supported: {listed}."] if listed else []),
    )


def summarise_heads(study: Study, *, command: str, timings: Mapping[str, Any]) -> dict[str, Any]:
    """The summary as a dict: of every head its role, verdict and claims, and how much it looks at each place."""
    asked: DescribingHeads = study.question
    evidence, descriptions = study.get(TESTED_HEADS) or {}, study[DESCRIPTIONS]
    claimed = by_subject(study.claims, zip(study.claims, study.verdicts, strict=True))
    seen = seen_in(study[DISCOVERY])
    rows = []
    for head in asked.heads:
        fit, number, own = descriptions.fits[str(head)], seen.numbers[head], claimed.get(str(head), [])
        rows.append(
            {
                "part": str(head),
                "layer": head.writes[0].layer,
                "head": head.writes[0].index,
                "label": None if fit is None else fit.label,
                "sentence": NO_ROLE_FITS if fit is None else fit.sentence,
                "score": None if fit is None else fit.score,
                "verdict": outcome_of([verdict for _, verdict in own]),
                "looks_at": {to: float(seen.mass[to][number].mean()) for to in TARGETS},
                "claims": _rows(own, evidence, descriptions.estimates),
            }
        )
    return {
        "schema": SCHEMA,
        "model": {"name": study.model.name, "hash": study.model.content_hash, "note": study.model.note},
        "baseline": asked.baseline,
        "places": dict(TARGETS),
        "texts": asked.halves.read(asked.context),
        "seed": asked.seed,
        "stopped": study.stopped,
        "answer": list(study.answer),
        "heads": rows,
        "family": {"id": study[FAMILY].id, "m": study[FAMILY].m} if FAMILY in study else None,
        "timings": {"sealed_at": study.sealed_at, "ledger_head": study.ledger_head or None, **timings},
        "reproduce": {"command": command, "version": __version__, "ledger": "ledger.sqlite"},
    }


def _rows(
    claimed: Sequence[tuple[Claim, Verdict]], evidence: Mapping[str, Evidence], estimates: Mapping[str, float]
) -> list[dict[str, Any]]:
    return [short_row(claim, verdict, evidence.get(claim.id), estimates.get(claim.id)) for claim, verdict in claimed]
