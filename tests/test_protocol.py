"""Abuses of the protocol: each is refused, or counted, or plain to see; and honest use is not in their way."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from test_ledger import PER_SPLIT, Prompts, claim, evidence, prompts, seal
from vesalius.errors import InputError, NotFiniteError, ProtocolError, TamperedError, UnknownNameError
from vesalius.protocol import Claim, Evidence, unmeasured
from vesalius.protocol.evidence import REASONS, RETRIED, TRIES
from vesalius.protocol.ledger import Ledger
from vesalius.protocol.rules import judge
from vesalius.protocol.verdict import decide


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite") as opened:
        yield opened


def opened(ledger: Ledger, claims: Sequence[Claim], **options: Any) -> Prompts:
    """The validation split, after the claims were sealed as they should be."""
    assert not seal(ledger, claims, **options).exploratory
    return ledger.open(prompts(), "validation")


def of_rows(of: Claim, data: Prompts, rows: Sequence[int], **changes: Any) -> Evidence:
    return evidence(of, data.rows(rows), data_hash=data.content_hash, **changes)


# --- which examples


def test_the_best_of_the_examples_are_not_enough(ledger: Ledger) -> None:
    data = opened(ledger, [claim(0)])
    with pytest.raises(ProtocolError, match=r"holds 8 of the 24 examples of split 'validation', and of 16 no word"):
        ledger.append(of_rows(claim(0), data, range(8)))
    ledger.append(evidence(claim(0), data))
    assert ledger.verdict(claim(0)).outcome == "SUPPORTED"


def test_examples_that_are_left_out_leave_the_claim_unmeasured(ledger: Ledger) -> None:
    data = opened(ledger, [claim(0), claim(1)])
    missing = {one: "not finite" for one in data.example_hashes[20:]}
    ledger.append(of_rows(claim(0), data, range(20), missing=missing))
    verdict = ledger.verdict(claim(0))
    assert (verdict.outcome, verdict.reason, verdict.p_supported_holm) == ("INCONCLUSIVE", "unmeasured", 1.0)
    with pytest.raises(ProtocolError, match="has its primary evidence"):
        ledger.append(evidence(claim(0), data))
    assert ledger.evidence(claim(0))[0].missing == missing
    some = of_rows(claim(1), data, range(20), missing={data.example_hashes[20]: "not finite"})
    with pytest.raises(ProtocolError, match="of 3 no word"):
        ledger.append(some)
    with pytest.raises(UnknownNameError, match="unknown reason of a missing example 'dull'"):
        of_rows(claim(1), data, range(20), missing={data.example_hashes[20]: "dull"})
    with pytest.raises(InputError, match="is measured and missing at once"):
        of_rows(claim(1), data, range(20), missing={data.example_hashes[0]: "not finite"})
    ledger.verify()


def test_an_example_counts_once(ledger: Ledger) -> None:
    data = opened(ledger, [claim(0)])
    twice = [*range(PER_SPLIT), 3, 3]
    with pytest.raises(ProtocolError, match="each once"):
        ledger.append(of_rows(claim(0), data, twice))


def test_as_many_as_planned_are_used_or_the_claim_is_unmeasured(ledger: Ledger) -> None:
    planned = claim(0, n=PER_SPLIT + 1)
    data = opened(ledger, [planned])
    with pytest.raises(ProtocolError, match=r"is from 24 examples, but 25 were planned \(n=\)"):
        ledger.append(evidence(planned, data))
    ledger.append(unmeasured(planned.id, "too few examples: 24 of 25"))
    assert ledger.verdict(planned).reason == "unmeasured"


def test_values_that_nothing_can_be_computed_with_are_refused(ledger: Ledger) -> None:
    data = opened(ledger, [claim(0)])
    with pytest.raises((ProtocolError, NotFiniteError), match=r"1e\+200"):
        ledger.append(evidence(claim(0), data, effects=[1e200] * PER_SPLIT))
    assert ledger.verify().evidence == 0


# --- which groups


def test_groups_are_not_made_up_in_a_claim(ledger: Ledger) -> None:
    ledger.open(prompts(), "discovery")
    with pytest.raises(ProtocolError, match="names clusters, but groups come from the data and not from a claim"):
        ledger.register([claim(0, parameters={"clusters": ["mine"]})])


def test_groups_are_not_made_up_in_evidence(ledger: Ledger) -> None:
    data = opened(ledger, [claim(0)])
    each = tuple(map(str, range(PER_SPLIT)))
    with pytest.raises(ProtocolError, match="has no groups 'mine'; they cannot be added"):
        ledger.append(evidence(claim(0), data, groups={**data.groups, "mine": each}))


def test_an_example_keeps_its_groups(ledger: Ledger) -> None:
    base = prompts()
    ledger.open(base, "discovery")
    alone = dataclasses.replace(base, groups={**base.groups, "template": tuple(map(str, range(len(base.texts))))})
    without = dataclasses.replace(base, groups={"names": base.groups["names"]})
    with pytest.raises(InputError, match=r"came in 'template' group 'd0' before, and in '0' now"):
        ledger.open(alone, "validation")
    with pytest.raises(InputError, match="came with groups 'template' before, and have none now"):
        ledger.open(without, "validation")
    # What splits share on purpose is a condition and may be left out.
    ledger.open(prompts("sva", groups={**base.groups, "order": ("a", "b") * 36}), "discovery")
    ledger.open(prompts("sva"), "validation")


# --- which model


@pytest.mark.parametrize("model", ["", "another"])
def test_another_model_than_the_subjects_is_refused(ledger: Ledger, model: str) -> None:
    made = claim(0, subject={"head": 0, "model_hash": "trained"})
    data = opened(ledger, [made])
    with pytest.raises(ProtocolError, match="but the claim is about model trained; to test claims on another model"):
        ledger.append(evidence(made, data, model_hash=model))
    ledger.append(evidence(made, data, model_hash="trained"))
    with pytest.raises(ProtocolError, match="the claim is about model trained"):
        ledger.append(evidence(made, data, model_hash=model), replication=True)


def test_a_declared_control_is_tested_on_its_model_alone(ledger: Ledger) -> None:
    made = claim(0, subject={"head": 0, "model_hash": "trained"})
    data = opened(ledger, [made], control_model="blank")
    with pytest.raises(ProtocolError, match="is from model trained, but the family is a control on model blank"):
        ledger.append(evidence(made, data, model_hash="trained"))
    ledger.append(evidence(made, data, model_hash="blank"))
    assert ledger.families()[0].control_model == "blank"
    assert ledger.families()[0].id != dataclasses.replace(ledger.families()[0], control_model="").id


def test_claims_without_a_model_are_tested_on_one(ledger: Ledger) -> None:
    data = opened(ledger, [claim(0), claim(1)])
    ledger.append(evidence(claim(0), data, model_hash="first"))
    with pytest.raises(ProtocolError, match="is from model second, but the claim is about model first"):
        ledger.append(evidence(claim(1), data, model_hash="second"))


# --- how many tests

WEAK = [0.78 + 0.14 * ((7 * i) % 5 - 2) for i in range(PER_SPLIT)]
"""Of .78 where .5 is claimed: enough for one claim, and not for sixty."""


def test_one_such_claim_is_supported(ledger: Ledger) -> None:
    """Positive control."""
    ledger.append(evidence(claim(0), opened(ledger, [claim(0)]), effects=WEAK))
    assert ledger.verdict(claim(0)).outcome == "SUPPORTED"


@pytest.mark.parametrize("known", [True, False], ids=["recorded", "exploratory"])
def test_families_beside_each_other_share_one_correction(ledger: Ledger, known: bool) -> None:
    ledger.open(prompts(), "discovery")
    claims = [claim(number, **({} if known else {"origin": {}})) for number in range(60)]
    families = [ledger.register([one], study=f"study {number}") for number, one in enumerate(claims)]
    assert [family.exploratory for family in families] == [not known] * 60
    data = ledger.open(prompts(), "validation")
    for one in claims:
        ledger.append(evidence(one, data, effects=WEAK if one is claims[7] else [0.5] * PER_SPLIT))
    verdict = ledger.verdict(claims[7])
    assert verdict.p_supported < 0.05 and verdict.outcome == "INCONCLUSIVE"
    assert verdict.p_supported_holm == pytest.approx(min(1, 60 * verdict.p_supported))
    together = decide(claims, {one.id: ledger.evidence(one)[0] for one in claims}, exploratory=not known)
    assert [ledger.verdict(one) for one in claims[5:11]] == list(together)[5:11]


def test_families_on_other_data_are_corrected_apart(ledger: Ledger) -> None:
    sva = prompts("sva", groups={kind: tuple(f"sva {one}" for one in of) for kind, of in prompts().groups.items()})
    seal(ledger, [claim(number, sva) for number in range(1, 60)], sva)
    ledger.append(evidence(claim(0), opened(ledger, [claim(0)]), effects=WEAK))
    assert ledger.verdict(claim(0)).outcome == "SUPPORTED"


def test_a_family_sealed_later_counts_all_before_it_and_changes_none(ledger: Ledger) -> None:
    data = opened(ledger, [claim(number) for number in range(59)])
    ledger.append(evidence(claim(0), data))
    before = ledger.verdict(claim(0))
    late = claim(60)
    assert ledger.register([late]).exploratory
    assert ledger.verdict(claim(0)) == before
    ledger.append(evidence(late, ledger.open(prompts(), "confirmation"), effects=WEAK))
    assert (ledger.verdict(late).outcome, ledger.verdict(late).exploratory) == ("INCONCLUSIVE", True)
    assert ledger.verdict(claim(0)) == before


def test_what_was_learnt_on_validation_may_be_tested_on_a_third_split(ledger: Ledger) -> None:
    """A second wave of claims is a family of its own, whose parents are both splits."""
    data = opened(ledger, [claim(number) for number in range(59)])
    ledger.append(evidence(claim(0), data))
    parents = (prompts().split("discovery").content_hash, data.content_hash)
    second = claim(60, parents=parents)
    assert not ledger.register([second]).exploratory
    ledger.append(evidence(second, ledger.open(prompts(), "confirmation"), effects=WEAK))
    assert ledger.verdict(second).outcome == "SUPPORTED"


# --- what a claim was made from


def test_a_claim_without_parents_is_exploratory_and_never_tested_on_discovery(ledger: Ledger) -> None:
    made = claim(0, parents=())
    assert ledger.register([made]).exploratory
    discovery = ledger.open(prompts(), "discovery")
    with pytest.raises(ProtocolError, match="from the split 'discovery', which claims are made from; test it on anoth"):
        ledger.append(evidence(made, discovery))
    ledger.append(evidence(made, ledger.open(prompts(), "validation")))
    assert ledger.verdict(made).exploratory


def test_parents_count_when_they_were_opened_and_not_when_they_are_named(ledger: Ledger) -> None:
    assert ledger.register([claim(0)]).exploratory
    ledger.open(prompts(), "discovery")
    assert not ledger.register([claim(1)], study="another").exploratory


def test_new_examples_of_templates_that_were_looked_at_are_refused(ledger: Ledger) -> None:
    """Two sets of prompts of the same templates: one is looked at, the claims are tested on the other."""
    named = {**prompts().groups, "names": tuple(f"of {x}" for x in prompts().splits)}
    first = prompts("a", groups=named)
    second = prompts("b", groups=prompts().groups)
    ledger.open(first, "validation")
    made = claim(0, second)
    renamed = dataclasses.replace(
        second,
        groups={k: tuple(f"own {x}" if x[0] == "d" else x for x in labels) for k, labels in second.groups.items()},
    )
    ledger.open(renamed, "discovery")
    made = claim(0, renamed)
    ledger.register([made])
    with pytest.raises(
        ProtocolError, match=r"shares 12 'template' group\(s\) .* opened before the claim was registered"
    ):
        ledger.append(evidence(made, ledger.open(renamed, "validation")))


@pytest.mark.parametrize(
    "origin", [{}, {"scale": {"estimate": 1e-9, "low": 0, "high": 0, "n": 24, "data_hash": "elsewhere"}}]
)
def test_a_scale_that_was_typed_in_makes_a_claim_exploratory(ledger: Ledger, origin: dict[str, Any]) -> None:
    ledger.open(prompts(), "discovery")
    tiny = claim(0, total_effect=1e-9, delta=1e-9, origin=origin)
    assert ledger.register([tiny]).exploratory
    ledger.append(evidence(tiny, ledger.open(prompts(), "validation"), mean=0.3))
    assert ledger.verdict(tiny).exploratory


def test_a_scale_is_what_was_measured() -> None:
    measured = {"estimate": 10.0, "low": 9.0, "high": 11.0, "n": 24, "data_hash": "d0"}
    with pytest.raises(InputError, match=r"scale is 1e-09, but its origin measured 10\.0"):
        claim(0, total_effect=1e-9, delta=1e-9, origin={"scale": measured})
    with pytest.raises(InputError, match="origin 'scale' must have estimate, low, high, n, data_hash"):
        claim(0, origin={"scale": {"estimate": 10.0}})
    with pytest.raises(UnknownNameError, match="unknown origin 'delta'; known: effect, given_up, scale"):
        claim(0, origin={"delta": measured})


def test_a_threshold_without_any_scale_is_exploratory(ledger: Ledger) -> None:
    ledger.open(prompts(), "discovery")
    measured = claim(0).origin["scale"]
    free = claim(0, kind="predictive", total_effect=None, origin={}, delta=1e-9)
    assert ledger.register([free]).exploratory
    assert ledger.register([dataclasses.replace(free, origin={"effect": measured})], study="b").exploratory
    probability = dataclasses.replace(free, origin={"effect": measured}, scale_name="probability")
    assert not ledger.register([probability], study="c").exploratory


# --- how often it was tried


def test_free_words_are_no_reason(ledger: Ledger) -> None:
    data = opened(ledger, [claim(0)])
    with pytest.raises(ProtocolError, match=r"because of 'I did not like it'; the reason must be one of out of memory"):
        ledger.append(unmeasured(claim(0).id, "I did not like it", plan_hash="plan"))
    with pytest.raises(ProtocolError, match="up to 500 characters"):
        ledger.append(unmeasured(claim(0).id, "interrupted: " + "z" * 999, plan_hash="plan"))
    ledger.append(unmeasured(claim(0).id, "interrupted: the machine was switched off", plan_hash="plan"))
    ledger.append(evidence(claim(0), data))


def test_every_try_counts_and_there_are_three(ledger: Ledger) -> None:
    data = opened(ledger, [claim(0), claim(1)])
    for reason in ("out of memory", "interrupted"):
        ledger.append(unmeasured(claim(0).id, reason, plan_hash="plan"))
    ledger.append(evidence(claim(0), data))
    ledger.append(evidence(claim(1), data, effects=[0.0] * PER_SPLIT))
    verdict = ledger.verdict(claim(0))
    assert verdict.p_supported_holm == pytest.approx(2 * (TRIES * verdict.p_supported), rel=1e-9)


def test_after_three_tries_a_claim_stays_unmeasured(ledger: Ledger) -> None:
    opened(ledger, [claim(0)])
    for number in range(TRIES):
        ledger.append(unmeasured(claim(0).id, f"interrupted: {number}", plan_hash="plan"))
    with pytest.raises(ProtocolError, match="was tried 3 times; it stays unmeasured"):
        ledger.append(unmeasured(claim(0).id, "interrupted: again", plan_hash="plan"))


@pytest.mark.parametrize("reason", [one for one in REASONS if one not in RETRIED])
def test_what_is_no_accident_is_final(ledger: Ledger, reason: str) -> None:
    data = opened(ledger, [claim(0)])
    ledger.append(unmeasured(claim(0).id, reason, plan_hash="plan"))
    with pytest.raises(ProtocolError, match=f"is unmeasured, because: {reason}; that is what its evidence says"):
        ledger.append(evidence(claim(0), data))


# --- what a file can prove


def test_a_ledger_is_known_by_its_head(ledger: Ledger) -> None:
    data = opened(ledger, [claim(0)])
    head = ledger.verify().head
    assert ledger.verify(head=head).after == 0
    ledger.append(evidence(claim(0), data))
    assert ledger.verify(head=head).after == ledger.verify(head=head[:12]).after == 1
    with pytest.raises(TamperedError, match="has no record with the hash feedfeedfeed"):
        ledger.verify(head="feedfeedfeed")
    with pytest.raises(InputError, match="is too short to tell ledgers apart; give at least 12"):
        ledger.verify(head=head[:6])


def test_steps_of_earlier_rules_cannot_follow_those_of_today(ledger: Ledger) -> None:
    opened(ledger, [claim(0)])
    sealed = ledger.families()[0]
    weaker = dataclasses.replace(sealed, claims=(claim(1),), m=0, exploratory=False)
    with ledger._store.transaction():
        ledger._append("family", weaker.id, {"family": weaker.to_json(), "at": ""})
    with pytest.raises(TamperedError, match="was sealed under rules that were given up before"):
        ledger.verify()
    record = ledger._store.read()[-1]
    later = dataclasses.replace(record, payload=record.payload.replace('{"at":""', '{"rules":3,"at":""'))
    with pytest.raises(ProtocolError, match="was sealed under rules 3; this version knows 1 and 2"):
        judge(ledger._state(), later)


PAGE = (Path(__file__).parents[1] / "docs" / "protocol.md").read_text()


def test_the_python_on_the_page_about_the_protocol_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "protocol.md", "exec"), names)
    with names["ledger"] as ledger:
        assert capsys.readouterr().out == f"SUPPORTED False {ledger.verify().head}\n"


def test_the_page_names_every_reason() -> None:
    assert all(f"`{reason}`" in PAGE for reason in REASONS)
