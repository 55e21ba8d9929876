"""The study that explains parts: from texts to descriptions that were tested on other texts.

    examples    what makes each part fire, in one pass over the documents for discovery
    describe    rules learned from them; each description makes claims
    seal        all claims become one family in the ledger; only then
    validate    the other documents are opened, once, and every claim is tested on them against its controls

Every finished piece is kept: a study that was killed goes on where it was.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from vesalius import __version__
from vesalius.data.forward import captured
from vesalius.describe import (
    ActivatingExamples,
    Descriptions,
    Discovery,
    LearnedRules,
    Overlooked,
    challenge,
    claimed_apart,
    collect_examples,
    counterexamples,
    overlooked,
    revise,
    rivals,
)
from vesalius.describe import describe as best_descriptions
from vesalius.describe.learning import Learned
from vesalius.inputs import Corpus
from vesalius.jobs import Estimate, Event, Sink, track
from vesalius.jobs.progress import resident
from vesalius.model import Model
from vesalius.parts import Part, places
from vesalius.protocol import Claim, Evidence, Family, Verdict, content_hash
from vesalius.quantities import Runs
from vesalius.quantities.activation import forget_values, token_values
from vesalius.stats import Measurement
from vesalius.studies.explaining import Explaining, discovery_texts
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
    untested,
)
from vesalius.studies.task_circuit import DESCRIPTIONS, FAMILY
from vesalius.validate import all_supported, prepare

T = TypeVar("T")
MEASURED = 64
"""Contexts for discovery that the size of an effect is measured on; examples come from all of them."""
FEW, ABLATED = 16, 5
"""Contexts on which it is seen which parts matter; and how many are ablated, of those without a description."""
TOGETHER = 64
"""Parts whose rules are learned, and kept, together."""
VALUES = 2**28
"""Values of parts at tokens that are kept at once, at most: a gibibyte."""
PARTS_OF_CLAIM = 9
LEARNING = 0.15
"""Seconds for the rule of one part, about."""


@dataclass(frozen=True, eq=False)
class TestedParts:
    """What the documents for validation showed. evidence: by claim. counter: by part, see `counterexamples`."""

    runs: Runs
    evidence: Mapping[str, Evidence]
    counter: Mapping[str, Mapping[str, Any]]


Asking = Work[Explaining]
EXAMPLES = Artefact("examples", ActivatingExamples)
TESTED_PARTS = Artefact("tested", TestedParts)
OVERLOOKED = Artefact("overlooked", Overlooked)


def _examples(work: Asking) -> ActivatingExamples:
    asked, folder = work.question, work.blocks.folder
    _announce(work)
    return collect_examples(
        work.model,
        discovery_texts(asked),
        asked.parts,
        context=asked.context,
        bos=asked.halves.bos,
        seed=asked.seed,
        out=None if folder is None else folder.parent / "examples",
        sink=work.sink,
    )


def _announce(work: Asking) -> None:
    """What the whole study will cost, from a trial of a few contexts."""
    asked, read = work.question, work.question.halves.tokens
    few = asked.corpus.tokens.take(torch.arange(min(4, len(asked.corpus))))
    began = time.perf_counter()
    captured(work.model, few, places(asked.parts))
    speed = int(few.real.sum()) / (time.perf_counter() - began)
    tokens = sum(read.values()) + 2 * MEASURED * asked.context
    validation = asked.corpus.split("validation")
    kept = min(PARTS_OF_CLAIM * len(asked.parts) * validation.tokens.ids.numel(), VALUES)
    cost = Estimate(
        seconds=tokens / speed + LEARNING * len(asked.parts),
        forwards=len(asked.corpus) + 2 * MEASURED,
        memory_bytes=resident() + 4 * kept,
    )
    documents = len(set(validation.groups["document"]))
    message = (
        f"{len(asked.parts):,} parts; {read['discovery']:,} tokens of {len(asked.halves.discovery):,} documents to "
        f"discover on, {read['validation']:,} of {documents:,} others to test on; expected cost of everything: "
        f"{cost.describe()}"
    )
    work.sink(Event("note", "cost", message=message))


def _describe(work: Asking) -> Descriptions:
    """Rules that hold, and the claims that they make, kept with every digit."""
    asked, parts = work.question, work.question.parts
    rules = LearnedRules(work[EXAMPLES], asked.seed)
    chunks = [parts[first : first + TOGETHER] for first in range(0, len(parts), TOGETHER)]
    for number, chunk in enumerate(track(chunks, "learn rules", sink=work.sink)):
        kept = work.blocks.get(f"rules {number}", lambda some=chunk: _learned(rules, some))  # type: ignore[misc]
        for part, one in zip(chunk, from_array(kept), strict=True):
            rules.recall(part, None if one is None else Learned.from_json(one))
    opened = work.ledger.open(asked.corpus, "discovery")
    runs = Runs(work.model, _spread(opened), seed=asked.seed, sink=work.sink, name="discovery")
    for number, chunk in enumerate(track(chunks, "challenge rules", sink=work.sink) if asked.challenged else ()):
        kept = work.blocks.get(f"challenged {number}", lambda some=chunk: _challenged(rules, runs, some))  # type: ignore[misc]
        for part, one in zip(chunk, from_array(kept), strict=True):
            rules.recall(part, None if one is None else Learned.from_json(one))
    made = work.blocks.get("descriptions and claims", lambda: json_array(_claimed(work, runs, rules).to_json()))
    return Descriptions.from_json(from_array(made))


def _learned(rules: LearnedRules, parts: Sequence[Part]) -> Any:
    found = [rules.learned(part) for part in parts]
    return json_array([None if one is None else one.to_json() for one in found])


def _challenged(rules: LearnedRules, runs: Runs, parts: Sequence[Part]) -> Any:
    """What is left of the rules, revised where made inputs broke them; those of other parts are as they were."""
    known = {part: found for part in parts if (found := rules.rule(part)) is not None}
    # In one pass, where there is anything to read.
    token_values(runs, list(known))
    for part, found in known.items():
        against = challenge(runs, part, found.rule, rules.examples[part].threshold, seed=rules.seed)
        rules.recall(part, revise(rules.examples[part], found, against, rules.seed) or found)
    return _learned(rules, parts)


def _spread(corpus: Corpus, most: int = MEASURED) -> Corpus:
    """Some contexts, from as many documents as there are."""
    nth: Counter[str] = Counter()
    order = []
    for row, document in enumerate(corpus.groups["document"]):
        order.append((nth[document], row))
        nth[document] += 1
    return corpus.subset(sorted(row for _, row in sorted(order)[:most]))


def _claimed(work: Asking, runs: Runs, rules: LearnedRules) -> Descriptions:
    asked = work.question
    n = len(asked.corpus.split("validation"))
    setting = replace(Discovery.of(runs, asked.parts, study=asked.name, n=n), seed=asked.seed)
    return claimed_apart(best_descriptions(setting, [rules]), setting, work.sink)


def _seal(work: Asking) -> Family:
    claims = work[DESCRIPTIONS].claims
    if not claims:
        raise StoppedError(f"No rule holds for any of the {len(work.question.parts):,} parts.")
    return work.ledger.register(claims, study=work.question.name)


def _validate(work: Asking) -> TestedParts:
    asked, family = work.question, work[FAMILY]
    fresh = work.ledger.open(asked.corpus, "validation")
    runs = Runs(work.model, fresh, seed=asked.seed, sink=work.sink, name="validation")
    together = max(1, VALUES // (PARTS_OF_CLAIM * fresh.tokens.ids.numel()))
    by_part = by_subject(family.claims, family.claims)
    named = {str(part): part for part in asked.parts}
    names = list(by_part)
    counter: dict[str, Mapping[str, Any]] = {}
    evidence: dict[str, Evidence] = {}
    for first in range(0, len(names), together):
        some = names[first : first + together]
        claims = [claim for name in some for claim in by_part[name]]
        if todo := untested(work.ledger, claims):
            prepare(todo, runs)
        evidence |= append_evidence(work.ledger, claims, runs, work.blocks.plan_hash, runs.source_hash)
        kept = work.blocks.get(
            f"counterexamples {first}",
            lambda some=some: json_array({n: _against(work, runs, named[n]) for n in some}),  # type: ignore[misc]
        )
        counter |= from_array(kept)
        forget_values(runs)
    return TestedParts(runs, evidence, counter)


def _against(work: Asking, runs: Runs, part: Part) -> dict[str, Any]:
    fit = work[DESCRIPTIONS][part]
    rules = [one.parameters["rule"] for one in fit.predictions if "rule" in one.parameters] if fit else []
    if fit is None or not rules:
        return {}
    broken = counterexamples(runs, part, rules[0], float(work[EXAMPLES][part].threshold))
    return {**broken, "rivals": rivals(runs, part, rules[0], [one["rule"] for one in fit.rivals])}


def _overlooked(work: Asking) -> Overlooked:
    """Parts that matter, of those about which nothing was supported."""
    asked = work.question
    tested = work[TESTED_PARTS].runs.data
    assert isinstance(tested, Corpus)
    runs = Runs(work.model, _spread(tested, FEW), seed=asked.seed, sink=work.sink)
    claims = work[FAMILY].claims
    by_part = by_subject(claims, map(work.ledger.verdict, claims))
    explained = [part for part in asked.parts if outcome_of(by_part.get(str(part), [])) == "SUPPORTED"]
    return overlooked(runs, asked.parts, explained, most=ABLATED)


EXPLAIN: tuple[Step[Any], ...] = (
    Step("examples", EXAMPLES, _examples),
    Step("describe", DESCRIPTIONS, _describe),
    Step("seal", FAMILY, _seal),
    Step("validate", TESTED_PARTS, _validate),
    Step("overlooked", OVERLOOKED, _overlooked),
)


def explain(model: Model, asked: Explaining, *, out: Path | None = None, sink: Sink | None = None) -> Study:
    """Run or resume a study that explains parts (`explaining` makes its question).

    out: folder for what was found so far and the ledger (None: nothing is kept). sink: None shows progress. A study in
    which no rule holds for any part says so as `stopped`. Raises InputError when `out` holds another study.
    """
    plan = content_hash({**asked.plan(), "model": model.content_hash, "version": __version__})
    return run_in(out, plan, asked, model, Options(seed=asked.seed), EXPLAIN, lambda made: _answer(asked, made), sink)


def by_subject(claims: Sequence[Claim], values: Iterable[T]) -> dict[str, list[T]]:
    """Name of a part -> what its claims have: values, one for each claim, such as their verdicts."""
    found: dict[str, list[T]] = {}
    for claim, value in zip(claims, values, strict=True):
        found.setdefault(str(claim.subject["name"]), []).append(value)
    return found


def outcome_of(verdicts: Sequence[Verdict]) -> str | None:
    """One word for a part: SUPPORTED when all of its claims are, else the worst of them; None without any."""
    outcomes = {verdict.outcome for verdict in verdicts}
    if all_supported(verdicts):
        return "SUPPORTED"
    return next((one for one in ("REFUTED", "NOT SPECIFIC", "INCONCLUSIVE") if one in outcomes), None)


def _answer(asked: Explaining, made: Mapping[str, Any]) -> tuple[str, ...]:
    by_part = by_subject(made["family"].claims, made["verdicts"])
    count = Counter(outcome_of(verdicts) for verdicts in by_part.values())
    bare, never = len(asked.parts) - len(by_part), int((made["examples"].collector.active == 0).sum())
    silent = f" ({never:,} of them never fired)" if never else ""
    missed = [f"{part} ({cost.estimate:+.2g} nats a token without it)" for part, cost in _largest(made["overlooked"])]
    return (
        f"Of {len(asked.parts):,} parts, {len(by_part):,} have a description: {count['SUPPORTED']:,} supported on "
        f"fresh documents, {count['REFUTED']:,} refuted, {count['NOT SPECIFIC']:,} true but not specific, "
        f"{count['INCONCLUSIVE']:,} inconclusive. For {bare:,} no rule holds, and nothing is said{silent}.",
        *([f"What matters most of those that are not explained: {', '.join(missed)}."] if missed else []),
    )


def _largest(found: Overlooked) -> list[tuple[Part, Measurement]]:
    """Those whose cost stands out of its noise."""
    both = zip(found.parts, found.costs, strict=True)
    return [(part, cost) for part, cost in both if cost.low is not None and cost.low > 0][:3]
