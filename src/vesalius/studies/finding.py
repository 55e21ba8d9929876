"""From a concept to the parts that stand for it: ranked on discovery, and the best tested on texts of their own.

    rank        AUROC of every part's largest activation, of texts about the concept against others, for discovery
    seal        the best become claims, sealed before the other texts are opened
    validate    each is tested there against matched parts and against labels dealt out anew

A concept is given by texts with labels, or by words: then the texts that hold one of them are those about it. No
language model is asked, so that words stand for nothing but themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius import __version__
from vesalius.data.packing import Packing, Tally, bos_for, groups, special_ids, tokenized
from vesalius.data.texts import texts_from
from vesalius.describe import claim_about
from vesalius.errors import InputError
from vesalius.inputs import Corpus, Tokens
from vesalius.jobs import Event, Sink
from vesalius.model import Model
from vesalius.parts import Part
from vesalius.protocol import Family, content_hash
from vesalius.quantities import ACTIVATION, SEPARATES, Runs
from vesalius.quantities.pseudo_values import share_below
from vesalius.quantities.separates import DIGITS, named
from vesalius.studies.explaining import SHORTEST, check_parts, documents_needed
from vesalius.studies.study import Artefact, Options, Step, StoppedError, Study, Work, append_evidence, run_in, untested
from vesalius.studies.summary import short_row
from vesalius.studies.task_circuit import FAMILY
from vesalius.validate import prepare

SCHEMA = "vesalius/find/1"
TOGETHER = 4096
"""Parts that are ranked together."""
LEAST_AUROC = 0.6
"""On discovery, what a part must reach to be worth a claim."""
MOST = 400
"""Texts of each kind, at most."""


@dataclass(frozen=True, eq=False)
class Finding:
    """The question of a study that looks for parts. positive: texts about it, by hash; best: how many are tested."""

    what: str
    parts: tuple[Part, ...]
    corpus: Corpus
    positive: tuple[str, ...]
    best: int = 10
    seed: int = 0
    name: str = "find"
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The question in words."""
        return f"Which of {len(self.parts):,} parts tell texts about {self.what} from others?"

    def plan(self) -> dict[str, Any]:
        """What the question is, for hashing."""
        own = {name: getattr(self, name) for name in ("what", "best", "seed", "name")}
        refs = content_hash([part.ref for part in self.parts])
        return {**own, "parts": refs, "corpus": self.corpus.content_hash, "positive": list(self.positive)}


def finding(
    model: Model,
    parts: Sequence[Part],
    what: str,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    fresh: tuple[Sequence[str], Sequence[str]] | None = None,
    best: int = 10,
    context: int = 256,
    bos: str = "auto",
    seed: int = 0,
) -> Finding:
    """The question, from texts about the concept and others; of each the first `context` tokens.

    Texts go in turns to discovery and to validation; with `fresh`, all of them to discovery, and those to validation:
    the same concept in another wording or language, so that a part that only knows the wording fails. Raises InputError
    for too few of one kind, saying how many are needed, for a text that is on both sides, or in both halves, and for
    parts that the model does not have.
    """
    given = [(positive, negative), *([fresh] if fresh is not None else [])]
    both = {text for yes, _ in given for text in yes} & {text for _, no in given for text in no}
    if both:
        raise InputError(f"{len(both)} texts are on both sides, such as {min(both)[:60]!r}")
    chosen = check_parts(model, parts)
    packing = Packing(context, bos_for(model.tokenizer, bos, False), special_ids(model.tokenizer), 2**62)
    found = [[_first_contexts(model, side, packing) for side in sides] for sides in given]
    halves = found if fresh is not None else [[side[half::2] for side in found[0]] for half in (0, 1)]
    _check_enough(halves, best)
    rows = [
        (ids, split, number)
        for split, sides in zip(("discovery", "validation"), halves, strict=True)
        for number, side in enumerate(sides)
        for ids in side
    ]
    corpus = Corpus(
        Tokens.from_rows([list(ids) for ids, _, _ in rows]),
        {"document": tuple(str(number) for number in range(len(rows)))},
        tuple(split for _, split, _ in rows),
    )
    about = tuple(h[:DIGITS] for h, (_, _, side) in zip(corpus.example_hashes, rows, strict=True) if side == 0)
    return Finding(what, chosen, corpus, about, best, seed)


def _check_enough(halves: Sequence[Sequence[Sequence[tuple[int, ...]]]], best: int) -> None:
    """Raises InputError for too few texts of a kind, and for one that is in both halves."""
    again = {ids for side in halves[0] for ids in side} & {ids for side in halves[1] for ids in side}
    if again:
        raise InputError(f"{len(again)} texts to test on are among those to discover on; give others")
    least = documents_needed(best)
    for half, sides in zip(("to discover on", "to test on"), halves, strict=True):
        for name, side in zip(("about it", "of the other kind"), sides, strict=True):
            if len(side) < least:
                raise InputError(
                    f"{len(side)} different texts of {SHORTEST} tokens or more {half} are {name}; a test of {best} "
                    f"parts takes {least} of each kind {half}, and as many for the other half"
                )


def texts_with(
    corpus: Any, words: Sequence[str], *, characters: int = 1200, column: str = "text"
) -> tuple[list[str], list[str]]:
    """Of each document of a corpus one piece: around the first of these words or phrases, or its beginning where it
    holds none. Texts that hold one, and the others; letters' case does not count.

    Raises InputError for no words.
    """
    listed = [word.strip() for word in words if word.strip()]
    if not listed:
        raise InputError('no words to look for: give at least one, such as "madrid, barcelona"')
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, listed))})(?!\w)", re.IGNORECASE)
    found: tuple[list[str], list[str]] = ([], [])
    for document in texts_from(corpus, column).read():
        if not isinstance(document, str):
            raise InputError("words are looked for in text; this corpus holds token ids")
        hit = pattern.search(document)
        start = max(0, hit.start() - characters // 2) if hit else 0
        piece = document[start : start + characters]
        if hit or not pattern.search(piece):
            found[0 if hit else 1].append(piece)
        if min(map(len, found)) >= MOST:
            break
    return found[0][:MOST], found[1][:MOST]


def _first_contexts(model: Model, texts: Sequence[str], packing: Packing) -> list[tuple[int, ...]]:
    """Of each text its first context, each once, and none that is too short."""
    rows = dict.fromkeys(
        tuple(next(iter(group)).ids.tolist())
        for ids in tokenized(texts, model.tokenizer, Tally())
        if len(ids) >= SHORTEST and (group := [c for g in groups(iter([ids]), packing) for c in g.contexts])
    )
    return list(rows)[:MOST]


@dataclass(frozen=True, eq=False)
class Ranking:
    """AUROC of every part on discovery."""

    aurocs: Float[Tensor, " part"]

    def best(self, count: int) -> list[int]:
        """Numbers of the best parts that are worth a claim."""
        order = self.aurocs.argsort(descending=True, stable=True)[:count].tolist()
        return [number for number in order if float(self.aurocs[number]) >= LEAST_AUROC]


RANKING = Artefact("ranking", Ranking)
TESTED = Artefact("tested", dict)


def _runs(work: Work[Finding], split: str) -> Runs:
    opened = work.ledger.open(work.question.corpus, split)
    return Runs(work.model, opened, seed=work.question.seed, sink=work.sink, name=split)


def _rank(work: Work[Finding]) -> Ranking:
    asked, runs = work.question, _runs(work, "discovery")
    some = named(runs, {"texts": asked.positive})
    n = int(some.sum())
    message = (
        f"{len(asked.parts):,} parts on {n} texts about it and {len(some) - n} others, and as many again to test on"
    )
    work.sink(Event("note", "cost", message=message))
    found = []
    for first in range(0, len(asked.parts), TOGETHER):
        chunk = asked.parts[first : first + TOGETHER]

        def measured(chunk: Sequence[Part] = chunk) -> dict[str, Any]:
            fresh = Runs(work.model, runs.data, seed=asked.seed, sink=work.sink)
            ACTIVATION.prepare(fresh, [(part, {"at": "max"}) for part in chunk])
            values = torch.stack([ACTIVATION.measure(fresh, part, {"at": "max"}) for part in chunk])
            return {"auroc": share_below(values[:, ~some], values[:, some]).mean(1).numpy()}

        found.append(torch.from_numpy(work.blocks.get(f"aurocs {first}", measured)["auroc"]))
    return Ranking(torch.cat(found))


def _seal(work: Work[Finding]) -> Family:
    asked, ranking = work.question, work[RANKING]
    best = [asked.parts[number] for number in ranking.best(asked.best)]
    if not best:
        top = float(ranking.aurocs.max())
        raise StoppedError(
            f"No part reaches an AUROC of {LEAST_AUROC:g} on discovery (the best: {top:.2f}), so nothing is claimed "
            f"about {asked.what}."
        )
    runs, n = _runs(work, "discovery"), len(asked.corpus.split("validation"))
    given = {"texts": list(asked.positive), "what": asked.what}
    SEPARATES.prepare(runs, [(part, given) for part in best])
    claims = [claim_about(runs, part, SEPARATES, given, n=n, study=asked.name) for part in best]
    return work.ledger.register(claims, study=asked.name)


def _validate(work: Work[Finding]) -> dict[str, Any]:
    runs, family = _runs(work, "validation"), work[FAMILY]
    if todo := untested(work.ledger, family.claims):
        prepare(todo, runs)
    return append_evidence(work.ledger, family.claims, runs, work.blocks.plan_hash, runs.source_hash)


FIND: tuple[Step[Any], ...] = (
    Step("rank", RANKING, _rank),
    Step("seal", FAMILY, _seal),
    Step("validate", TESTED, _validate),
)


def find(model: Model, asked: Finding, *, out: Path | None = None, sink: Sink | None = None) -> Study:
    """Run or resume a study that looks for the parts of a concept (`finding` makes its question).

    out: folder for the ranking and the ledger (None: nothing is kept). A study in which no part is worth a claim says
    so as `stopped`. Raises InputError when `out` holds another study.
    """
    plan = content_hash({**asked.plan(), "model": model.content_hash, "version": __version__})
    return run_in(out, plan, asked, model, Options(seed=asked.seed), FIND, lambda made: _answer(asked, made), sink)


def _answer(asked: Finding, made: Mapping[str, Any]) -> tuple[str, ...]:
    verdicts = made["verdicts"]
    held = sum(verdict.outcome == "SUPPORTED" for verdict in verdicts)
    pairs = zip(made["family"].claims, verdicts, strict=True)
    names = ", ".join(str(claim.subject["name"]) for claim, verdict in pairs if verdict.outcome == "SUPPORTED")
    return (
        f"Of {len(asked.parts):,} parts the best {len(verdicts)} were tested on fresh texts: {held} tell texts about "
        f"{asked.what} from others{f' ({names})' if names else ''}.",
    )


def summarise_found(study: Study, *, command: str, timings: Mapping[str, Any]) -> dict[str, Any]:
    """The summary as a dict: per claim `verdict`, `estimate` (AUROC over .5), `interval`, `n`, and `discovery`."""
    asked, evidence = study.question, study.get(TESTED) or {}
    ranking = study[RANKING].aurocs
    numbers = {str(part): number for number, part in enumerate(asked.parts)}
    rows = []
    for claim, verdict in zip(study.claims, study.verdicts, strict=True):
        row = short_row(claim, verdict, evidence.get(claim.id))
        rows.append({**row, "discovery": float(ranking[numbers[str(claim.subject["name"])]]) - 0.5})
    return {
        "schema": SCHEMA,
        "what": asked.what,
        "model": {"name": study.model.name, "hash": study.model.content_hash, "note": study.model.note},
        "parts": len(asked.parts),
        "texts": {name: len(asked.corpus.split(name)) for name in asked.corpus.split_names},
        "answer": list(study.answer),
        "stopped": study.stopped,
        "claims": rows,
        "timings": {"sealed_at": study.sealed_at, "ledger_head": study.ledger_head or None, **timings},
        "command": command,
    }
