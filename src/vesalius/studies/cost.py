"""What a study will cost, said before it starts."""

from __future__ import annotations

import time
from collections.abc import Sequence

from vesalius.bench import DIRECTIONS, Bench, components
from vesalius.circuits import ABLATIONS
from vesalius.jobs import Estimate
from vesalius.metric import logit_diff
from vesalius.patching.cost import estimate
from vesalius.patching.evaluate import evaluate
from vesalius.patching.variants import Variant

# What the search for a circuit takes depends on what it finds: about this many candidate sets, and this many members.
TYPICAL_SETS, TYPICAL_MEMBERS = 250, 40
# Parts patched to find out how fast this machine is.
TIMED = 4


def estimate_study(bench: Bench, random_sets: int) -> Estimate:
    """From exact counts of the patching runs, typical counts of the rest, and the time a few parts take to patch."""
    parts = [Variant((part,)) for part in components(bench.model)]
    patching = sum(
        _patching(bench, parts, corruption, direction) for corruption in bench.corruptions for direction in DIRECTIONS
    )
    sets = bench.n * (TYPICAL_SETS * _live(bench) + random_sets * (len(ABLATIONS) - 1 + _live(bench)) + TYPICAL_MEMBERS)
    forwards = patching + sets + patching / 4
    return Estimate(seconds=_seconds(bench, parts[:TIMED]) * forwards, forwards=forwards, memory_bytes=_memory(bench))


def _seconds(bench: Bench, parts: Sequence[Variant]) -> float:
    """Seconds per forward equivalent, from a few parts patched for the purpose."""
    base, donor = bench.donor(bench.main, "noising")
    evaluate(base, parts[:1], donor, bench.pairs, logit_diff, check=False)  # the first sweep warms up and is not timed
    began = time.perf_counter()
    outcome = evaluate(base, parts, donor, bench.pairs, logit_diff, check=False)
    return (time.perf_counter() - began) / max(outcome.cost.spent, 1e-9)


def _patching(bench: Bench, parts: list[Variant], corruption: str, direction: str) -> float:
    base, donor = bench.donor(corruption, direction)
    return estimate(base, parts, donor, bench.pairs.at + 1).spent


def _live(bench: Bench) -> float:
    """Share of a prompt from its first changed position on: what has to be computed again."""
    _, donor = bench.donor(bench.main, "noising")
    return float((1 - donor.first / (bench.pairs.at + 1)).mean())


def _memory(bench: Bench) -> int:
    """Weights, and one recorded run per kind of prompt."""
    weights = sum(p.numel() * p.element_size() for p in bench.model.module.parameters())
    run = bench.run("clean")
    held = sum(t.numel() * t.element_size() for group in (run.resid, run.queries, run.keys, run.values) for t in group)
    held += sum(t.numel() * t.element_size() for t in run.sites.values())
    return weights + held * (1 + len(bench.corruptions))
