"""What a study will cost, and what it can decide, said before it starts."""

from __future__ import annotations

import time
from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor

from vesalius.jobs import Estimate
from vesalius.jobs.progress import resident
from vesalius.patching.evaluate import evaluate
from vesalius.patching.plan import Plan
from vesalius.patching.targets import Variant
from vesalius.quantities import Runs
from vesalius.quantities.circuit import ABLATIONS
from vesalius.quantities.runs import DIRECTIONS
from vesalius.stats import groups_to_decide
from vesalius.studies.question import SPLITS, Question

# What the search for a circuit takes depends on what it finds: about this many candidate sets, and this many members.
TYPICAL_SETS, TYPICAL_MEMBERS = 250, 40
# Parts patched to find out how fast this machine is.
TIMED = 4
# About as many claims as a study makes, and how far a typical effect lies beyond its threshold, in units of its spread
# between templates.
TYPICAL_CLAIMS, TYPICAL_EFFECT = 20, 1.5
LEVEL = 0.05
# A study's peak memory over what the process holds when the cost is announced: 1.33 in the study of `ioi`.
PEAK = 1.35


def power_note(question: Question) -> list[str]:
    """What the validation split can decide, in sentences; [] where it has groups enough."""
    pairs = question.corruptions[question.main].split(SPLITS[1])
    kind = pairs.clusters[0] if pairs.clusters else ""
    groups = len(set(pairs.groups[kind])) if kind else len(pairs)
    needed = groups_to_decide(TYPICAL_EFFECT, alpha=LEVEL / TYPICAL_CLAIMS, skewed=True)
    if groups >= needed:
        return []
    name = f"{kind}s" if kind and not kind.endswith("s") else kind or "prompts"
    return [
        f"the validation split has {groups} {name}; about {needed} decide a typical claim ({TYPICAL_CLAIMS} claims, an "
        f"effect {TYPICAL_EFFECT} times its spread between {name} beyond the threshold), so most claims will stay "
        f"INCONCLUSIVE. Give prompts of {needed - groups} more {name}"
    ]


def expected_cost(runs: Runs, random_sets: int, shown: int, fresh: int) -> Estimate:
    """From exact counts of the patching runs, typical counts of the rest, and the time a few parts take to patch.

    random_sets: draws that claims are compared with. shown: those of the other ablations. fresh: prompts to test on.
    """
    parts = [Variant((part,)) for part in runs.components]
    patching = sum(
        _patching(runs, parts, corruption, direction) for corruption in runs.corruptions for direction in DIRECTIONS
    )
    live = _live(runs)
    search = runs.n * TYPICAL_SETS * live
    test = fresh * (min(shown, random_sets) * (len(ABLATIONS) - 1) + random_sets * 2 * live + TYPICAL_MEMBERS)
    forwards = patching + search + test + patching / 4
    return Estimate(
        seconds=_seconds(runs, parts[:TIMED]) * forwards, forwards=forwards, memory_bytes=int(PEAK * resident())
    )


def _seconds(runs: Runs, parts: Sequence[Variant]) -> float:
    """Seconds per forward equivalent, from a few parts patched for the purpose."""
    base, source = runs.source(runs.main, "noising")
    rows, metric, _ = runs.contrast.metric.rows_of(runs.pairs)
    evaluate(base, parts[:1], source, rows, metric, check=False)  # the first sweep warms up and is not timed
    began = time.perf_counter()
    outcome = evaluate(base, parts, source, rows, metric, check=False)
    return (time.perf_counter() - began) / max(outcome.cost.spent, 1e-9)


def _patching(runs: Runs, parts: list[Variant], corruption: str, direction: str) -> float:
    base, source = runs.source(corruption, direction)
    return Plan(base, parts, source, _ends(runs)).estimate().spent


def _live(runs: Runs) -> float:
    """Share of a prompt from its first changed position on: what has to be computed again."""
    _, source = runs.source(runs.main, "noising")
    return float((1 - source.first / _ends(runs)).mean())


def _ends(runs: Runs) -> Int[Tensor, " row"]:
    """Of the rows that are run: answers of several tokens take two for each prompt."""
    return runs.contrast.metric.rows_of(runs.pairs)[0].ends
