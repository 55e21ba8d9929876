"""The inequalities that a claim makes about its evidence, each with its p-values.

Which ones there are, and what their p-values respect, is told in `protocol.verdict`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vesalius.errors import ProtocolError
from vesalius.protocol import Claim, Evidence
from vesalius.stats import clustered_t, group_mean, rank_p

ALPHA = 0.05
DEFAULT_CLUSTERS = ("template", "names")
_OF_LEG = ("name", "theta", "low", "high", "p_greater", "p_less", "effective_groups")

Floats = NDArray[np.float64]
Labels = tuple[str, ...]


@dataclass(frozen=True)
class Leg:
    """One inequality of a claim: theta > 0 on signed effects, with both one-sided p-values and a 95 % interval.

    `values` are the per-example terms of theta; None for a rank leg, which has none. effective_groups: on how many
    independent groups, all alike, it rests, None for a rank leg.
    """

    name: str
    theta: float
    low: float
    high: float
    p_greater: float
    p_less: float
    effective_groups: float | None = None
    values: Floats | None = None

    def to_json(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in _OF_LEG}


def check_legs(claim: Claim, evidence: Evidence, m: int) -> None:
    """Raises ProtocolError unless measured evidence holds every leg and clustering that its claim declared.

    m: number of claims in the family, on which the number of null draws of a rank leg depends.
    """
    clusters_of(claim, evidence)
    for name in _comparisons(claim):
        if not _by_rank(claim, evidence, name, m) and _paired(evidence, name) is None:
            raise ProtocolError(
                f"evidence for claim {claim.id[:12]} lacks the leg {name!r}: it needs one value per example"
                f"{_rank_hint(claim, evidence, name, m)}"
            )


def clusters_of(claim: Claim, evidence: Evidence) -> tuple[Labels, ...]:
    """Labels of the kinds of group that p-values respect. Raises ProtocolError for a kind that the evidence lacks."""
    declared = claim.parameters.get("clusters")
    present = [kind for kind in DEFAULT_CLUSTERS if kind in evidence.groups] or sorted(evidence.groups)[:2]
    kinds = present if declared is None else list(declared)
    missing = [kind for kind in kinds if kind not in evidence.groups]
    if missing or len(kinds) > 2:
        raise ProtocolError(
            f"claim {claim.id[:12]} is clustered by {kinds}, but the evidence has groups {sorted(evidence.groups)}; "
            "declare at most two kinds that the data have"
        )
    return tuple(evidence.groups[kind] for kind in kinds) or (evidence.example_hashes,)


def legs_of(claim: Claim, evidence: Evidence, clusters: tuple[Labels, ...], m: int) -> tuple[Leg, ...]:
    """The effect, the control and every declared null, in this order. Raises as `check_legs`."""
    signed = claim.sign * np.array(evidence.effects)
    legs = [_paired_leg("effect", signed - claim.delta, clusters)]
    for name, margin in _comparisons(claim).items():
        if _by_rank(claim, evidence, name, m):
            # Each group counts once here too; a draw is such a mean of what a random part does.
            observed = group_mean(signed, clusters[0]) - margin
            legs.append(_rank_leg(name, observed, claim.sign * np.array(evidence.draws[name])))
        else:
            other = claim.sign * np.array(_paired(evidence, name))
            legs.append(_paired_leg(name, signed - other - margin, clusters))
    return tuple(legs)


def _comparisons(claim: Claim) -> dict[str, float]:
    """Margin of each leg that compares with something: the control, then the declared nulls."""
    control = {"control": claim.control_margin} if claim.control else {}
    return control | dict(claim.nulls)


def _paired(evidence: Evidence, name: str) -> tuple[float, ...] | None:
    return evidence.control if name == "control" else evidence.nulls.get(name)


def _by_rank(claim: Claim, evidence: Evidence, name: str, m: int) -> bool:
    enough = len(evidence.draws.get(name, ())) >= m / ALPHA * (1 - 1e-12)
    return claim.parameters.get("test") == "rank" and enough


def _rank_hint(claim: Claim, evidence: Evidence, name: str, m: int) -> str:
    if claim.parameters.get("test") != "rank":
        return ""
    return f", or at least {math.ceil(m / ALPHA - 1e-9)} null draws ({len(evidence.draws.get(name, ()))} given)"


def _paired_leg(name: str, values: Floats, clusters: tuple[Labels, ...]) -> Leg:
    test = clustered_t(values, *clusters)
    return Leg(
        name=name,
        theta=test.estimate,
        low=test.low,
        high=test.high,
        p_greater=test.p_greater_skewed,
        p_less=test.p_less_skewed,
        effective_groups=test.effective_groups,
        values=values,
    )


def _rank_leg(name: str, observed: float, draws: Floats) -> Leg:
    low, high = np.quantile(observed - draws, [0.025, 0.975]).tolist()
    greater, less = rank_p(observed, draws), rank_p(-observed, -draws)
    return Leg(name, float(observed - draws.mean()), low, high, greater, less)
