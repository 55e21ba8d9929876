"""Checks: a claim becomes evidence on fresh data, with its controls and nulls; planted claims hold and decoys fail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import handmade
import tiny
import vesalius as vs
from handmade import PARTS
from vesalius.describe import Discovery, claim_about
from vesalius.errors import InputError, PairsError, UnknownNameError
from vesalius.intervention import off_distribution
from vesalius.protocol import Claim, Verdict
from vesalius.quantities import ATTENDS, DIRECT_EFFECT, QUANTITIES, TOTAL_EFFECT, Runs
from vesalius.stats import clustered_t
from vesalius.validate import all_supported, check, prepare, reinitialised

MOVER, IDLE = PARTS["mover"], PARTS["idle"]


@pytest.fixture(scope="module")
def pairs() -> vs.Pairs:
    """Grouped by template alone: with the few names of the network as well, seven decoys take more prompts."""
    made = handmade.pairs()
    return replace(made, groups={"template": made.groups["template"]})


@pytest.fixture(scope="module")
def discovery(pairs: vs.Pairs) -> Runs:
    return Runs(handmade.network(), pairs.split("discovery"))


@pytest.fixture(scope="module")
def fresh(pairs: vs.Pairs) -> Runs:
    return Runs(handmade.network(), pairs.split("validation"))


@pytest.fixture(scope="module")
def claims(discovery: Runs) -> tuple[Claim, ...]:
    return handmade.claims(Discovery.of(discovery, handmade.MEMBERS, study="toy"))


def the(claims: tuple[Claim, ...], name: str, quantity: str) -> Claim:
    return next(c for c in claims if c.subject["site"] == str(PARTS[name]) and c.quantity == quantity)


def about(claim: Claim, part: vs.Part) -> Claim:
    """The same claim about another component."""
    others = [other for other in claim.control["parts"] if other != str(part)]
    subject = {**claim.subject, **part.ref, "name": str(part)}
    return replace(claim, subject=subject, control={**claim.control, "parts": others})


# --- Verdicts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[vs.Ledger]:
    with vs.Ledger(tmp_path / "ledger.sqlite") as opened:
        yield opened


def judged(
    ledger: vs.Ledger, pairs: vs.Pairs, claims: tuple[Claim, ...], model: vs.Model, **options: Any
) -> tuple[Verdict, ...]:
    ledger.open(pairs, "discovery")
    family = ledger.register(claims, control_model=model.content_hash if options else "")
    assert not family.exploratory
    runs = Runs(model, ledger.open(pairs, "validation"))
    prepare(family.claims, runs)
    for claim in family.claims:
        ledger.append(check(claim, runs=runs, **options))
    ledger.verify()
    return ledger.verdicts(family)


def test_claims_about_a_known_mechanism_are_supported_on_fresh_data(
    ledger: vs.Ledger, pairs: vs.Pairs, claims: tuple[Claim, ...]
) -> None:
    verdicts = judged(ledger, pairs, claims, handmade.network())
    assert [verdict.outcome for verdict in verdicts] == ["SUPPORTED"] * len(claims)
    assert all_supported(verdicts)


def test_decoys_are_refuted_with_the_reason(ledger: vs.Ledger, pairs: vs.Pairs, claims: tuple[Claim, ...]) -> None:
    direct, total = the(claims, "mover", "direct_effect"), the(claims, "negative", "total_effect")
    decoys = (
        about(direct, IDLE),
        about(the(claims, "mover", "attends"), IDLE),
        about(the(claims, "inhibition", "moves_attention"), PARTS["previous"]),
        replace(total, sign=1),
        replace(direct, delta=4.0),
        replace(direct, control={"rule": "itself", "parts": [str(MOVER)]}),
        replace(direct, statement="and this one holds"),
    )
    verdicts = judged(ledger, pairs, decoys, handmade.network())
    assert [(v.outcome, v.reason) for v in verdicts] == [
        ("REFUTED", "absent"), ("REFUTED", "absent"), ("REFUTED", "absent"), ("REFUTED", "opposite"),
        ("REFUTED", "absent"), ("NOT SPECIFIC", None), ("SUPPORTED", None),
    ]  # fmt: skip
    assert not all_supported(verdicts)


def test_a_mechanism_does_not_survive_random_weights(
    ledger: vs.Ledger, pairs: vs.Pairs, claims: tuple[Claim, ...]
) -> None:
    control = reinitialised(handmade.network(), 0)
    verdicts = judged(ledger, pairs, claims, control, allow_other_model=True)
    assert "SUPPORTED" not in {verdict.outcome for verdict in verdicts}


def test_a_description_without_claims_is_not_described() -> None:
    assert not all_supported(())


# --- What the evidence holds ----------------------------------------------------------------------------------------


def test_evidence_is_of_the_pairs_and_the_model_it_was_measured_on(fresh: Runs, claims: tuple[Claim, ...]) -> None:
    claim = claims[0]
    evidence = check(claim, runs=fresh, plan_hash="plan", version="1.2", commit="c0ffee", created_at="2026-01-01")
    assert evidence.measured
    assert evidence.claim_id == claim.id
    assert evidence.groups == fresh.pairs.groups
    assert evidence.example_hashes == fresh.pairs.example_hashes
    assert evidence.data_hash == fresh.pairs.content_hash
    assert evidence.model_hash == fresh.model.content_hash
    assert (evidence.plan_hash, evidence.version, evidence.commit, evidence.created_at) == (
        "plan", "1.2", "c0ffee", "2026-01-01",
    )  # fmt: skip


def test_pairs_and_model_give_the_same_evidence_as_runs(
    pairs: vs.Pairs, fresh: Runs, claims: tuple[Claim, ...]
) -> None:
    for claim in claims[:3]:
        plain = check(claim, model=fresh.model, data=pairs.split("validation"))
        assert plain.effects == pytest.approx(check(claim, runs=fresh).effects, abs=1e-5)
        assert plain.example_hashes == fresh.pairs.example_hashes
    mapped = check(claims[0], model=fresh.model, data={"swap": pairs.split("validation")})
    assert mapped.data_hash == fresh.pairs.content_hash


def test_some_rows_of_the_opened_split_are_not_what_was_planned(
    ledger: vs.Ledger, pairs: vs.Pairs, claims: tuple[Claim, ...]
) -> None:
    discovery = ledger.open(pairs, "discovery")
    few = replace(claims[0], n=16)
    family = ledger.register([*claims, few])
    opened = ledger.open(pairs, "validation")
    some = Runs(handmade.network(), opened.subset(range(4, 20)))
    assert (some.source_hash, some.pairs.content_hash == opened.content_hash) == (opened.content_hash, False)
    evidence = check(family.claims[0], runs=some)
    assert (evidence.data_hash, evidence.reason) == (
        opened.content_hash,
        "too few examples: 16 of the 36 that were planned",
    )
    ledger.append(evidence)
    assert ledger.verdict(family.claims[0]).reason == "unmeasured"
    with pytest.raises(vs.errors.ProtocolError, match="holds 16 of the 36 examples of split 'validation'"):
        ledger.append(check(few, runs=some, data_hash=opened.content_hash, model_hash=some.model.content_hash))
    assert discovery.subset([1, 2]).subset([1]).source_hash == discovery.content_hash


def test_a_claim_carries_what_its_threshold_was_measured_from(fresh: Runs, discovery: Runs) -> None:
    claim = claim_about(discovery, MOVER, "total_effect")
    found = TOTAL_EFFECT.measure(discovery, MOVER, {}).double().numpy()
    groups = discovery.pairs.groups
    test = clustered_t(found, groups["template"])
    effect, scale = claim.origin["effect"], claim.origin["scale"]
    assert effect["estimate"] == pytest.approx(found.mean())
    assert (effect["low"], effect["high"]) == (pytest.approx(test.low), pytest.approx(test.high))
    assert scale["estimate"] == claim.scale == pytest.approx(float(discovery.total("swap").mean()))
    assert scale["low"] < claim.scale < scale["high"]
    assert {one["data_hash"] for one in claim.origin.values()} == set(claim.parents)
    assert {one["n"] for one in claim.origin.values()} == {36}
    some = claim_about(Runs(discovery.model, discovery.pairs.subset(range(20))), MOVER, "total_effect")
    assert some.parents == claim.parents


def test_the_control_is_the_mean_over_the_matched_parts(fresh: Runs) -> None:
    parts = [vs.head(0, 1), vs.head(1, 1), vs.head(1, 2)]
    control = {"rule": "three", "parts": [str(part) for part in parts]}
    direct, total = (of.control(fresh, MOVER, {}, control) for of in (DIRECT_EFFECT, TOTAL_EFFECT))
    assert direct is not None
    assert total is not None
    torch.testing.assert_close(direct, sum(DIRECT_EFFECT.measure(fresh, part, {}) for part in parts) / 3)
    torch.testing.assert_close(total, fresh.effects(parts, "swap", "noising").mean(0))
    assert DIRECT_EFFECT.control(fresh, MOVER, {}, {}) is None


def test_nulls_are_attention_elsewhere_and_shuffled_labels(fresh: Runs) -> None:
    looks = {"query": "end", "key": "answer", "elsewhere": "distractor_first"}
    elsewhere = ATTENDS.nulls(fresh, MOVER, looks)["elsewhere"]
    torch.testing.assert_close(elsewhere, ATTENDS.measure(fresh, MOVER, {**looks, "key": "distractor_first"}))
    assert ATTENDS.nulls(fresh, MOVER, {"query": "end", "key": "answer"}) == {}
    # With few names, some prompts draw one of their own; labels of others' names carry nothing.
    foreign = (fresh.shuffled.answer != fresh.pairs.answer) & (fresh.shuffled.distractor != fresh.pairs.distractor)
    for of in (DIRECT_EFFECT, TOTAL_EFFECT):
        shuffled, effects = of.nulls(fresh, MOVER, {})["shuffled labels"], of.measure(fresh, MOVER, {})
        assert int(foreign.sum()) > 12
        assert float(shuffled[foreign].abs().max()) < 0.5 < float(effects.min())


def test_shuffled_labels_of_a_direct_effect_are_another_direction_of_the_same_write(fresh: Runs) -> None:
    relabelled = Runs(fresh.model, fresh.shuffled)
    shuffled = DIRECT_EFFECT.nulls(fresh, MOVER, {})["shuffled labels"]
    torch.testing.assert_close(shuffled, DIRECT_EFFECT.measure(relabelled, MOVER, {}), atol=1e-6, rtol=0)


def test_a_total_effect_is_what_a_plain_patched_run_shows(fresh: Runs) -> None:
    found = TOTAL_EFFECT.measure(fresh, MOVER, {})
    model, pairs = fresh.model, fresh.pairs
    corrupted = model.run(pairs.tokens("corrupted"), capture=["layers.1.z"])
    patch = vs.Patch(MOVER, source=corrupted["layers.1.z"][:, :, 0])
    plain, edited = (model.run(pairs.tokens("clean"), interventions=edits).logits for edits in ([], [patch]))
    expected = vs.logit_diff(plain, pairs) - vs.logit_diff(edited, pairs)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_total_effects_carry_their_other_conditions_and_how_unnatural_the_values_are() -> None:
    swap = handmade.pairs(12).split("validation")
    mirrored = replace(swap, clean=swap.clean, corrupted=swap.corrupted, corruption="again")
    runs = Runs(handmade.network(), {"swap": swap, "again": mirrored})
    found = TOTAL_EFFECT.diagnostics(runs, MOVER, {})
    assert set(found["other_conditions"]) == {"swap, denoising", "again, noising", "again, denoising"}
    values = runs.effects([MOVER], "swap", "denoising")[0]
    assert found["other_conditions"]["swap, denoising"] == pytest.approx(float(values.mean()), abs=1e-5)
    clean, corrupted = (runs.run(which)[MOVER.site.whole] for which in ("clean", "swap"))
    assert found["off_distribution"] == off_distribution(clean, corrupted, swap.real, MOVER.site)
    assert found["off_distribution"]["z_rms"] > 0


def test_effects_within_two_clustered_errors_of_zero_have_no_sign_elsewhere() -> None:
    runs = Runs(tiny.model("llama"), handmade.pairs(12).split("discovery"))
    tested = 0
    for part in (vs.head(layer, index) for layer in range(3) for index in range(6)):
        listed = TOTAL_EFFECT.diagnostics(runs, part, {})["other_conditions"]
        values = runs.effects([part], "swap", "denoising")[0].double().numpy()
        groups = runs.pairs.groups
        test = clustered_t(values, groups["template"], groups["names"])
        assert ("swap, denoising" in listed) == (abs(test.estimate) > 2 * test.se)
        tested += not listed
    assert tested > 0


def test_preparing_measures_everything_at_once(pairs: vs.Pairs, claims: tuple[Claim, ...]) -> None:
    runs = Runs(handmade.network(), pairs.split("validation"))
    calls: list[str] = []
    runs.sink = lambda event: calls.append(event.task) if event.kind == "start" else None
    prepare(claims, runs)
    assert len(calls) == 3  # total effects noising, denoising, and the movers' attention
    spent = runs.cost
    alone = Runs(handmade.network(), pairs.split("validation"))
    for claim in claims:
        evidence = check(claim, runs=runs)
        assert evidence.effects == pytest.approx(check(claim, runs=alone).effects, abs=1e-4)
    assert runs.cost == spent
    assert alone.cost.spent > 0


# --- Refusals -------------------------------------------------------------------------------------------------------


def test_another_model_is_refused_unless_it_is_asked_for(fresh: Runs, claims: tuple[Claim, ...]) -> None:
    other = Runs(handmade.network(seed=1), fresh.contrast)
    with pytest.raises(
        InputError, match=r"the claim is about model \w{12}, but GPT2LMHeadModel is \w{12}; allow_other"
    ):
        check(claims[0], runs=other)
    evidence = check(claims[0], runs=other, allow_other_model=True)
    assert evidence.model_hash == other.model.content_hash
    with pytest.raises(InputError, match=r"model_hash beef was given, but GPT2LMHeadModel is"):
        check(claims[0], runs=fresh, model_hash="beef")


def test_unknown_quantities_corruptions_conditions_and_parameters_are_refused(
    fresh: Runs, claims: tuple[Claim, ...]
) -> None:
    known = ", ".join(sorted(QUANTITIES))
    with pytest.raises(UnknownNameError, match=f"unknown quantity 'attention'; known: {known}"):
        check(replace(claims[0], quantity="attention"), runs=fresh)
    with pytest.raises(UnknownNameError, match="unknown quantity 'attention'"):
        prepare([replace(claims[0], quantity="attention")], fresh)
    with pytest.raises(UnknownNameError, match="unknown corruption 'abc'; known: swap"):
        check(replace(claims[0], condition={"corruption": "abc"}), runs=fresh)
    copies = the(claims, "mover", "copies")
    with pytest.raises(UnknownNameError, match="unknown condition of copies 'weather'; known: corruption, prompts"):
        check(replace(copies, condition={**copies.condition, "weather": "fine"}), runs=fresh)
    with pytest.raises(InputError, match=r"copies needs the parameter 'key'; got \['corruption'\]"):
        check(replace(copies, parameters={}), runs=fresh)


def test_a_check_needs_something_to_run_on(pairs: vs.Pairs, claims: tuple[Claim, ...]) -> None:
    with pytest.raises(InputError, match=r"a check needs runs=, or model= and data="):
        check(claims[0], model=handmade.network())
    other = replace(pairs, corruption="abc")
    with pytest.raises(PairsError, match=r"the claim is about corruption 'swap', but these pairs have 'abc'"):
        check(claims[0], model=handmade.network(), data=other)


def test_what_the_prompts_lack_is_unmeasured_with_the_reason(fresh: Runs, claims: tuple[Claim, ...]) -> None:
    swap = fresh.pairs
    lacking = replace(swap, answer=torch.full_like(swap.answer, 39), distractor=torch.full_like(swap.answer, 38))
    evidence = check(the(claims, "mover", "attends"), model=fresh.model, data=lacking, plan_hash="plan")
    assert (evidence.status, evidence.plan_hash) == ("unmeasured", "plan")
    assert "prompts have no 'answer' (the answer)" in evidence.reason


def test_what_is_not_finite_is_unmeasured_with_the_reason(fresh: Runs, claims: tuple[Claim, ...]) -> None:
    class Broken(Runs):
        def pattern(self, part: vs.Part, which: str = "clean") -> torch.Tensor:
            return super().pattern(part, which).index_fill(0, torch.tensor([2]), float("nan"))

    broken = Broken(fresh.model, fresh.contrast)
    evidence = check(the(claims, "mover", "attends"), runs=broken)
    assert (evidence.status, evidence.reason) == ("unmeasured", "not finite: effects of example 2 is nan")
