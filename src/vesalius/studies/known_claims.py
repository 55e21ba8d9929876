"""Claims that are known to be true or to be about nothing, for the calibration of the validators.

A study of a random network rarely finds anything worth a claim, and a calibration in which nothing is claimed proves
nothing. So null claims are made, by the same code as a study's, about the strongest parts of a random network, whatever
their significance and whether or not their role's thresholds hold; and, to measure power apart from the search, true
claims about every planted part. Both kinds are sealed in a ledger of their own and tested on all validation prompts.

As a positive control the null claims are also tested the forbidden way, on the prompts they were made from.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vesalius.circuits import Effects
from vesalius.describe import Description, Discovery, Prediction, claims_of
from vesalius.describe.predictions import copies, looks, matters, turns, writes
from vesalius.describe.roles import NAME_MOVER
from vesalius.model import Model
from vesalius.parts import Part, as_part
from vesalius.protocol import Claim, Evidence, Verdict
from vesalius.protocol.ledger import Ledger
from vesalius.protocol.legs import clusters_of, legs_of
from vesalius.protocol.verdict import decide
from vesalius.quantities import Runs
from vesalius.quantities.contrast import EMBED
from vesalius.stats import clustered_t
from vesalius.studies.question import Question
from vesalius.toys import PLANTED
from vesalius.validate import check, prepare

STRONGEST_HEADS, STRONGEST_MLPS = 4, 1
LOOKS = (
    ("end", "answer", "distractor_first"),
    ("end", "distractor_first", "answer"),
    ("every", "previous", "two back"),
)
"""Query, key and where else: what a random head is claimed to look at is the one that fits it best on discovery."""
STUDY = "true and null claims"


def null_claims(question: Question, model: Model, effects: Effects, seed: int) -> list[Claim]:
    """Claims of every kind about the strongest heads and MLP of a network without mechanism, signs as on discovery."""
    ranked = [effects.components[number] for number in effects.ranked()]
    heads = [part for part in ranked if part.writes[0].kind == "z"][:STRONGEST_HEADS]
    mlps = [part for part in ranked if part.writes[0].kind == "mlp_out"][:STRONGEST_MLPS]
    setting = _setting(question, model, [*heads, *mlps], heads, seed)
    claims = [claim for head in heads for claim in _claims(setting, head, "null", _of_head(setting, head))]
    for mlp in mlps:
        said = [writes(setting, mlp, _side(writes(setting, mlp, 1))), matters(setting, mlp)]
        claims += _claims(setting, mlp, "null", said)
    return claims


def true_claims(question: Question, model: Model, seed: int) -> list[Claim]:
    """Claims about every planted part of the planted network: what its role says it does."""
    planted = {role: tuple(map(as_part, parts)) for role, parts in PLANTED.items()}
    (previous,), movers, (negative,) = planted["previous-token"], planted["name mover"], planted["negative mover"]
    setting = _setting(question, model, [EMBED, previous, *movers, negative], movers, seed)
    said = [looks(setting, previous, *LOOKS[2]), matters(setting, previous, 1), turns(setting, previous, NAME_MOVER)]
    claims = _claims(setting, previous, "previous-token", said)
    for part, role, sign in [*((mover, "name mover", 1) for mover in movers), (negative, "negative mover", -1)]:
        said = [looks(setting, part, *LOOKS[0]), copies(setting, part, "answer", sign)]
        claims += _claims(setting, part, role, [*said, writes(setting, part, sign), matters(setting, part, sign)])
    return claims


def tested(
    question: Question, model: Model, claims: Sequence[Claim], seed: int
) -> tuple[tuple[Verdict, ...], tuple[float, ...]]:
    """Verdicts of claims, by the whole protocol: sealed as one family, then validation opened and each claim tested.

    And Student's p-value of each claim alone, without the allowance for skewed templates: see `circular`.
    """
    with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder) / "ledger.sqlite") as ledger:
        for pairs in question.corruptions.values():
            ledger.open(pairs, "discovery")
        family = ledger.register(claims, study=STUDY)
        opened = {name: ledger.open(pairs, "validation") for name, pairs in question.corruptions.items()}
        runs = Runs(model, opened, seed=seed)
        prepare(family.claims, runs)
        for claim in family.claims:
            ledger.append(check(claim, runs=runs))
        return ledger.verdicts(family), _students(claims, {c.id: ledger.evidence(c)[-1] for c in claims})


def circular(
    question: Question, model: Model, claims: Sequence[Claim], seed: int
) -> tuple[tuple[Verdict, ...], tuple[float, ...]]:
    """As `tested`, on the very prompts that the claims were made from: what no ledger allows, to see what it would do.

    The difference shows in Student's p-values. Those of the verdicts hold for templates so skewed that hardly a null
    claim comes near the level, wherever it is tested.
    """
    runs = Runs(model, question.contrast("discovery"), seed=seed, check=False)
    prepare(claims, runs)
    evidence = {claim.id: check(claim, runs=runs) for claim in claims}
    return decide(claims, evidence), _students(claims, evidence)


def _students(claims: Sequence[Claim], evidence: Mapping[str, Evidence]) -> tuple[float, ...]:
    """Student's p-value of every claim: the largest of its legs'."""
    found = []
    for claim in claims:
        clusters = clusters_of(claim, evidence[claim.id])
        legs = legs_of(claim, evidence[claim.id], clusters, len(claims))
        found.append(
            max(leg.p_greater if leg.values is None else clustered_t(leg.values, *clusters).p_greater for leg in legs)
        )
    return tuple(found)


def _setting(question: Question, model: Model, members: Sequence[Part], movers: Sequence[Part], seed: int) -> Discovery:
    runs = Runs(model, question.contrast("discovery"), seed=seed, check=False)
    setting = Discovery.of(runs, members, study=STUDY, n=question.sizes["validation"])
    return replace(setting, found=tuple(Description(mover, NAME_MOVER, ()) for mover in movers))


def _of_head(setting: Discovery, head: Part) -> list[Prediction | None]:
    look = max((looks(setting, head, *places) for places in LOOKS), key=lambda found: found.strength)
    key = str(look.parameters["key"])
    copied = key if key in ("answer", "distractor_first") else "answer"
    return [
        look,
        copies(setting, head, copied, _side(copies(setting, head, copied, 1))),
        writes(setting, head, _side(writes(setting, head, 1))),
        matters(setting, head),
        turns(setting, head, NAME_MOVER),
    ]


def _side(prediction: Prediction) -> int:
    """The sign found on discovery."""
    return 1 if prediction.mean >= 0 else -1


def _claims(setting: Discovery, part: Part, role: str, said: Sequence[Prediction | None]) -> list[Claim]:
    """The claims of these predictions, made even where a threshold does not hold."""
    forced = tuple(replace(prediction, strength=1.0) for prediction in said if prediction is not None)
    return [claim for claim, _ in claims_of(Description(part, role, forced), setting)]
