"""A circuit as a description: what it does alone (faithfulness), and what is lost without it (completeness).

Both are predicted under resample ablation and compared with random sets of the same size and composition. The verdict
uses the paired leg against their mean; the rank among them is reported beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

from vesalius.describe.description import Description, Discovery, Prediction
from vesalius.parts import Part, Together
from vesalius.quantities import COMPLETENESS, FAITHFULNESS
from vesalius.quantities.circuit import random_sets

AT_LEAST = 0.5
"""Smallest share of the effect worth claiming; half of that is the margin over random sets."""
PARAMETERS = {"ablation": "resample"}
LABEL = "circuit"


def needed_draws(draws: int) -> int:
    """How many random sets completeness is compared with: no rank is reported there, so a fifth will do."""
    return min(draws, max(draws // 5, 4))


def describe_circuit(discovery: Discovery, members: Sequence[Part], draws: int) -> Description:
    """Two predictions. draws: random sets that faithfulness is compared with.

    With fewer components outside the circuit than in it there are no sets to compare completeness with: the claim has
    no such leg, and says so.
    """
    circuit, runs = Together(tuple(members)), discovery.runs
    total = FAITHFULNESS.scale_of(runs, circuit, PARAMETERS) or 0.0
    kept, lost = (runs.mean(of.measure(runs, circuit, PARAMETERS)) for of in (FAITHFULNESS, COMPLETENESS))
    keep, sign = "keep" if len(members) > 1 else "keeps", 1 if total > 0 else -1
    fewer, them = needed_draws(draws), "them" if len(members) > 1 else "it"
    outside = bool(random_sets(runs, members, 1, discovery.seed, outside=True))
    compared = f"mean of {fewer} random sets of the same size and composition, outside the circuit"
    alone = " (too few components lie outside it to compare with)"
    size = AT_LEAST * abs(total)
    return Description(
        circuit,
        LABEL,
        (
            Prediction(
                FAITHFULNESS.name,
                PARAMETERS,
                kept,
                1.0,
                f"alone {keep} {kept:+.2f} of {total:+.2f}",
                f"{keep} at least half of the effect when all others get corrupted values",
                sign,
                size,
                total,
                control={"rule": f"mean of {draws} random sets of the same size and composition", "draws": draws},
            ),
            Prediction(
                COMPLETENESS.name,
                PARAMETERS,
                lost,
                1.0,
                f"without {them} {lost:+.2f} is lost",
                f"{'are' if len(members) > 1 else 'is'} needed: with corrupted values (the embeddings left alone) at "
                f"least half of the effect is lost{'' if outside else alone}",
                sign,
                size,
                total,
                control={"rule": compared, "draws": fewer} if outside else {},
            ),
        ),
        name=f"the {len(members)} components of the circuit" if len(members) > 1 else "the circuit's one component",
    )
