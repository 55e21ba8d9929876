"""Laws of the decision rule: what supports, what refutes and why, and that nothing else ever does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats as reference

from vesalius.errors import ProtocolError
from vesalius.protocol import Claim, Evidence, Verdict, canonical_json, unmeasured
from vesalius.protocol.legs import check_legs
from vesalius.protocol.verdict import decide
from vesalius.stats import clustered_t, skewed_p, tost

TEMPLATES, SIZE = 16, 4
LABELS = tuple(f"t{i // SIZE}" for i in range(TEMPLATES * SIZE))


def claim(**changes: Any) -> Claim:
    given = {"statement": "s", "subject": {"site": "layers.3.z[1]"}, "check": "patch", "delta": 0.5, "n": 64}
    given |= {"total_effect": 10.0, "control": {"parts": ["layers.3.z[2]"]}}
    return Claim(**{**given, **changes})


def sample(mean: float, seed: int = 0, spread: float = 0.5, templates: int = TEMPLATES) -> np.ndarray:
    """Effects with an intraclass correlation of .4, with this sample mean exactly."""
    rng = np.random.default_rng(seed)
    shared, own = rng.normal(size=(templates, 1)) * 0.4**0.5, rng.normal(size=(templates, SIZE)) * 0.6**0.5
    raw = (shared + own).ravel() * spread
    return raw - raw.mean() + mean


def found(of: Claim, effects: Sequence[float] | np.ndarray, control: Any = None, **changes: Any) -> Evidence:
    effects = np.asarray(effects)
    if control is None and of.control:
        control = sample(0.0, seed=99)[: len(effects)]
    given = {"effects": effects.tolist(), "control": None if control is None else np.asarray(control).tolist()}
    given |= {"groups": {"template": LABELS[: len(effects)]}}
    given |= {"example_hashes": tuple(f"e{i}" for i in range(len(effects)))}
    return Evidence(claim_id=of.id, **{**given, **changes})


def verdict(of: Claim, evidence: Evidence, others: int = 0) -> Verdict:
    """The verdict of one claim in a family with `others` unmeasured ones."""
    rest = [claim(statement=f"other {i}", subject={"other": i}) for i in range(others)]
    return decide([of, *rest], {of.id: evidence})[0]


def test_a_large_specific_effect_is_supported() -> None:
    result = verdict(claim(), found(claim(), sample(2.0)))
    assert (result.outcome, result.reason, result.scope) == ("SUPPORTED", None, "general")
    assert result.estimate == pytest.approx(2.0) and result.low < 2.0 < result.high  # type: ignore[operator]
    assert (result.n, result.n_groups, result.n_to_decide) == (64, 16, None)


def test_legs_are_clustered_t_tests_of_the_three_inequalities() -> None:
    made = claim(nulls=(("shuffled", 0.1),), delta_c=0.2)
    effects, control, null = sample(1.0, 1), sample(0.3, 2), sample(0.2, 3)
    evidence = found(made, effects, control, nulls={"shuffled": null.tolist()})
    result = verdict(made, evidence, others=3)
    terms = {"effect": effects - 0.5, "control": effects - control - 0.2, "shuffled": effects - null - 0.1}
    assert [leg["name"] for leg in result.legs] == list(terms)
    worst, least = 0.0, 1.0
    for leg, values in zip(result.legs, terms.values(), strict=True):
        means = values.reshape(TEMPLATES, SIZE).mean(axis=1)  # balanced: the t-test of template means
        test = reference.ttest_1samp(means, 0, alternative="greater")
        assert leg["theta"] == pytest.approx(values.mean())
        assert leg["effective_groups"] == TEMPLATES
        greater, less = skewed_p([test.statistic, -test.statistic], TEMPLATES).tolist()
        assert leg["p_greater"] == pytest.approx(greater) and greater >= test.pvalue
        worst, least = max(worst, greater), min(least, less)
    assert result.p_supported == pytest.approx(worst)
    assert result.p_supported_holm == pytest.approx(min(1, 4 * worst))
    assert result.p_refuted == pytest.approx(min(1, 3 * least))


def test_the_reason_of_a_refutation_is_told_apart() -> None:
    made = claim()
    cases = {
        "absent": found(made, sample(0.0)),
        "opposite": found(made, sample(-2.0)),
        # An effect that is not sure, of which the control has more.
        "not_specific": found(made, sample(0.6), control=sample(4.0, seed=1)),
    }
    for reason, evidence in cases.items():
        result = verdict(made, evidence)
        assert (result.outcome, result.reason) == ("REFUTED", reason)


def test_an_effect_below_delta_that_is_neither_absent_nor_opposite_is_too_small() -> None:
    made = claim(control={})
    raw = sample(0.0)
    effects = raw * (0.2 / clustered_t(raw, LABELS).se) - 0.25  # standard error .2
    assert clustered_t(effects, LABELS, null=0.5).p_less_skewed < 0.05
    assert tost(effects, 0.5, LABELS, skewed=True) > 0.05 and clustered_t(effects, LABELS).p_less_skewed > 0.05
    result = verdict(made, found(made, effects))
    assert (result.outcome, result.reason) == ("REFUTED", "too_small")


def test_an_effect_that_holds_and_that_the_control_has_as_well_is_not_specific() -> None:
    made = claim()
    result = verdict(made, found(made, sample(2.0), control=sample(2.5, seed=1)))
    assert (result.outcome, result.reason) == ("NOT SPECIFIC", None)
    assert result.p_refuted_holm <= 0.05 < result.p_supported_holm


def test_a_declared_null_that_explains_the_effect_is_not_specific() -> None:
    made = claim(nulls=(("shuffled", 0.0),))
    evidence = found(made, sample(2.0), nulls={"shuffled": sample(3.0, seed=5).tolist()})
    assert verdict(made, evidence).outcome == "NOT SPECIFIC"


def test_that_an_effect_holds_is_corrected_for_the_family() -> None:
    """In a family of many, an effect of p just under .05 is not sure, and its control refutes it."""
    made = claim()
    barely = sample(0.0)
    barely = 0.5 + barely * (0.4 / clustered_t(barely, LABELS).se) + 1.5
    evidence = found(made, barely, control=sample(9.0, seed=1, spread=0.1))
    assert verdict(made, evidence).outcome == "NOT SPECIFIC"
    family = [made, *(claim(role=str(number)) for number in range(200))]
    assert (decide(family, {made.id: evidence})[0].outcome) == "REFUTED"


def test_an_absent_effect_is_called_absent_even_if_the_control_leg_fails_harder() -> None:
    made = claim()
    result = verdict(made, found(made, sample(0.0), control=sample(4.0, seed=5, spread=0.1)))
    assert result.legs[1]["p_less"] < result.legs[0]["p_less"]
    assert result.reason == "absent"


def test_a_negative_claim_mirrors_a_positive_one() -> None:
    effects, control = sample(1.2, 1), sample(0.2, 2)
    positive, negative = claim(), claim(sign=-1)
    up = verdict(positive, found(positive, effects, control))
    down = verdict(negative, found(negative, -effects, -control))
    assert (up.outcome, up.legs, up.p_supported) == (down.outcome, down.legs, down.p_supported)
    assert down.estimate == pytest.approx(-1.2)
    assert verdict(negative, found(negative, effects, control)).reason == "opposite"


def test_not_significant_is_inconclusive_and_says_how_many_examples_would_decide() -> None:
    made = claim()
    noisy = found(made, sample(0.8, spread=3.0))
    result = verdict(made, noisy)
    assert (result.outcome, result.reason) == ("INCONCLUSIVE", "n_too_small")
    assert result.n_to_decide is not None and result.n_to_decide > 64
    assert verdict(made, noisy, others=20).n_to_decide > result.n_to_decide  # type: ignore[operator]
    unclear = verdict(made, found(made, sample(0.2, spread=3.0)))
    assert unclear.outcome == "INCONCLUSIVE" and unclear.n_to_decide > 64  # type: ignore[operator]


def test_the_n_that_would_decide_does_decide() -> None:
    made = claim(control={})
    needed = verdict(made, found(made, sample(0.9, spread=2.0))).n_to_decide
    assert needed is not None
    templates = -(-needed // SIZE)
    labels = tuple(f"t{i // SIZE}" for i in range(templates * SIZE))
    rng, hits = np.random.default_rng(3), 0
    for seed in range(200):
        effects = sample(0.0, seed=seed + 1000, spread=2.0, templates=templates)
        effects += rng.normal(0.9, 2.0 * (0.4 / templates + 0.6 / len(effects)) ** 0.5)
        hashes = tuple(f"e{i}" for i in range(len(effects)))
        evidence = found(made, effects, groups={"template": labels}, example_hashes=hashes)
        hits += verdict(made, evidence).outcome == "SUPPORTED"
    assert 0.65 <= hits / 200 <= 0.95


def test_unmeasured_and_missing_evidence_decide_nothing() -> None:
    made = claim()
    for result in (verdict(made, unmeasured(made.id, "the gate failed")), decide([made], {})[0]):
        assert (result.outcome, result.reason, result.p_supported, result.p_refuted) == (
            "INCONCLUSIVE",
            "unmeasured",
            1,
            1,
        )
        assert result.estimate is None and result.legs == ()


def test_unmeasured_claims_count_in_the_correction() -> None:
    made = claim()
    evidence = found(made, sample(0.95))
    alone, among_many = verdict(made, evidence), verdict(made, evidence, others=200)
    assert alone.outcome == "SUPPORTED"
    assert among_many.outcome == "INCONCLUSIVE"
    assert among_many.p_supported_holm == pytest.approx(min(1.0, 201 * alone.p_supported))


def test_support_and_refutation_are_corrected_apart() -> None:
    claims = [claim(statement=str(i), subject={"i": i}) for i in range(4)]
    means = [2.0, 2.0, -2.0, -0.5]
    results = decide(
        claims, {c.id: found(c, sample(mean, i)) for i, (c, mean) in enumerate(zip(claims, means, strict=True))}
    )
    assert [r.outcome for r in results] == ["SUPPORTED", "SUPPORTED", "REFUTED", "REFUTED"]


def test_a_decision_stays_when_further_evidence_comes_in() -> None:
    rng = np.random.default_rng(4)
    claims = [claim(statement=str(i), subject={"i": i}) for i in range(8)]
    evidences: dict[str, Evidence] = {}
    before: dict[str, str] = {}
    for made, mean in zip(claims, rng.uniform(-1, 2, 8), strict=True):
        evidences[made.id] = found(made, sample(mean, int(rng.integers(1000))))
        for result in decide(claims, evidences):
            if before.get(result.claim_id, "INCONCLUSIVE") != "INCONCLUSIVE":
                assert result.outcome == before[result.claim_id]
            before[result.claim_id] = result.outcome
    assert {"SUPPORTED", "REFUTED"} <= set(before.values())


@pytest.mark.parametrize("mean", [0.5, 0.0])
def test_false_support_is_rare_at_and_below_the_border(mean: float) -> None:
    made = claim(control={})
    rng, wrong = np.random.default_rng(5), 0
    for _ in range(400):
        raw = rng.normal(size=(TEMPLATES, 1)) * 0.4**0.5 + rng.normal(size=(TEMPLATES, SIZE)) * 0.6**0.5
        wrong += verdict(made, found(made, raw.ravel() + mean)).outcome == "SUPPORTED"
    assert wrong / 400 <= 0.05 + 2 * (0.05 * 0.95 / 400) ** 0.5


def test_false_refutation_is_rare_at_the_border_of_both_legs() -> None:
    made = claim()
    rng, wrong = np.random.default_rng(6), 0
    for _ in range(400):
        shared = rng.normal(size=(2, TEMPLATES, 1)) * 0.4**0.5
        raw = (shared + rng.normal(size=(2, TEMPLATES, SIZE)) * 0.6**0.5).reshape(2, -1)
        wrong += verdict(made, found(made, raw[0] + 0.5, control=raw[1] + 0.25)).outcome == "REFUTED"
    assert wrong / 400 <= 0.05 + 2 * (0.05 * 0.95 / 400) ** 0.5


def test_names_are_a_second_clustering_and_the_claim_may_choose() -> None:
    effects = sample(1.0, 7)
    groups = {"template": LABELS, "names": tuple(f"n{i % 5}" for i in range(64)), "order": ("a", "b") * 32}
    made, chosen = claim(control={}), claim(control={}, parameters={"clusters": ["order"]})
    both = verdict(made, found(made, effects, groups=groups)).legs[0]
    test = clustered_t(effects - 0.5, groups["template"], groups["names"])
    assert both["p_greater"] == pytest.approx(test.p_greater_skewed)
    one = verdict(chosen, found(chosen, effects, groups=groups)).legs[0]
    assert one["p_greater"] == pytest.approx(clustered_t(effects - 0.5, groups["order"]).p_greater_skewed)
    with pytest.raises(ProtocolError, match=r"is clustered by \['order'\], but the evidence has groups \['template'\]"):
        verdict(chosen, found(chosen, effects))


def test_without_groups_an_example_that_occurs_twice_counts_once() -> None:
    made = claim(control={})
    effects = sample(0.8)[:20]
    twice = found(made, np.tile(effects, 2), groups={}, example_hashes=tuple(f"e{i % 20}" for i in range(40)))
    result = verdict(made, twice)
    assert result.n_groups == 20
    assert result.legs[0]["p_greater"] == pytest.approx(clustered_t(effects - 0.5).p_greater_skewed)


def test_one_template_or_one_example_cannot_decide() -> None:
    made = claim(control={})
    for evidence in (found(made, [9.0] * 4), found(made, [9.0], groups={})):
        result = verdict(made, evidence)
        assert (result.outcome, result.reason, result.n_to_decide, result.low) == (
            "INCONCLUSIVE",
            "n_too_small",
            None,
            None,
        )
        assert result.estimate == 9.0


def test_fewer_than_twelve_groups_limit_the_scope() -> None:
    made = claim(control={})
    assert verdict(made, found(made, sample(2.0)[:44])).scope == "on these templates only"
    assert verdict(made, found(made, sample(2.0)[:48])).scope == "general"


def test_a_sign_that_differs_between_conditions_limits_the_scope() -> None:
    swap, abc = (claim(condition={"corruption": c, "direction": "noising"}) for c in ("swap", "abc"))
    other = claim(subject={"site": "elsewhere"}, condition={"corruption": "third"})
    means = {swap.id: 2.0, abc.id: -1.0, other.id: -1.0}
    results = decide([swap, abc, other], {c.id: found(c, sample(means[c.id])) for c in (swap, abc, other)})
    assert [r.scope for r in results] == [
        "only under corruption=swap, direction=noising",
        "only under corruption=abc, direction=noising",
        "general",
    ]
    told = found(swap, sample(2.0), diagnostics={"other_conditions": {"abc": -0.1}})
    assert verdict(swap, told).scope.startswith("only under corruption=swap")
    agrees = found(swap, sample(2.0), diagnostics={"other_conditions": {"abc": 0.1}})
    assert verdict(swap, agrees).scope == "general"


def test_a_rank_leg_counts_null_draws() -> None:
    made = claim(parameters={"test": "rank"}, delta_c=0.0)
    draws = np.linspace(-1, 1, 39)
    evidence = found(made, sample(2.0), control=None, draws={"control": draws.tolist()})
    leg = verdict(made, evidence).legs[1]
    assert leg["p_greater"] == 1 / 40 and leg["p_less"] == 1.0
    assert leg["theta"] == pytest.approx(2.0 - draws.mean())
    assert verdict(made, evidence).outcome == "SUPPORTED"
    beaten = found(made, sample(2.0), control=None, draws={"control": (draws + 4).tolist()})
    assert verdict(made, beaten).legs[1]["p_less"] == 1 / 40
    assert verdict(made, beaten).outcome == "NOT SPECIFIC"


def test_too_few_draws_fall_back_on_the_paired_leg_or_are_refused() -> None:
    made = claim(parameters={"test": "rank"})
    few = {"control": [0.0] * 19}
    paired = found(made, sample(2.0), draws=few)
    assert verdict(made, paired).legs[1] == verdict(made, found(made, sample(2.0))).legs[1]
    unpaired = Evidence.from_json({**paired.to_json(), "control": None})
    with pytest.raises(ProtocolError, match=r"lacks the leg 'control': .* or at least 20 null draws \(19 given\)"):
        check_legs(made, unpaired, m=1)
    enough = Evidence.from_json({**unpaired.to_json(), "draws": {"control": [0.0] * 20}})
    check_legs(made, enough, m=1)
    with pytest.raises(ProtocolError, match="at least 60 null draws"):
        check_legs(made, enough, m=3)


def test_draws_are_ignored_unless_the_claim_declared_a_rank_test() -> None:
    made = claim()
    evidence = found(made, sample(2.0), draws={"control": [9.0] * 100})
    assert verdict(made, evidence).outcome == "SUPPORTED"


def test_evidence_without_a_declared_leg_cannot_be_used() -> None:
    made = claim(nulls=(("shuffled", 0.1),))
    with pytest.raises(ProtocolError, match="lacks the leg 'shuffled': it needs one value per example"):
        verdict(made, found(made, sample(2.0)))


def test_verdicts_follow_from_the_stored_text_alone() -> None:
    made = claim(nulls=(("shuffled", 0.1),))
    evidence = found(made, sample(0.9), nulls={"shuffled": sample(0.1, 8).tolist()})
    stored = Claim.from_json(json.loads(canonical_json(made))), Evidence.from_json(json.loads(canonical_json(evidence)))
    assert decide([stored[0]], {stored[0].id: stored[1]}) == decide([made], {made.id: evidence})
    assert decide([made], {made.id: evidence}, exploratory=True)[0].exploratory
