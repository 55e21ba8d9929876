"""What a set of components does alone, and what the rest does without it.

    faithfulness   the circuit kept, everything else ablated
    completeness   the circuit ablated, everything else kept: what the rest still does
    minimality     each member's marginal: the circuit with and without it, everything else ablated

Each is measured under zero, mean and resample ablation, because the answer depends on it (Miller et al. 2024): one
number would hide that. Figures are shares of what ablating everything takes away, a ratio of means over prompts (Wang
et al. 2022; a mean of ratios would be dominated by prompts with a small denominator).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vesalius.bench import EMBED, Bench, components
from vesalius.circuits.effects import clusters
from vesalius.errors import InputError, UnknownNameError
from vesalius.patching.donors import Donor, mean_donor, patch_donor, zero_donor
from vesalius.patching.record import Record
from vesalius.patching.variants import Variant
from vesalius.patching.what import normal
from vesalius.site import Site
from vesalius.stats import clustered_t

ABLATIONS = ("zero", "mean", "resample")
Floats = NDArray[np.float64]


def ablation_donor(bench: Bench, ablation: str) -> tuple[Record, Donor]:
    """Base run and values of an ablation.

    zero: zeros everywhere. mean: mean over the positions of the last corruption's prompts (the one that changes most).
    resample: the prompt's own values under the main corruption, position by position.
    """
    base = bench.run("clean")
    written = sorted({normal(part)[0] for part in components(bench.model)}, key=lambda site: site.order)
    if ablation == "zero":
        return base, zero_donor(base, written)
    if ablation == "mean":
        return base, mean_donor(base, bench.run(list(bench.corruptions)[-1]), written)
    if ablation == "resample":
        return base, patch_donor(base, bench.run(bench.main))
    raise UnknownNameError("ablation", ablation, ABLATIONS)


def kept(bench: Bench, sets: Sequence[Sequence[Site]], ablation: str, task: str = "") -> Floats:
    """Logit difference [set, example] with only the given components kept and everything else ablated."""
    everything = components(bench.model)
    rest = [_without(everything, members) for members in sets]
    return _ablated(bench, rest, ablation, task or f"keep {len(sets)} sets, {ablation}")


def removed(bench: Bench, sets: Sequence[Sequence[Site]], ablation: str) -> Floats:
    """Logit difference [set, example] with the given components ablated and everything else kept."""
    return _ablated(bench, [tuple(members) for members in sets], ablation, f"remove {len(sets)} sets, {ablation}")


def _without(everything: Sequence[Site], members: Sequence[Site]) -> tuple[Site, ...]:
    inside = set(members)
    foreign = inside - set(everything)
    if foreign:
        raise InputError(f"{min(map(str, foreign))} is no component: embed, heads (layers.0.z[1]) and MLPs are")
    return tuple(part for part in everything if part not in inside)


def _ablated(bench: Bench, sets: Sequence[tuple[Site, ...]], ablation: str, task: str) -> Floats:
    """Logit difference [set, example] with each set ablated; ablating nothing leaves the clean run as it is."""
    base, donor = ablation_donor(bench, ablation)
    values = np.tile(bench.metric("clean").double().numpy(), (len(sets), 1))
    edited = [number for number, parts in enumerate(sets) if parts]
    if edited:
        variants = [Variant(sets[number]) for number in edited]
        values[edited] = bench.evaluate(variants, base, donor, task).values.double().numpy()
    return values


@dataclass(frozen=True, eq=False)
class Share:
    """A share of the effect: (values - empty) / mean(full - empty) per example, with a clustered 95 % interval."""

    ablation: str
    estimate: float
    low: float
    high: float
    per_example: Floats

    def to_json(self) -> dict[str, Any]:
        numbers = {"estimate": self.estimate, "low": self.low, "high": self.high}
        return {"ablation": self.ablation, **numbers, "n": len(self.per_example)}


def share(bench: Bench, values: Floats, empty: Floats, ablation: str) -> Share:
    """values, empty: [example] logit differences; empty is the run with everything ablated."""
    full = bench.metric("clean").double().numpy()
    per_example = (values - empty) / (full - empty).mean()
    test = clustered_t(per_example, *clusters(bench))
    return Share(ablation, test.estimate, test.low, test.high, per_example)


def random_sets(
    bench: Bench, members: Sequence[Site], draws: int, seed: int, *, outside: bool = False
) -> list[tuple[Site, ...]]:
    """Random sets of the same size and composition: as many heads and MLPs, the embeddings iff the circuit has them.

    outside: draw from what is not in the circuit, as far as there is enough of it (what another set would cost to lose;
    a set that shares members with the circuit is needed for their sake).
    """
    generator = torch.Generator().manual_seed(seed)
    pools = [_pool(bench, members, kind, outside) for kind in ("z", "mlp_out")]
    found = []
    for _ in range(draws):
        chosen: list[Site] = [EMBED] if EMBED in members else []
        for pool, count in pools:
            chosen += [pool[int(i)] for i in torch.randperm(len(pool), generator=generator)[:count]]
        found.append(tuple(chosen))
    return found


def _pool(bench: Bench, members: Sequence[Site], kind: str, outside: bool) -> tuple[list[Site], int]:
    """Components of a kind to draw from, and how many of them."""
    everything = [part for part in components(bench.model) if part.kind == kind]
    count = sum(part.kind == kind for part in members)
    others = [part for part in everything if part not in set(members)]
    return (others if outside and len(others) >= count else everything), count
