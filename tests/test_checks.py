"""Checks: a claim becomes evidence on fresh data, with its controls and nulls; planted claims hold and decoys fail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vesalius.bench import Bench

import handmade
import tiny
import vesalius as vs
from handmade import SITES
from vesalius.describe import Context, describe
from vesalius.errors import InputError, PairsError, UnknownNameError
from vesalius.intervention import off_distribution
from vesalius.protocol import Claim, Verdict
from vesalius.site import Site
from vesalius.stats import clustered_t
from vesalius.validate import CHECKS, check, described, measure, prefetch, reinitialised

MOVER, IDLE = str(SITES["mover"]), str(SITES["idle"])


@pytest.fixture(scope="module")
def pairs() -> vs.Pairs:
    return handmade.pairs()


@pytest.fixture(scope="module")
def discovery(pairs: vs.Pairs) -> Bench:
    return Bench(handmade.network(), {"swap": pairs.split("discovery")})


@pytest.fixture(scope="module")
def fresh(pairs: vs.Pairs) -> Bench:
    return Bench(handmade.network(), {"swap": pairs.split("validation")})


@pytest.fixture(scope="module")
def claims(discovery: Bench) -> tuple[Claim, ...]:
    return describe(Context.of(discovery, handmade.MEMBERS, study="toy")).claims


def the(claims: tuple[Claim, ...], site: Site, name: str) -> Claim:
    return next(c for c in claims if c.subject["site"] == str(site) and c.check == name)


def about(claim: Claim, site: str, **changes: Any) -> Claim:
    """The same claim about another component."""
    parts = [part for part in claim.control["parts"] if part != site]
    return replace(claim, parameters={**claim.parameters, "component": site}, subject={**claim.subject, "site": site},
                   control={**claim.control, "parts": parts}, **changes)  # fmt: skip


# --- Verdicts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[vs.Ledger]:
    with vs.Ledger(tmp_path / "ledger.sqlite") as opened:
        yield opened


def judged(
    ledger: vs.Ledger, pairs: vs.Pairs, claims: tuple[Claim, ...], model: vs.Model, **options: Any
) -> tuple[Verdict, ...]:
    ledger.open(pairs, "discovery")
    family = ledger.register(claims)
    bench = Bench(model, {"swap": ledger.open(pairs, "validation")})
    prefetch(family.claims, bench)
    for claim in family.claims:
        ledger.append(check(claim, bench=bench, **options))
    ledger.verify()
    return ledger.verdicts(family)


def test_claims_about_a_known_mechanism_are_supported_on_fresh_data(
    ledger: vs.Ledger, pairs: vs.Pairs, claims: tuple[Claim, ...]
) -> None:
    verdicts = judged(ledger, pairs, claims, handmade.network())
    assert [verdict.outcome for verdict in verdicts] == ["SUPPORTED"] * len(claims)
    assert described(verdicts)


def test_decoys_are_refuted_with_the_reason(ledger: vs.Ledger, pairs: vs.Pairs, claims: tuple[Claim, ...]) -> None:
    direct, total = the(claims, SITES["mover"], "direct_effect"), the(claims, SITES["negative"], "total_effect")
    decoys = (
        about(direct, IDLE),
        about(the(claims, SITES["mover"], "attends"), IDLE),
        about(the(claims, SITES["inhibition"], "moves_attention"), str(SITES["previous"])),
        replace(total, sign=1),
        replace(direct, delta=4.0),
        replace(direct, control={"rule": "itself", "parts": [MOVER]}),
        replace(direct, statement="and this one holds"),
    )
    verdicts = judged(ledger, pairs, decoys, handmade.network())
    assert [(v.outcome, v.reason) for v in verdicts] == [
        ("REFUTED", "absent"), ("REFUTED", "absent"), ("REFUTED", "absent"), ("REFUTED", "opposite"),
        ("REFUTED", "absent"), ("REFUTED", "not_specific"), ("SUPPORTED", None),
    ]  # fmt: skip
    assert not described(verdicts)


def test_a_mechanism_does_not_survive_random_weights(
    ledger: vs.Ledger, pairs: vs.Pairs, claims: tuple[Claim, ...]
) -> None:
    control = reinitialised(handmade.network(), 0)
    verdicts = judged(ledger, pairs, claims, control, allow_other_model=True)
    assert "SUPPORTED" not in {verdict.outcome for verdict in verdicts}


def test_a_description_without_claims_is_not_described() -> None:
    assert not described(())


# --- What the evidence holds ----------------------------------------------------------------------------------------


def test_evidence_is_of_the_pairs_and_the_model_it_was_measured_on(fresh: Bench, claims: tuple[Claim, ...]) -> None:
    claim = claims[0]
    evidence = check(claim, bench=fresh, plan_hash="plan", version="1.2", commit="c0ffee", created_at="2026-01-01")
    assert evidence.measured
    assert evidence.claim_id == claim.id
    assert evidence.groups == fresh.pairs.groups
    assert evidence.example_hashes == fresh.pairs.example_hashes
    assert evidence.data_hash == fresh.pairs.content_hash
    assert evidence.model_hash == fresh.model.content_hash
    assert (evidence.plan_hash, evidence.version, evidence.commit, evidence.created_at) == (
        "plan", "1.2", "c0ffee", "2026-01-01",
    )  # fmt: skip


def test_pairs_and_model_give_the_same_evidence_as_a_bench(
    pairs: vs.Pairs, fresh: Bench, claims: tuple[Claim, ...]
) -> None:
    for claim in claims[:3]:
        plain = check(claim, model=fresh.model, data=pairs.split("validation"))
        assert plain.effects == pytest.approx(check(claim, bench=fresh).effects, abs=1e-5)
        assert plain.example_hashes == fresh.pairs.example_hashes
    mapped = check(claims[0], model=fresh.model, data={"swap": pairs.split("validation")})
    assert mapped.data_hash == fresh.pairs.content_hash


def test_the_hash_of_the_opened_split_can_be_named_when_the_bench_holds_some_rows(
    ledger: vs.Ledger, pairs: vs.Pairs, claims: tuple[Claim, ...]
) -> None:
    ledger.open(pairs, "discovery")
    family = ledger.register(claims)
    opened = ledger.open(pairs, "validation")
    some = Bench(handmade.network(), {"swap": opened.subset(range(4, 20))})
    evidence = check(family.claims[0], bench=some, data_hash=opened.content_hash, model_hash=some.model.content_hash)
    ledger.append(evidence)
    assert ledger.verdict(family.claims[0]).n == 16


def test_the_control_is_the_mean_over_the_matched_parts(fresh: Bench) -> None:
    parts = [Site("z", 0, 1), Site("z", 1, 1), Site("z", 1, 2)]
    control = {"rule": "three", "parts": [str(part) for part in parts]}
    direct = measure("direct_effect", {"component": MOVER}, fresh, control)
    total = measure("total_effect", {"component": MOVER}, fresh, control)
    assert direct.control is not None
    assert total.control is not None
    torch.testing.assert_close(direct.control, sum(fresh.direct(part) for part in parts) / 3)
    torch.testing.assert_close(total.control, fresh.effects(parts, "swap", "noising").mean(0))
    assert measure("direct_effect", {"component": MOVER}, fresh).control is None


def test_nulls_are_attention_elsewhere_and_shuffled_labels(fresh: Bench) -> None:
    looks = {"component": MOVER, "query": "end", "key": "answer", "elsewhere": "distractor_first"}
    elsewhere = measure("attends", looks, fresh).nulls["elsewhere"]
    torch.testing.assert_close(elsewhere, measure("attends", {**looks, "key": "distractor_first"}, fresh).effects)
    direct, total = (measure(name, {"component": MOVER}, fresh) for name in ("direct_effect", "total_effect"))
    torch.testing.assert_close(
        direct.nulls["shuffled labels"], fresh.direct(SITES["mover"], fresh.shuffled), atol=1e-6, rtol=0
    )
    # With few names, some prompts draw one of their own; labels of others' names carry nothing.
    foreign = (fresh.shuffled.answer != fresh.pairs.answer) & (fresh.shuffled.distractor != fresh.pairs.distractor)
    for found in (direct, total):
        assert int(foreign.sum()) > 12
        assert float(found.nulls["shuffled labels"][foreign].abs().max()) < 0.5 < float(found.effects.min())


def test_a_total_effect_is_what_a_plain_patched_run_shows(fresh: Bench) -> None:
    found = measure("total_effect", {"component": MOVER}, fresh).effects
    model, pairs = fresh.model, fresh.pairs
    corrupted = model.run(pairs.tokens("corrupted"), capture=["layers.1.z"])
    patch = vs.Patch(MOVER, source=corrupted["layers.1.z"][:, :, 0])
    plain, edited = (model.run(pairs.tokens("clean"), interventions=edits).logits for edits in ([], [patch]))
    expected = vs.logit_diff(plain, pairs) - vs.logit_diff(edited, pairs)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_total_effects_carry_their_other_conditions_and_how_unnatural_the_values_are() -> None:
    swap = handmade.pairs(12).split("validation")
    mirrored = replace(swap, clean=swap.clean, corrupted=swap.corrupted, corruption="again")
    bench = Bench(handmade.network(), {"swap": swap, "again": mirrored})
    found = measure("total_effect", {"component": MOVER}, bench).diagnostics
    assert set(found["other_conditions"]) == {"swap, denoising", "again, noising", "again, denoising"}
    values = bench.effects([SITES["mover"]], "swap", "denoising")[0]
    assert found["other_conditions"]["swap, denoising"] == pytest.approx(float(values.mean()), abs=1e-5)
    clean, corrupted = (bench.run(which).at(Site("z", 1)) for which in ("clean", "swap"))
    assert found["off_distribution"] == off_distribution(clean, corrupted, swap.real, SITES["mover"])
    assert found["off_distribution"]["z_rms"] > 0


def test_effects_within_two_clustered_errors_of_zero_have_no_sign_elsewhere() -> None:
    bench = Bench(tiny.model("llama"), {"swap": handmade.pairs(12).split("discovery")})
    tested = 0
    for site in (Site("z", layer, head) for layer in range(3) for head in range(6)):
        listed = measure("total_effect", {"component": str(site)}, bench).diagnostics["other_conditions"]
        values = bench.effects([site], "swap", "denoising")[0].double().numpy()
        groups = bench.pairs.groups
        test = clustered_t(values, groups["template"], groups["names"])
        assert ("swap, denoising" in listed) == (abs(test.estimate) > 2 * test.se)
        tested += not listed
    assert tested > 0


def test_prefetching_measures_everything_at_once(pairs: vs.Pairs, claims: tuple[Claim, ...]) -> None:
    bench = Bench(handmade.network(), {"swap": pairs.split("validation")})
    calls: list[str] = []
    bench.sink = lambda event: calls.append(event.task) if event.kind == "start" else None
    prefetch(claims, bench)
    assert len(calls) == 3  # total effects noising, denoising, and the movers' attention
    spent = bench.cost
    alone = Bench(handmade.network(), {"swap": pairs.split("validation")})
    for claim in claims:
        evidence = check(claim, bench=bench)
        assert evidence.effects == pytest.approx(check(claim, bench=alone).effects, abs=1e-4)
    assert bench.cost == spent
    assert alone.cost.spent > 0


# --- Refusals -------------------------------------------------------------------------------------------------------


def test_another_model_is_refused_unless_it_is_asked_for(fresh: Bench, claims: tuple[Claim, ...]) -> None:
    other = Bench(handmade.network(seed=1), fresh.corruptions)
    with pytest.raises(
        InputError, match=r"the claim is about model \w{12}, but GPT2LMHeadModel is \w{12}; allow_other"
    ):
        check(claims[0], bench=other)
    evidence = check(claims[0], bench=other, allow_other_model=True)
    assert evidence.model_hash == other.model.content_hash
    with pytest.raises(InputError, match=r"model_hash beef was given, but GPT2LMHeadModel is"):
        check(claims[0], bench=fresh, model_hash="beef")


def test_unknown_checks_corruptions_and_parameters_are_refused(fresh: Bench, claims: tuple[Claim, ...]) -> None:
    with pytest.raises(UnknownNameError, match="unknown check 'attention'; known: " + ", ".join(sorted(CHECKS))):
        check(replace(claims[0], check="attention"), bench=fresh)
    with pytest.raises(UnknownNameError, match="unknown check 'attention'"):
        measure("attention", {}, fresh)
    with pytest.raises(UnknownNameError, match="unknown corruption 'abc'; known: swap"):
        check(replace(claims[0], condition={"corruption": "abc"}), bench=fresh)
    with pytest.raises(InputError, match=r"check 'copies' needs the parameter 'key'; got \['component'\]"):
        measure("copies", {"component": MOVER}, fresh)


def test_a_check_needs_something_to_run_on(pairs: vs.Pairs, claims: tuple[Claim, ...]) -> None:
    with pytest.raises(InputError, match=r"a check needs bench=, or model= and data="):
        check(claims[0], model=handmade.network())
    other = replace(pairs, corruption="abc")
    with pytest.raises(PairsError, match=r"the claim is about corruption 'swap', but these pairs have 'abc'"):
        check(claims[0], model=handmade.network(), data=other)


def test_what_the_prompts_lack_is_unmeasured_with_the_reason(fresh: Bench, claims: tuple[Claim, ...]) -> None:
    swap = fresh.pairs
    lacking = replace(swap, answer=torch.full_like(swap.answer, 39), distractor=torch.full_like(swap.answer, 38))
    evidence = check(the(claims, SITES["mover"], "attends"), model=fresh.model, data=lacking, plan_hash="plan")
    assert (evidence.status, evidence.plan_hash) == ("unmeasured", "plan")
    assert "prompts have no 'answer' (the answer)" in evidence.reason


def test_what_is_not_finite_is_unmeasured_with_the_reason(fresh: Bench, claims: tuple[Claim, ...]) -> None:
    class Broken(Bench):
        def direct(self, part: Site, labels: vs.Pairs | None = None) -> torch.Tensor:
            return super().direct(part, labels).index_fill(0, torch.tensor([2]), float("nan"))

    broken = Broken(fresh.model, fresh.corruptions)
    evidence = check(the(claims, SITES["mover"], "direct_effect"), bench=broken)
    assert (evidence.status, evidence.reason) == ("unmeasured", "effects of example 2 is nan")
