"""From labelled examples to a verdict on a concept: used, present and not used, not there, or can't tell.

    read        activations of the discovery examples at every site, from one pass
    choose      the site where a probe does best by cross-validation, and a direction there for every label
    seal        that it carries the label, and that the model uses it, as claims, before other examples are opened
    validate    both are tested on examples that share no group with those
    look        accuracy at every site with all controls, other distributions, and what is left after erasure

The direction of a claim is the difference of class means: it is closer to what a model uses than a classifier's weights
are (Marks and Tegmark 2023, arXiv:2310.06824, section 5), and it has no penalty to choose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from vesalius import __version__
from vesalius.concepts.concept import DISCOVERY, VALIDATION, Concept
from vesalius.concepts.eraser import Leak, erased_rows, leaks
from vesalius.concepts.probe import Probe
from vesalius.concepts.probing import Probes, fitted, probes_of, selected_of, transfer
from vesalius.concepts.reading import Rows, read_sites, sites_named, tokens_of_concept
from vesalius.describe import claim_about
from vesalius.directions import Direction
from vesalius.errors import InputError, TokenizerError
from vesalius.inputs import Corpus
from vesalius.jobs import Event, Sink
from vesalius.jobs.blocks import Arrays
from vesalius.model import Model
from vesalius.protocol import Family, Verdict, content_hash
from vesalius.quantities import CARRIES, MOVES, Runs
from vesalius.quantities.separates import DIGITS
from vesalius.site import Site
from vesalius.stats import Measurement
from vesalius.studies.study import Artefact, Options, Step, Study, Work, append_evidence, run_in
from vesalius.studies.task_circuit import FAMILY
from vesalius.validate import reinitialised

LEAST_AUROC = 0.15
"""Over one half: what a direction has to reach on fresh examples to carry a label."""
LEAST_SHARE = 0.05
"""Of what exchanging everything at the site does: what a direction has to do to be used."""
FEWEST, MOST = 24, 200
"""Examples of a split that are needed, and that are taken unless more are asked for."""
USED, UNUSED, ABSENT, OPEN = "used", "present, not used", "not there", "can't tell"


@dataclass(frozen=True, eq=False)
class Probing:
    """The question of a study of a concept. answers: token ids that speak for each target label, and against it."""

    concept: Concept
    sites: tuple[Site, ...]
    corpus: Corpus
    answers: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    seed: int = 0
    random_weights: bool = True
    name: str = "probe"
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The question in words."""
        return f"Does the model carry {self.concept.name}, and does it use it?"

    @property
    def targets(self) -> tuple[str, ...]:
        """Labels to tell from all others: of two the second."""
        classes = self.concept.classes
        return classes[1:] if len(classes) == 2 else classes

    @cached_property
    def of_corpus(self) -> tuple[int, ...]:
        """Numbers of the examples that the corpus holds: of discovery and validation."""
        return tuple(row for row, split in enumerate(self.concept.splits) if split in (DISCOVERY, VALIDATION))

    def texts_of(self, label: str) -> list[str]:
        """First digits of the hashes of the texts with a label."""
        hashes = self.corpus.example_hashes
        rows = zip(self.of_corpus, hashes, strict=True)
        return sorted({digest[:DIGITS] for row, digest in rows if self.concept.labels[row] == label})

    def plan(self) -> dict[str, Any]:
        """What the question is, for hashing."""
        own = {name: getattr(self, name) for name in ("answers", "seed", "random_weights", "name")}
        sites = [str(site) for site in self.sites]
        return {**own, "concept": self.concept.content_hash, "corpus": self.corpus.content_hash, "sites": sites}


def probing(
    model: Model,
    concept: Concept,
    *,
    sites: Sequence[Site | str] | Site | str = "layers.*.resid_post",
    suffix: str = "",
    answers: tuple[str, str] | None = None,
    most: int = MOST,
    random_weights: bool = True,
    seed: int = 0,
) -> Probing:
    """The question, about a concept of whole texts (or token ids) with names of classes.

    A concept without splits is divided in halves by group. Every text is read at its last token; suffix: what is put
    behind each first, such as a question. answers: words, one token each, that speak for and against the second of two
    labels: then what counts as use is a change of the log-odds between them, else any change of the next token. most:
    examples of each split, whole groups at random. random_weights: also probe the network with random weights.

    Raises InputError for a concept of another kind, or too few examples, saying how many are needed; TokenizerError
    for an answer of several tokens.
    """
    if concept.continuous or concept.of_floats or concept.spans:
        raise InputError(
            f"{concept.name}: this study takes whole texts with names of classes; see vs.concepts for more"
        )
    if answers is not None and len(concept.classes) != 2:
        raise InputError(f"answers are for two labels; {concept.name} has {len(concept.classes)}")
    divided = concept if concept.splits else concept.divided(seed=seed)
    if suffix:
        divided = replace(divided, inputs=tuple(text + suffix for text in divided.texts))
    few = _few(divided, most, seed)
    _check_enough(few)
    found = tuple(sites_named(model, sites))
    kept = [row for row, split in enumerate(few.splits) if split in (DISCOVERY, VALIDATION)]
    own = few.subset(kept)
    tokens = tokens_of_concept(model, own)
    corpus = Corpus(tokens, {"group": own.groups}, own.splits, concept.name)
    ids = None if answers is None else tuple((_one_token(model, word),) for word in answers)
    return Probing(few, found, corpus, ids, seed, random_weights)  # type: ignore[arg-type]


def _one_token(model: Model, word: str) -> int:
    ids = model.tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1:
        raise TokenizerError(f"the answer {word!r} is {len(ids)} tokens; give one that is a single token (try a space)")
    return int(ids[0])


def _few(concept: Concept, most: int, seed: int) -> Concept:
    """At most so many examples of every split: whole groups in random order while they fit."""
    kept: list[int] = []
    for split in concept.split_names:
        rows = concept.rows(split)
        names = list(dict.fromkeys(concept.groups[row] for row in rows))
        of: dict[str, list[int]] = {name: [] for name in names}
        for row in rows.tolist():
            of[concept.groups[row]].append(row)
        taken: list[int] = []
        for number in np.random.default_rng(seed).permutation(len(names)).tolist():
            if len(taken) + len(of[names[number]]) <= most:
                taken += of[names[number]]
        kept += taken
    return concept.subset(sorted(kept))


def _check_enough(concept: Concept) -> None:
    for split in (DISCOVERY, VALIDATION):
        rows = concept.rows(split)
        groups = len({concept.groups[row] for row in rows})
        labels = {concept.labels[row] for row in rows}
        if len(rows) < FEWEST or groups < FEWEST // 2 or len(labels) < len(concept.classes):
            raise InputError(
                f"{concept.name}: {split} has {len(rows)} examples in {groups} groups, of {len(labels)} labels; "
                f"at least {FEWEST} in {FEWEST // 2} groups are needed there, with every label. Groups are kept whole"
            )


@dataclass(frozen=True, eq=False)
class Choice:
    """selected: [site] cross-validated accuracy on discovery; best: the site; directions: one for each target label."""

    selected: tuple[float, ...]
    best: Site
    directions: tuple[Direction, ...]
    probe: Probe


@dataclass(frozen=True, eq=False)
class Look:
    """Probes at every site with their controls; transfer between splits at the best; what readers find after LEACE."""

    probes: Probes
    transfer: Mapping[str, Mapping[str, Measurement]]
    leaks: tuple[Leak, ...]


ROWS = Artefact("rows", Rows)
CHOICE = Artefact("choice", Choice)
TESTED = Artefact("tested", dict)
LOOK = Artefact("look", Look)


def _read(work: Work[Probing]) -> Rows:
    asked = work.question
    n = len(asked.concept.rows(DISCOVERY))
    passes = 2 * (len(asked.concept) + asked.random_weights * len(asked.of_corpus))
    work.sink(Event("note", "cost", message=f"{n} examples for discovery; about {passes} forward passes in all"))
    return _rows_of(work, work.model, "own", DISCOVERY)


def _rows_of(work: Work[Probing], model: Model, name: str, split: str) -> Rows:
    """Activations of one split, kept with the study."""
    some = work.question.concept.subset(work.question.concept.rows(split))
    sites = work.question.sites

    def read() -> Arrays:
        rows = read_sites(model, some, sites, sink=work.sink)
        return {str(number): rows[site] for number, site in enumerate(sites)}

    kept = work.blocks.get(f"rows {name} {split}", read)
    values = {site: kept[str(number)] for number, site in enumerate(sites)}
    return Rows(some, values, np.arange(len(some)), "last", model.content_hash)


def _choose(work: Work[Probing]) -> Choice:
    asked, rows = work.question, work[ROWS]
    selected, probes = [], []
    for site in asked.sites:
        probe = fitted(rows, site, "logistic", asked.seed)
        probes.append(probe)
        selected.append(selected_of(probe, rows, asked.seed))
    best = int(np.argmax(selected))
    means = fitted(rows, asked.sites[best], "mass_mean", asked.seed)
    directions = tuple(means.direction(label) for label in asked.targets)
    return Choice(tuple(selected), asked.sites[best], directions, probes[best])


def _runs(work: Work[Probing], split: str) -> Runs:
    opened = work.ledger.open(work.question.corpus, split)
    return Runs(work.model, opened, seed=work.question.seed, sink=work.sink, name=split)


def _seal(work: Work[Probing]) -> Family:
    asked, choice = work.question, work[CHOICE]
    runs, n = _runs(work, DISCOVERY), len(asked.corpus.split(VALIDATION))
    claims = []
    for label, direction in zip(asked.targets, choice.directions, strict=True):
        given: dict[str, Any] = {"texts": asked.texts_of(label), "what": f"{asked.concept.name} {label}"}
        claims.append(claim_about(runs, direction, CARRIES, given, size=LEAST_AUROC, n=n, study=asked.name))
        if asked.answers is not None:
            given = {**given, "answers": [list(side) for side in asked.answers]}
        scale = abs(MOVES.scale_of(runs, direction, given) or 0.0)
        if not scale:
            raise InputError(f"exchanging everything at {choice.best} changes nothing: no later layer reads it")
        claims.append(claim_about(runs, direction, MOVES, given, size=LEAST_SHARE * scale, n=n, study=asked.name))
    return work.ledger.register(claims, study=asked.name)


def _validate(work: Work[Probing]) -> dict[str, Any]:
    runs, family = _runs(work, VALIDATION), work[FAMILY]
    return append_evidence(work.ledger, family.claims, runs, work.blocks.plan_hash, runs.source_hash)


def _look(work: Work[Probing]) -> Look:
    asked, best = work.question, work[CHOICE].best
    own = _joined(work, work.model, "own", asked.concept.split_names)
    random = None
    if asked.random_weights:
        network = reinitialised(work.model, asked.seed)
        random = _joined(work, network, "random weights", (DISCOVERY, VALIDATION))
    probes = probes_of(own, random=random, seed=asked.seed, sink=work.sink)
    return Look(probes, transfer(own, best, seed=asked.seed), leaks(erased_rows(own, best), own, best, seed=asked.seed))


def _joined(work: Work[Probing], model: Model, name: str, splits: Sequence[str]) -> Rows:
    parts = [_rows_of(work, model, name, split) for split in splits]
    order = np.concatenate([work.question.concept.rows(split) for split in splits])
    whole = work.question.concept.subset(order)
    values = {site: np.concatenate([part[site] for part in parts]) for site in work.question.sites}
    return Rows(whole, values, np.arange(len(whole)), "last", model.content_hash)


PROBE: tuple[Step[Any], ...] = (
    Step("read", ROWS, _read),
    Step("choose", CHOICE, _choose),
    Step("seal", FAMILY, _seal),
    Step("validate", TESTED, _validate),
    Step("look", LOOK, _look),
)


def probe(
    model: Model, asked: Probing, *, out: Any = None, sink: Sink | None = None, steps: Sequence[Step[Any]] = PROBE
) -> Study:
    """Run or resume a study of a concept (`probing` makes its question).

    out: folder for its pieces and the ledger (None: nothing is kept). Raises InputError when it holds another study.
    """
    plan = content_hash({**asked.plan(), "model": model.content_hash, "version": __version__})
    return run_in(out, plan, asked, model, Options(seed=asked.seed), steps, lambda made: _answer(asked, made), sink)


def said_of(verdicts: Sequence[Verdict]) -> list[str]:
    """For each label, in words, what its two claims come to."""
    return [concluded(*both) for both in zip(verdicts[::2], verdicts[1::2], strict=True)]


def concluded(carries: Verdict, moves: Verdict) -> str:
    """Used, present and not used, not there, or can't tell."""
    if carries.outcome == "REFUTED":
        return ABSENT
    if carries.outcome != "SUPPORTED":
        return OPEN
    if moves.outcome == "SUPPORTED":
        return USED
    return UNUSED if moves.outcome in ("REFUTED", "NOT SPECIFIC") else OPEN


def _answer(asked: Probing, made: Mapping[str, Any]) -> tuple[str, ...]:
    verdicts = made["verdicts"]
    found = said_of(verdicts)
    sentences = [
        _sentence(asked, label, said, carries, moves, made["choice"].best)
        for label, said, carries, moves in zip(asked.targets, found, verdicts[::2], verdicts[1::2], strict=True)
    ]
    report = made["look"].probes.best.report if "look" in made else None
    return (*sentences, *(report.flags if report is not None else ()))


def _sentence(asked: Probing, label: str, said: str, carries: Verdict, moves: Verdict, site: Site) -> str:
    area = "not measured" if carries.estimate is None else f"AUROC {carries.estimate + 0.5:.2f} on fresh texts"
    does = "" if moves.estimate is None else f", exchanging it changes the next token by {moves.estimate:.3g} nats"
    tested = f"At {site} one direction was tested: {area}{does} ({_why(carries, moves)})."
    return f"{asked.concept.name} {label}: {said}. {tested}"


def _why(carries: Verdict, moves: Verdict) -> str:
    named = [f"{word} {verdict.outcome}{f', {verdict.reason}' if verdict.reason else ''}"
             for word, verdict in (("carried", carries), ("used", moves))]  # fmt: skip
    return "; ".join(named)
