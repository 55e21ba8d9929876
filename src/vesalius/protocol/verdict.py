"""From evidence to verdicts: one pure function, the decision rule of the protocol of a claim.

With s the sign of the claim, e_i the raw effects, c_i the matched control's and b_i a declared null's:

    effect    theta = mean(s e) - delta
    control   theta = mean(s e - s c) - delta_c      (when the claim names a control)
    <null>    theta = mean(s e - s b) - margin       (one leg per declared null)

SUPPORTED    iff the Holm-adjusted p_S <= .05, p_S the largest p-value over legs of H0: theta <= 0.
REFUTED      iff the Holm-adjusted p_R <= .05, p_R = min(1, K * smallest p-value over the K legs of H0: theta >= 0).
NOT SPECIFIC instead of REFUTED, when it is the control or a null that refutes and the effect itself holds: its own p of
             H0: theta <= 0, Holm-adjusted over the effect legs of the family, is <= .05. True, and nothing special.
INCONCLUSIVE otherwise. A large p-value never refutes.

Where the protocol leaves room, this is what is done:

- p-values are clustered t (`stats.clustered_t`) by the kinds of group in the claim's parameter "clusters", which must
  all be there; by default by "template" and "names", as far as the evidence has them, else by its first two other kinds
  in alphabetical order. Evidence without groups is clustered by example hash: one that occurs twice counts once.
- A claim with parameter {"test": "rank"} tests a leg other than the effect by rank when the evidence has at least
  m / alpha null draws of the mean effect under the leg's name: p = (1 + #{s draw >= s mean(e) - margin}) / (draws + 1),
  theta = s mean(e) - margin - mean(s draw). With fewer draws the paired leg is used; if there are no paired values
  either, the evidence cannot be used (ProtocolError).
- Holm runs over the m claims of the family, for p_S and p_R separately; a claim without measured evidence, or measured
  on fewer than two groups, counts as p = 1. As evidence comes in, adjusted p-values can only fall, so that SUPPORTED
  and REFUTED stay.
- The reason of REFUTED is about the effect when the effect leg alone refutes (K p <= .05), or else when its p is the
  smallest: "absent" if TOST at .05 puts the mean within +-delta, else "opposite" if the signed mean is significantly
  below 0, else "too_small". Otherwise the control or a null refutes, of an effect that is not sure: "not_specific".
- INCONCLUSIVE says n_too_small with the n that would reach 80 % power at alpha / m, were the true effects the observed
  ones: for support if all observed thetas are positive, else for refutation by a leg that is not. When only the number
  of null draws stands in the way, it says None.
- An effect whose sign differs in another condition (another claim of the family on the same subject, check and unit, or
  the evidence's diagnostics "other_conditions") is capped at its named condition. Fewer than 12 groups of the first
  clustering: "on these templates only".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vesalius.errors import ProtocolError
from vesalius.protocol import Claim, Evidence, Verdict, canonical_json
from vesalius.stats import clustered_t, holm, n_to_decide, rank_p, tost

ALPHA = 0.05
GENERAL_FROM = 12
DEFAULT_CLUSTERS = ("template", "names")

Floats = NDArray[np.float64]
Labels = tuple[str, ...]


@dataclass(frozen=True)
class Leg:
    """One inequality of a claim: theta > 0 on signed effects, with both one-sided p-values and a 95 % interval.

    `values` are the per-example terms of theta; None for a rank leg, which has none.
    """

    name: str
    theta: float
    low: float
    high: float
    p_greater: float
    p_less: float
    values: Floats | None = None

    def to_json(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("name", "theta", "low", "high", "p_greater", "p_less")}


@dataclass(frozen=True)
class _Test:
    """A claim with its measured evidence, its clusterings and its legs (none when there are fewer than two groups)."""

    claim: Claim
    evidence: Evidence
    clusters: tuple[Labels, ...]
    legs: tuple[Leg, ...]

    @property
    def p_supported(self) -> float:
        return max((leg.p_greater for leg in self.legs), default=1.0)

    @property
    def p_refuted(self) -> float:
        if not self.legs:
            return 1.0
        return min(1.0, len(self.legs) * min(leg.p_less for leg in self.legs))

    @property
    def p_effect(self) -> float:
        """Of H0: the effect alone is no more than delta."""
        return self.legs[0].p_greater if self.legs else 1.0

    @property
    def effects(self) -> Floats:
        return np.array(self.evidence.effects)

    @property
    def n_groups(self) -> int:
        return len(set(self.clusters[0]))


def decide(
    claims: Sequence[Claim], evidences: Mapping[str, Evidence], *, exploratory: bool = False
) -> tuple[Verdict, ...]:
    """The verdict of every claim of a family, in order; the rule is in the module's docstring.

    evidences: claim id -> its one primary evidence; claims that have none, or unmeasured evidence, count as p = 1.
    Raises ProtocolError for evidence that lacks a leg of its claim.
    """
    m = len(claims)
    tests = [_test(claim, evidences.get(claim.id), m) for claim in claims]
    supported = holm([1.0 if test is None else test.p_supported for test in tests])
    refuted = holm([1.0 if test is None else test.p_refuted for test in tests])
    effect = holm([1.0 if test is None else test.p_effect for test in tests])
    conflicts = _conflicts([test for test in tests if test is not None])
    verdicts = []
    adjusted = zip(supported.tolist(), refuted.tolist(), effect.tolist(), strict=True)
    for claim, test, p in zip(claims, tests, adjusted, strict=True):
        if test is None:
            verdicts.append(_unmeasured(claim, exploratory))
        else:
            verdicts.append(_verdict(test, p, m, _scope(test, claim.id in conflicts), exploratory))
    return tuple(verdicts)


def check_legs(claim: Claim, evidence: Evidence, m: int) -> None:
    """Raises ProtocolError unless measured evidence holds every leg and clustering that its claim declared.

    m: number of claims in the family, on which the number of null draws of a rank leg depends.
    """
    _clusters(claim, evidence)
    for name in _comparisons(claim):
        if not _by_rank(claim, evidence, name, m) and _paired(evidence, name) is None:
            raise ProtocolError(
                f"evidence for claim {claim.id[:12]} lacks the leg {name!r}: it needs one value per example"
                f"{_rank_hint(claim, evidence, name, m)}"
            )


def _test(claim: Claim, evidence: Evidence | None, m: int) -> _Test | None:
    if evidence is None or not evidence.measured:
        return None
    check_legs(claim, evidence, m)
    clusters = _clusters(claim, evidence)
    testable = evidence.n >= 2 and all(len(set(labels)) >= 2 for labels in clusters)
    return _Test(claim, evidence, clusters, _legs(claim, evidence, clusters, m) if testable else ())


def _clusters(claim: Claim, evidence: Evidence) -> tuple[Labels, ...]:
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


def _legs(claim: Claim, evidence: Evidence, clusters: tuple[Labels, ...], m: int) -> tuple[Leg, ...]:
    signed = claim.sign * np.array(evidence.effects)
    legs = [_paired_leg("effect", signed - claim.delta, clusters)]
    for name, margin in _comparisons(claim).items():
        if _by_rank(claim, evidence, name, m):
            legs.append(_rank_leg(name, signed.mean() - margin, claim.sign * np.array(evidence.draws[name])))
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
    return Leg(name, test.estimate, test.low, test.high, test.p_greater, test.p_less, values)


def _rank_leg(name: str, observed: float, draws: Floats) -> Leg:
    low, high = np.quantile(observed - draws, [0.025, 0.975]).tolist()
    greater, less = rank_p(observed, draws), rank_p(-observed, -draws)
    return Leg(name, float(observed - draws.mean()), low, high, greater, less)


def _verdict(test: _Test, p: tuple[float, float, float], m: int, scope: str, exploratory: bool) -> Verdict:
    """p: Holm-adjusted, of support, of refutation, and of the effect alone."""
    outcome, reason, enough = _outcome(test, p, m)
    interval = clustered_t(test.effects, *test.clusters) if test.legs else None
    return Verdict(
        claim_id=test.claim.id,
        outcome=outcome,
        reason=reason,
        p_supported=test.p_supported,
        p_supported_holm=p[0],
        p_refuted=test.p_refuted,
        p_refuted_holm=p[1],
        estimate=float(test.effects.mean()),
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        n=test.evidence.n,
        n_groups=test.n_groups,
        legs=tuple(leg.to_json() for leg in test.legs),
        n_to_decide=enough,
        scope=scope,
        exploratory=exploratory,
    )


def _outcome(test: _Test, p: tuple[float, float, float], m: int) -> tuple[str, str | None, int | None]:
    supported, refuted, effect = p
    if supported <= ALPHA:
        return "SUPPORTED", None, None
    if refuted <= ALPHA:
        why = _why_refuted(test)
        return ("NOT SPECIFIC", None, None) if why == "not_specific" and effect <= ALPHA else ("REFUTED", why, None)
    enough = _n_to_decide(test, m)
    limited_by_draws = bool(test.legs) and enough is None
    return "INCONCLUSIVE", None if limited_by_draws else "n_too_small", enough


def _why_refuted(test: _Test) -> str:
    effect = test.legs[0]
    alone = len(test.legs) * effect.p_less <= ALPHA
    if not alone and effect.p_less > min(leg.p_less for leg in test.legs):
        return "not_specific"
    signed = test.claim.sign * test.effects
    if tost(signed, test.claim.delta, *test.clusters) <= ALPHA:
        return "absent"
    return "opposite" if clustered_t(signed, *test.clusters).p_less <= ALPHA else "too_small"


def _n_to_decide(test: _Test, m: int) -> int | None:
    paired = [leg for leg in test.legs if leg.values is not None]
    wrong = [leg for leg in test.legs if leg.theta <= 0]
    if not wrong:
        if any(leg.values is None and leg.p_greater > ALPHA / m for leg in test.legs):
            return None
        needed = max((_needed(leg, test, ALPHA / m, 1) for leg in paired), default=math.inf)
    else:
        each = ALPHA / (m * len(test.legs))
        needed = min((_needed(leg, test, each, -1) for leg in wrong if leg.values is not None), default=math.inf)
    # The power is an expectation; what was measured already has not decided, so it takes at least one more.
    return None if math.isinf(needed) else max(int(needed), test.evidence.n + 1)


def _needed(leg: Leg, test: _Test, alpha: float, side: int) -> float:
    assert leg.values is not None
    return n_to_decide(side * leg.values, *test.clusters, alpha=alpha)


def _scope(test: _Test, sign_differs: bool) -> str:
    limits = [_named(test.claim)] if sign_differs else []
    if test.n_groups < GENERAL_FROM:
        limits.append("on these templates only")
    return "; ".join(limits) or "general"


def _conflicts(tests: Sequence[_Test]) -> set[str]:
    """Ids of the claims whose effect has another sign in another condition."""
    known: dict[str, list[tuple[str, float]]] = {}
    for test in tests:
        named = test.evidence.diagnostics.get("other_conditions", {})
        here = (canonical_json(test.claim.condition), float(test.effects.mean()))
        known.setdefault(_about(test), []).append(here)
        known.setdefault(test.claim.id, []).extend((name, float(mean)) for name, mean in named.items())
    return {test.claim.id for test in tests if _differs(test, known[_about(test)] + known[test.claim.id])}


def _about(test: _Test) -> str:
    return canonical_json([test.claim.subject, test.claim.quantity, test.claim.unit])


def _differs(test: _Test, elsewhere: Sequence[tuple[str, float]]) -> bool:
    condition, here = canonical_json(test.claim.condition), float(test.effects.mean())
    return any(other != condition and here * mean < 0 for other, mean in elsewhere)


def _named(claim: Claim) -> str:
    stated = ", ".join(f"{key}={value}" for key, value in sorted(claim.condition.items()))
    return f"only under {stated}" if stated else "only under the tested condition"


def _unmeasured(claim: Claim, exploratory: bool) -> Verdict:
    return Verdict(
        claim_id=claim.id,
        outcome="INCONCLUSIVE",
        reason="unmeasured",
        p_supported=1.0,
        p_supported_holm=1.0,
        p_refuted=1.0,
        p_refuted_holm=1.0,
        estimate=None,
        low=None,
        high=None,
        n=0,
        n_groups=0,
        exploratory=exploratory,
    )
