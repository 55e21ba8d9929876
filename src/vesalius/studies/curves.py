"""Which channels of a map detect curves? Described on made images, and tested on fresh ones.

tune        every channel's response to curves of all radii and orientations, and to lines
describe    those that are tuned to one way of bulging, and larger on curves than on lines, on discovery
seal        three predictions of each, before other images are opened
validate    against other channels of the map and kinds dealt out anew, on images with other places and polarities
compare     the same from the start on the network with random weights
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vesalius import __version__
from vesalius.describe import Descriptions, Discovery, claims_of
from vesalius.errors import InputError
from vesalius.images import Curves, Pictures, Scaling, Tuning, curves, tuning_of
from vesalius.images.responses import map_at
from vesalius.images.stimuli import ORIENTATIONS, RADII
from vesalius.inputs import Corpus
from vesalius.jobs import Event, Sink
from vesalius.model import Model
from vesalius.parts import Channel
from vesalius.protocol import Claim, Evidence, Family, Verdict, content_hash
from vesalius.protocol.verdict import decide
from vesalius.quantities import Runs
from vesalius.site import Site
from vesalius.studies.study import Artefact, Options, Step, StoppedError, Study, Work, append_evidence, run_in
from vesalius.studies.summary import short_row
from vesalius.studies.task_circuit import DESCRIPTIONS, FAMILY
from vesalius.validate import all_supported, check, prepare, reinitialised

SCHEMA = "vesalius/curves/1"
DISCOVERY, VALIDATION = "discovery", "validation"
PER_CHANNEL = 3
NOT_RUN = {"ran": False, "described": 0, "supported": 0}


@dataclass(frozen=True, eq=False)
class CurveSearch:
    """The question. corpus: made images of both splits. size: side of the images, in pixels."""

    site: Site
    channels: tuple[int, ...]
    corpus: Corpus
    scaling: Scaling
    radii: tuple[int, ...]
    orientations: tuple[int, ...]
    seed: int = 0
    random_weights: bool = True
    name: str = "curves"

    @property
    def text(self) -> str:
        """The question in words."""
        return f"Which of {len(self.channels)} channels of {self.site.module} detect curves?"

    @property
    def parts(self) -> tuple[Channel, ...]:
        return tuple(Channel(self.site, index) for index in self.channels)

    def plan(self) -> dict[str, Any]:
        """What the question is, for hashing."""
        return {"site": str(self.site), "channels": list(self.channels), "corpus": self.corpus.content_hash,
                "seed": self.seed, "random_weights": self.random_weights}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Tuned:
    """runs: on the images for discovery. tuning: of every channel, by name."""

    runs: Runs
    tuning: Mapping[str, Tuning]


TESTED, TUNED = Artefact("tested", dict), Artefact("tuned", Tuned)
RANDOM: Artefact[Any] = Artefact("random", dict)


def curve_search(
    model: Model,
    scaling: Scaling,
    site: Site | str,
    *,
    size: int | None = None,
    channels: Sequence[int] | None = None,
    radii: Sequence[int] = RADII,
    orientations: Sequence[int] = ORIENTATIONS,
    random_weights: bool = True,
    seed: int = 0,
) -> CurveSearch:
    """The question. size: side of the images; default half of the network's own, which convolutions do not mind.

    Raises InputError for a site without a map, or a channel that does not exist.
    """
    made = replace(scaling, size=max(32, scaling.size // 2) if size is None else size)
    place = Site.parse(site)
    halves = [curves(made, radii, orientations, 1, 2 * seed + half) for half in range(2)]
    count = int(map_at(model, place, halves[0].values[:1]).shape[1])
    listed = tuple(range(count)) if channels is None else tuple(map(int, channels))
    if not listed or max(listed) >= count or min(listed) < 0:
        raise InputError(f"{place} has {count} channels, numbered from 0; got {list(listed)[:9]}")
    values = torch.cat([half.values for half in halves])
    names = tuple(name for half in halves for name in half.names)
    labels = {key: tuple(one for half in halves for one in half.labels[key]) for key in halves[0].labels}
    splits = [DISCOVERY] * len(halves[0]) + [VALIDATION] * len(halves[1])
    corpus = Pictures(values, names, labels).corpus(splits, "curves")
    return CurveSearch(place, listed, corpus, made, tuple(radii), tuple(orientations), seed, random_weights)


def _runs(work: Work[CurveSearch], model: Model, split: str, corpus: Corpus | None = None) -> Runs:
    opened = work.ledger.open(work.question.corpus, split) if corpus is None else corpus
    assert isinstance(opened, Corpus)
    return Runs(model, opened, seed=work.question.seed, sink=work.sink, name=f"{model.content_hash[:8]} {split}")


def _described(runs: Runs, asked: CurveSearch) -> Descriptions:
    """Descriptions of every channel, and claims of those that fit."""
    n = len(asked.corpus.split(VALIDATION))
    discovery = Discovery.of(runs, asked.parts, study=asked.name, n=n)
    describer = Curves()
    describer.prepare(discovery, asked.parts)
    made = [describer.describe(discovery, part) for part in asked.parts]
    claimed = [one for description in made for one in claims_of(description, discovery)]
    return Descriptions(
        {str(one.part): one if one.fits else None for one in made},
        {str(one.part): {one.label: one.score} for one in made},
        tuple(claim for claim, _ in claimed),
        {claim.id: mean for claim, mean in claimed},
    )


def _tune(work: Work[CurveSearch]) -> Tuned:
    asked = work.question
    passes = len(asked.corpus) * (1 + asked.random_weights)
    note = (
        f"{len(asked.channels)} channels, {len(asked.corpus)} images; about {passes} passes up to {asked.site.module}"
    )
    work.sink(Event("note", "cost", message=note))
    runs = _runs(work, work.model, DISCOVERY)
    Curves().prepare(Discovery.of(runs, asked.parts), asked.parts)
    return Tuned(runs, {str(part): tuning_of(runs, part) for part in asked.parts})


def _describe(work: Work[CurveSearch]) -> Descriptions:
    made = _described(work[TUNED].runs, work.question)
    if not made.claims:
        raise StoppedError("No channel is tuned like a curve detector on the images for discovery.", made)
    return made


def _seal(work: Work[CurveSearch]) -> Family:
    return work.ledger.register(list(work[DESCRIPTIONS].claims), study=work.question.name)


def _validate(work: Work[CurveSearch]) -> dict[str, Evidence]:
    runs, family = _runs(work, work.model, VALIDATION), work[FAMILY]
    prepare(family.claims, runs)
    append_evidence(work.ledger, family.claims, runs, work.blocks.plan_hash, runs.source_hash)
    return {claim.id: work.ledger.evidence(claim)[-1] for claim in family.claims}


def _compare(work: Work[CurveSearch]) -> dict[str, Any]:
    """The same on the network with random weights; its claims are decided by the same rule, outside of the ledger."""
    asked = work.question
    if not asked.random_weights:
        return dict(NOT_RUN)
    network = reinitialised(work.model, asked.seed)
    described = _described(_runs(work, network, DISCOVERY, asked.corpus.split(DISCOVERY)), asked)
    runs = _runs(work, network, VALIDATION, asked.corpus.split(VALIDATION))
    prepare(described.claims, runs)
    evidence = {claim.id: check(claim, runs=runs) for claim in described.claims}
    verdicts = decide(list(described.claims), evidence) if described.claims else ()
    fitting = sum(one is not None for one in described.fits.values())
    return {"ran": True, "described": fitting, "supported": len(detectors(described.claims, verdicts))}


CURVES: tuple[Step[Any], ...] = (
    Step("tune", TUNED, _tune),
    Step("describe", DESCRIPTIONS, _describe),
    Step("seal", FAMILY, _seal),
    Step("validate", TESTED, _validate),
    Step("compare", RANDOM, _compare),
)


def find_curves(model: Model, asked: CurveSearch, *, out: Any = None, sink: Sink | None = None) -> Study:
    """Run or resume the study (`curve_search` makes its question).

    out: folder for the ledger (None: nothing is kept). Raises InputError when it holds another study.
    """
    plan = content_hash({**asked.plan(), "model": model.content_hash, "version": __version__})
    return run_in(out, plan, asked, model, Options(seed=asked.seed), CURVES, lambda made: _answer(asked, made), sink)


def detectors(claims: Sequence[Claim], verdicts: Sequence[Verdict]) -> list[str]:
    """Channels all of whose claims are supported."""
    found: dict[str, list[Verdict]] = {}
    for claim, verdict in zip(claims, verdicts, strict=True):
        found.setdefault(str(claim.subject["name"]), []).append(verdict)
    return [name for name, some in found.items() if all_supported(some)]


def _answer(asked: CurveSearch, made: Mapping[str, Any]) -> tuple[str, ...]:
    claims = made["family"].claims
    found, described = detectors(claims, made["verdicts"]), len(claims) // PER_CHANNEL
    random = made["random"]
    first = (
        f"{len(found)} of {len(asked.channels)} channels of {asked.site.module} are curve detectors: {described} were "
        f"described as one, and all three predictions of {len(found)} held on fresh images."
    )
    if not random["ran"]:
        return (first,)
    return (
        first,
        f"With random weights {random['described']} channels were described as one, and {random['supported']} held.",
    )


def summarise_curves(study: Study, *, command: str, timings: Mapping[str, Any]) -> dict[str, Any]:
    """The summary as a dict: per channel its tuning, score and verdict; per claim `verdict`, `estimate`, `interval`,
    `n`."""
    asked, evidence = study.question, study.get(TESTED) or {}
    rows = [short_row(claim, verdict, evidence.get(claim.id)) for claim, verdict in
            zip(study.claims, study.verdicts, strict=True)]  # fmt: skip
    held = set(detectors(study.claims, study.verdicts))
    described, tuned = study[DESCRIPTIONS], study[TUNED].tuning
    return {
        "schema": SCHEMA,
        "question": asked.text,
        "model": {"name": study.model.name, "hash": study.model.content_hash, "note": study.model.note},
        "site": str(asked.site),
        "answer": list(study.answer),
        "images": {"size": asked.scaling.size, **{split: len(asked.corpus.split(split)) for split in
                                                 asked.corpus.split_names}},
        "radii": list(asked.radii),
        "orientations": list(asked.orientations),
        "channels": [
            {
                "name": name,
                "score": scores["curve detector"],
                "preferred": int(tuned[name].orientations[tuned[name].preferred]),
                "described": described.fits[name] is not None,
                "verdict": "SUPPORTED" if name in held else ("not held" if described.fits[name] is not None else None),
                "curves": tuned[name].curves.tolist(),
                "lines": tuned[name].lines.tolist(),
            }
            for name, scores in described.scores.items()
        ],
        "random": study.get(RANDOM) or dict(NOT_RUN),
        "claims": rows,
        "seed": asked.seed,
        "timings": {"sealed_at": study.sealed_at, "ledger_head": study.ledger_head or None, **timings},
        "command": command,
    }  # fmt: skip
