"""Claims handed to the validators, for their calibration: true ones about planted parts, idle ones about random parts.

A study of a random network rarely finds anything worth a claim, and a calibration in which nothing is claimed proves
nothing. So claims are also made, by the same code as a study's, about the strongest parts of a random network, whatever
their significance and whether or not their role's thresholds hold; and, to measure power apart from the search, about
every planted part. Both kinds are sealed in a ledger of their own and tested on all validation prompts.

As a positive control the idle claims are also tested the forbidden way, on the prompts they were made from.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vesalius.bench import EMBED, Bench
from vesalius.circuits import Effects
from vesalius.describe import Context
from vesalius.describe.ingredients import Ingredient, copies, looks, matters, role_fit, turns, writes
from vesalius.model import Model
from vesalius.protocol import Claim, Verdict
from vesalius.protocol.ledger import Ledger
from vesalius.protocol.verdict import decide
from vesalius.site import Site
from vesalius.studies.question import Question
from vesalius.toys import PLANTED
from vesalius.validate import check, prefetch

STRONGEST_HEADS, STRONGEST_MLPS = 4, 1
LOOKS = (
    ("end", "answer", "distractor_first"),
    ("end", "distractor_first", "answer"),
    ("every", "previous", "two back"),
)
"""Query, key and where else: what a random head is claimed to look at is the one that fits it best on discovery."""
STUDY = "handed claims"


def idle_claims(question: Question, model: Model, effects: Effects, seed: int) -> list[Claim]:
    """Claims of every kind about the strongest heads and MLP of a network without mechanism, signs as on discovery."""
    ranked = [effects.components[number] for number in effects.ranked()]
    heads = [part for part in ranked if part.kind == "z"][:STRONGEST_HEADS]
    mlps = [part for part in ranked if part.kind == "mlp_out"][:STRONGEST_MLPS]
    context = _context(question, model, [*heads, *mlps], heads, seed)
    claims = [claim for head in heads for claim in _claims(context, head, "idle", _of_head(context, head))]
    for mlp in mlps:
        claims += _claims(
            context, mlp, "idle", [writes(context, mlp, _side(writes(context, mlp, 1))), matters(context, mlp)]
        )
    return claims


def true_claims(question: Question, model: Model, seed: int) -> list[Claim]:
    """Claims about every planted part of the planted network: what its role says it does."""
    (previous,), movers, (negative,) = PLANTED["previous-token"], PLANTED["name mover"], PLANTED["negative mover"]
    context = _context(question, model, [EMBED, previous, *movers, negative], movers, seed)
    said = [looks(context, previous, *LOOKS[2]), matters(context, previous, 1), turns(context, previous)]
    claims = [*_claims(context, previous, "previous-token", said)]
    for part, role, sign in [*((mover, "name mover", 1) for mover in movers), (negative, "negative mover", -1)]:
        said = [looks(context, part, *LOOKS[0]), copies(context, part, "answer", sign)]
        claims += _claims(context, part, role, [*said, writes(context, part, sign), matters(context, part, sign)])
    return claims


def judged(question: Question, model: Model, claims: Sequence[Claim], seed: int) -> tuple[Verdict, ...]:
    """Verdicts of claims, by the whole protocol: sealed as one family, then validation opened and each claim tested."""
    with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder) / "ledger.sqlite") as ledger:
        family = ledger.register(claims, study=STUDY)
        bench = Bench(
            model, {name: ledger.open(pairs, "validation") for name, pairs in question.corruptions.items()}, seed
        )
        prefetch(family.claims, bench)
        for claim in family.claims:
            ledger.append(check(claim, bench=bench))
        return ledger.verdicts(family)


def circular(question: Question, model: Model, claims: Sequence[Claim], seed: int) -> tuple[Verdict, ...]:
    """Verdicts on the very prompts that the claims were made from: what no ledger allows, to see what it would do."""
    bench = Bench(model, question.split("discovery"), seed, check=False)
    prefetch(claims, bench)
    return decide(claims, {claim.id: check(claim, bench=bench) for claim in claims})


def _context(question: Question, model: Model, members: Sequence[Site], movers: Sequence[Site], seed: int) -> Context:
    bench = Bench(model, question.split("discovery"), seed, check=False)
    context = Context.of(bench, members, study=STUDY, n=question.sizes["validation"])
    return replace(context, movers=tuple(movers))


def _of_head(context: Context, head: Site) -> list[Ingredient | None]:
    look = max((looks(context, head, *places) for places in LOOKS), key=lambda found: found.strength)
    key = str(look.behaviour.parameters["key"])
    copied = key if key in ("answer", "distractor_first") else "answer"
    return [
        look,
        copies(context, head, copied, _side(copies(context, head, copied, 1))),
        writes(context, head, _side(writes(context, head, 1))),
        matters(context, head),
        turns(context, head),
    ]


def _side(ingredient: Ingredient) -> int:
    """The sign found on discovery."""
    return 1 if ingredient.mean >= 0 else -1


def _claims(context: Context, part: Site, role: str, said: Sequence[Ingredient | None]) -> tuple[Claim, ...]:
    """The claims of these ingredients, made even where a threshold does not hold."""
    forced = [replace(ingredient, strength=1.0) for ingredient in said if ingredient is not None]
    return role_fit(context, part, role, forced).claims
