"""From evidence to verdicts: one pure function, the decision rule of the protocol of a claim.

With s the sign of the claim, e_i the raw effects, c_i the matched control's and b_i a declared null's:

    effect    theta = mean(s e) - delta
    control   theta = mean(s e - s c) - delta_c      (when the claim names a control)
    <null>    theta = mean(s e - s b) - margin       (one leg per declared null)

Every mean is over groups of the first clustering (templates), each counting once, however many examples it has: what is
claimed is claimed about a further template, and none is worth more because more prompts were drawn from it.

SUPPORTED    iff the Holm-adjusted p_S <= .05, p_S the largest p-value over legs of H0: theta <= 0.
REFUTED      iff the Holm-adjusted p_R <= .05, p_R = min(1, K * smallest p-value over the K legs of H0: theta >= 0).
NOT SPECIFIC instead of REFUTED, when it is the control or a null that refutes and the effect itself holds: its own p of
             H0: theta <= 0, Holm-adjusted over the effect legs of the family, is <= .05. True, and nothing special.
INCONCLUSIVE otherwise. A large p-value never refutes.

Where the protocol leaves room, this is what is done:

- p-values are clustered t by the kinds of group in the claim's parameter "clusters", which must all be there; by
  default by "template" and "names", as far as the evidence has them, else by its first two other kinds in alphabetical
  order. A label "Mary|John" is in the groups of both names. Evidence without groups is clustered by example hash: one
  that occurs twice counts once.
- Each p-value is the larger of Student's and of that which holds when groups are skewed (log-normal, to the side that
  makes the claim look good), and never below 2^-G (`stats.skewed`). With twelve templates only large effects decide
  then; a smaller one is INCONCLUSIVE, with the number that would decide.
- Under six effective groups (degrees of freedom + 1) nothing is decided: p = 1.
- A claim with parameter {"test": "rank"} tests a leg other than the effect by rank when the evidence has at least
  m / alpha null draws of the mean effect under the leg's name: p = (1 + #{s draw >= s mean(e) - margin}) / (draws + 1),
  theta = s mean(e) - margin - mean(s draw). With fewer draws the paired leg is used; if there are no paired values
  either, the evidence cannot be used (ProtocolError).
- Holm runs over the m claims of the family, for p_S and p_R separately; a claim without measured evidence, or measured
  on fewer than six effective groups, counts as p = 1. As evidence comes in, adjusted p-values can only fall, so that
  SUPPORTED and REFUTED stay.
- The reason of REFUTED is about the effect when the effect leg alone refutes (K p <= .05), or else when its p is the
  smallest: "absent" if TOST puts the mean within +-delta, else "opposite" if the signed mean is significantly below 0
  (two-sided), else "too_small"; both at .05, Holm-adjusted over the family, since a reason is a statement as well.
  Otherwise the control or a null refutes, of an effect that is not sure: "not_specific".
- INCONCLUSIVE says n_too_small with the n that would reach 80 % power at alpha / m, were the true effects the observed
  ones: for support if all observed thetas are positive, else for refutation by a leg that is not. Each leg says it in
  groups as well, beside the effective number it has. When only the number of null draws stands in the way, n is None.
- An effect whose sign differs in another condition (another claim of the family on the same subject, check and unit, or
  the evidence's diagnostics "other_conditions") is capped at its named condition. Fewer than 12 groups of the first
  clustering: "on these templates only".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vesalius.protocol import Claim, Evidence, Verdict, canonical_json
from vesalius.protocol.legs import ALPHA, Floats, Labels, Leg, check_legs, clusters_of, legs_of
from vesalius.stats import TTest, clustered_t, group_mean, holm, n_to_decide, tost

GENERAL_FROM, FEWEST_GROUPS = 12, 6

_P = ("p_supported", "p_refuted", "p_effect", "p_absent", "p_opposite")


@dataclass(frozen=True)
class _Test:
    """A claim with its measured evidence, its clusterings and its legs (none when there are fewer than two groups)."""

    claim: Claim
    evidence: Evidence
    clusters: tuple[Labels, ...]
    legs: tuple[Leg, ...]
    tries: int = 1

    @property
    def decides(self) -> bool:
        """Whether there are groups enough for any verdict."""
        return bool(self.legs) and (self.legs[0].effective_groups or 0.0) >= FEWEST_GROUPS

    @property
    def p_supported(self) -> float:
        return max(leg.p_greater for leg in self.legs) if self.decides else 1.0

    @property
    def p_refuted(self) -> float:
        return min(1.0, len(self.legs) * min(leg.p_less for leg in self.legs)) if self.decides else 1.0

    @property
    def p_effect(self) -> float:
        """Of H0: the effect alone is no more than delta."""
        return self.legs[0].p_greater if self.decides else 1.0

    @property
    def p_absent(self) -> float:
        """Of H0: the effect is delta or more, on one side or the other."""
        return tost(self.effects, self.claim.delta, *self.clusters, skewed=True) if self.decides else 1.0

    @property
    def p_opposite(self) -> float:
        """Of H0: the effect has the claimed sign or none; two-sided."""
        return min(1.0, 2 * self._signed.p_less_skewed) if self.decides else 1.0

    @property
    def _signed(self) -> TTest:
        return clustered_t(self.claim.sign * self.effects, *self.clusters)

    @property
    def mean(self) -> float:
        """Over groups, of the raw effects."""
        return group_mean(self.effects, self.clusters[0])

    @property
    def effects(self) -> Floats:
        return np.array(self.evidence.effects)

    @property
    def n_groups(self) -> int:
        return len(set(self.clusters[0]))


def decide(
    claims: Sequence[Claim],
    evidences: Mapping[str, Evidence],
    *,
    exploratory: bool = False,
    tries: Mapping[str, int] | None = None,
) -> tuple[Verdict, ...]:
    """The verdict of every claim of a family, in order; the rule is in the module's docstring.

    evidences: claim id -> its one primary evidence; claims that have none, unmeasured evidence or evidence with missing
    examples count as p = 1. tries: claim id -> how many times it was tried, default once; its p-values count as the
    smallest of so many.
    Raises ProtocolError for evidence that lacks a leg of its claim.
    """
    m = len(claims)
    tests = [_test(claim, evidences.get(claim.id), m, (tries or {}).get(claim.id, 1)) for claim in claims]
    adjusted = zip(*(_adjusted(tests, name).tolist() for name in _P), strict=True)
    conflicts = _conflicts([test for test in tests if test is not None])
    verdicts = []
    for claim, test, p in zip(claims, tests, adjusted, strict=True):
        if test is None:
            verdicts.append(_unmeasured(claim, exploratory))
        else:
            scope = _scope(test, claim.id in conflicts)
            verdicts.append(_verdict(test, dict(zip(_P, p, strict=True)), m, scope, exploratory))
    return tuple(verdicts)


def _adjusted(tests: Sequence[_Test | None], name: str) -> Floats:
    return holm([1.0 if test is None else min(1.0, test.tries * getattr(test, name)) for test in tests])


def _test(claim: Claim, evidence: Evidence | None, m: int, tries: int) -> _Test | None:
    if evidence is None or not evidence.counts:
        return None
    check_legs(claim, evidence, m)
    clusters = clusters_of(claim, evidence)
    testable = evidence.n >= 2 and all(len(set(labels)) >= 2 for labels in clusters)
    return _Test(claim, evidence, clusters, legs_of(claim, evidence, clusters, m) if testable else (), tries)


def _verdict(test: _Test, p: Mapping[str, float], m: int, scope: str, exploratory: bool) -> Verdict:
    """p: Holm-adjusted, by name (`_P`)."""
    outcome, reason, enough = _outcome(test, p, m)
    interval = clustered_t(test.effects, *test.clusters) if test.legs else None
    return Verdict(
        claim_id=test.claim.id,
        outcome=outcome,
        reason=reason,
        p_supported=test.p_supported,
        p_supported_holm=p["p_supported"],
        p_refuted=test.p_refuted,
        p_refuted_holm=p["p_refuted"],
        estimate=test.mean,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        n=test.evidence.n,
        n_groups=test.n_groups,
        legs=tuple(leg.to_json() | _to_decide(leg, test, m, outcome) for leg in test.legs),
        n_to_decide=enough,
        scope=scope,
        exploratory=exploratory,
    )


def _outcome(test: _Test, p: Mapping[str, float], m: int) -> tuple[str, str | None, int | None]:
    if p["p_supported"] <= ALPHA:
        return "SUPPORTED", None, None
    if p["p_refuted"] <= ALPHA:
        why = _why_refuted(test, p)
        special = why == "not_specific" and p["p_effect"] <= ALPHA
        return ("NOT SPECIFIC", None, None) if special else ("REFUTED", why, None)
    enough = _n_to_decide(test, m)
    limited_by_draws = test.decides and enough is None
    return "INCONCLUSIVE", None if limited_by_draws else "n_too_small", enough


def _why_refuted(test: _Test, p: Mapping[str, float]) -> str:
    effect = test.legs[0]
    alone = len(test.legs) * effect.p_less <= ALPHA
    if not alone and effect.p_less > min(leg.p_less for leg in test.legs):
        return "not_specific"
    if p["p_absent"] <= ALPHA:
        return "absent"
    return "opposite" if p["p_opposite"] <= ALPHA else "too_small"


def _n_to_decide(test: _Test, m: int) -> int | None:
    wrong = [leg for leg in test.legs if leg.theta <= 0]
    if not wrong:
        if any(leg.values is None and leg.p_greater > ALPHA / m for leg in test.legs):
            return None
        needed = max((_needed(leg, test, m) for leg in test.legs if leg.values is not None), default=math.inf)
    else:
        needed = min((_needed(leg, test, m) for leg in wrong if leg.values is not None), default=math.inf)
    # The power is an expectation; what was measured already has not decided, so it takes at least one more.
    return None if math.isinf(needed) else max(int(needed), test.evidence.n + 1)


def _needed(leg: Leg, test: _Test, m: int) -> float:
    """Examples with which a leg would likely be decided on the side where it lies."""
    assert leg.values is not None and leg.effective_groups is not None
    side, alpha = (1, ALPHA / m) if leg.theta > 0 else (-1, ALPHA / (m * len(test.legs)))
    fewest = math.ceil(FEWEST_GROUPS * test.evidence.n / leg.effective_groups)
    return max(fewest, n_to_decide(side * leg.values, *test.clusters, alpha=alpha, skewed=True))


def _to_decide(leg: Leg, test: _Test, m: int, outcome: str) -> dict[str, int | None]:
    """The same in groups of the first clustering; None where the claim is decided or no number would do."""
    needed = math.inf if outcome != "INCONCLUSIVE" or leg.values is None else _needed(leg, test, m)
    return {"groups_to_decide": None if math.isinf(needed) else math.ceil(needed * test.n_groups / test.evidence.n)}


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
        here = (canonical_json(test.claim.condition), test.mean)
        known.setdefault(_about(test), []).append(here)
        known.setdefault(test.claim.id, []).extend((name, float(mean)) for name, mean in named.items())
    return {test.claim.id for test in tests if _differs(test, known[_about(test)] + known[test.claim.id])}


def _about(test: _Test) -> str:
    return canonical_json([test.claim.subject, test.claim.quantity, test.claim.unit])


def _differs(test: _Test, elsewhere: Sequence[tuple[str, float]]) -> bool:
    condition, here = canonical_json(test.claim.condition), test.mean
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
