"""Laws of the records: one text, one hash, nothing lost in a round trip, nothing impossible accepted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vesalius.errors import InputError, NotFiniteError, UnknownNameError
from vesalius.protocol import Claim, Evidence, Family, Verdict, canonical_json, content_hash, default_delta, unmeasured

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


MEASURED = {"estimate": 4.0, "low": 3.0, "high": 5.0, "n": 32, "data_hash": "d0"}


def claim(**changes: Any) -> Claim:
    given = {
        "statement": "head 3.1 moves the name to the end",
        "subject": {"kind": "head", "site": "layers.3.z[1]", "model": "abc"},
        "quantity": "patch",
        "delta": 0.2,
        "n": 32,
        "scale": 4.0,
        "unit": "logit_diff",
        "control": {"rule": "same type within 4 layers", "parts": ["layers.4.z[0]"]},
        "nulls": (("shuffled", 0.1),),
        "condition": {"corruption": "swap", "direction": "noising", "effect": "total", "positions": "end"},
        "parents": ("d0",),
    }
    return Claim(**{**given, **changes})


def evidence(**changes: Any) -> Evidence:
    given = {
        "claim_id": claim().id,
        "effects": (0.5, 0.25, 1),
        "control": (0.0, 0.1, 0.2),
        "nulls": {"shuffled": [0, 0, 0.5]},
        "groups": {"template": ("t0", "t0", "t1"), "names": (("Ann", "Bo"), "Cy", ["Di"])},
        "example_hashes": ("e0", "e1", "e2"),
        "data_hash": "d1",
        "created_at": "2025-01-01T00:00:00+00:00",
    }
    return Evidence(**{**given, **changes})


# --- canonical JSON --------------------------------------------------------------------------------------------------


def test_the_canonical_text_is_sorted_compact_and_ascii() -> None:
    value = {"b": (1, 2.0, None, True), "a": {"é": 1e-7}}
    assert canonical_json(value) == '{"a":{"\\u00e9":1e-07},"b":[1,2.0,null,true]}'
    assert content_hash(value) == hashlib.sha256(canonical_json(value).encode()).hexdigest()


@settings(deadline=None)
@given(JSON)
def test_the_canonical_text_is_a_fixed_point(value: Any) -> None:
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text


@given(st.dictionaries(st.text(), st.integers(), max_size=6))
def test_the_hash_does_not_depend_on_the_order_of_keys(value: dict[str, int]) -> None:
    assert content_hash(dict(reversed(value.items()))) == content_hash(value)


def test_different_values_have_different_hashes() -> None:
    values = [1, 1.0, "1", True, None, [1], [[1]], {"1": 1}, "", [], {}, [1, 1]]
    assert len({content_hash(value) for value in values}) == len(values)


@dataclasses.dataclass
class Point:
    x: float
    tags: tuple[str, ...]


def test_dataclasses_are_objects() -> None:
    assert canonical_json(Point(0.1, ("a",))) == '{"tags":["a"],"x":0.1}'
    assert canonical_json(np.float64(0.1)) == "0.1"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, {2}]}, r"value\.a\[1\] is a builtins\.set"),
        ({"f": len}, r"value\.f is a builtins\.builtin_function_or_method"),
        ([np.zeros(2)], r"value\[0\] is a numpy\.ndarray"),
        ([np.float32(1)], r"value\[0\] is a numpy\.float32"),
        (b"x", r"value is a builtins\.bytes"),
        ({1: 2}, r"value has the key 1 \(int\)"),
        (Point, r"value is a builtins\.type"),
    ],
)
def test_what_has_no_canonical_json_is_named_with_its_path(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        canonical_json(value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(NotFiniteError, match=r"value\.a\[1\] is -?(nan|inf)"):
        canonical_json({"a": [0.0, bad]})


# --- claims ----------------------------------------------------------------------------------------------------------


def test_a_claim_survives_json_and_keeps_its_id() -> None:
    made = claim()
    back = Claim.from_json(json.loads(json.dumps(made.to_json())))
    assert back == made and back.id == made.id == content_hash(made.to_json())


def test_every_field_of_a_claim_is_part_of_its_id() -> None:
    changes: dict[str, Any] = {
        "statement": "another", "subject": {"kind": "mlp"}, "quantity": "ablate", "delta": 0.3, "n": 33,
        "kind": "circuit", "parameters": {"test": "rank"}, "sign": -1, "scale": 5.0, "scale_name": "accuracy",
        "unit": "nats", "control": {}, "delta_c": 0.15, "nulls": (), "condition": {}, "seed": 1, "parents": (),
        "role": "mover", "study": "ioi", "schema": 1, "origin": {"scale": MEASURED},
    }  # fmt: skip
    assert changes.keys() == {field.name for field in dataclasses.fields(Claim)}
    ids = {claim(**{name: value}).id for name, value in changes.items()}
    assert len(ids | {claim().id}) == len(changes) + 1


def test_numbers_that_are_equal_give_equal_ids() -> None:
    assert (
        claim(delta=1, delta_c=1, nulls=[["shuffled", 0]]).id
        == claim(delta=1.0, delta_c=1.0, nulls=(("shuffled", 0.0),)).id
    )
    assert claim().id == claim(delta_c=0.1).id  # the default, written out


def test_a_claim_does_not_change_with_the_dict_it_was_made_from() -> None:
    subject = {"kind": "head", "parts": [1]}
    made = claim(subject=subject)
    before = made.id
    subject["parts"].append(2)  # type: ignore[attr-defined]
    assert Claim.from_json(made.to_json()).id == before


def test_the_control_margin_defaults_to_half_of_delta() -> None:
    assert claim(delta=0.5).control_margin == 0.25
    assert claim(delta=0.5, delta_c=0.0).control_margin == 0.0


def test_effects_under_two_percent_cannot_be_claimed() -> None:
    assert claim(delta=0.02 * 4.0).delta == 0.08
    with pytest.raises(InputError, match=r"delta 0\.079 is 2\.0% of the total effect 4; .* use at least 0\.08"):
        claim(delta=0.079)
    with pytest.raises(InputError, match="under 2%"):
        claim(delta=0.079, scale=-4.0)
    assert default_delta(-4.0) == 0.2
    with pytest.raises(InputError, match="total effect is 0"):
        default_delta(0)


def test_a_causal_claim_needs_its_total_effect() -> None:
    with pytest.raises(InputError, match="a causal claim needs scale=: the total effect"):
        claim(scale=None)
    assert claim(scale=None, kind="predictive").scale is None


def test_two_percent_is_a_rule_of_total_effects_only() -> None:
    """On another scale, say a standard deviation, what is worth claiming is the quantity's business."""
    assert claim(delta=0.01, scale=4.0, scale_name="standard deviation").delta == 0.01


def test_the_names_of_schema_1_are_taken_and_can_be_read() -> None:
    given = {key: value for key, value in claim().to_json().items() if key not in ("quantity", "scale", "schema")}
    old = Claim(**given, check="patch", total_effect=4.0)
    assert old == claim()
    assert (old.check, old.total_effect) == (old.quantity, old.scale) == ("patch", 4.0)
    assert dataclasses.replace(old, delta=0.3).quantity == "patch"
    assert dataclasses.replace(old, quantity="ablate", scale=5.0).check == "ablate"
    with pytest.raises(InputError, match="quantity='patch' and check='ablate' say different things"):
        claim(check="ablate")


def test_a_claim_that_was_written_before_is_read_back_with_its_hash() -> None:
    """As it stands in ledgers of schema 1: neither the text nor the hash may ever change."""
    text = (
        '{"check":"direct_effect","condition":{"corruption":"swap","effect":"direct"},"control":{"parts":'
        '["layers.4.z[0]"],"rule":"same type"},"delta":0.2,"delta_c":0.1,"kind":"causal","n":32,"nulls":'
        '[["shuffled labels",0.1]],"parameters":{"component":"layers.3.z[1]"},"parents":["d0"],"role":"mover",'
        '"seed":0,"sign":1,"statement":"head 3.1 writes the name","study":"ioi","subject":{"kind":"head","site":'
        '"layers.3.z[1]"},"total_effect":4.0,"unit":"logits"}'
    )
    old = Claim.from_json(json.loads(text))
    assert (old.quantity, old.scale, old.schema) == ("direct_effect", 4.0, 1)
    assert canonical_json(old.to_json()) == text
    assert old.id == hashlib.sha256(text.encode()).hexdigest()
    with pytest.raises(InputError, match="claims of schema 3 are not understood"):
        claim(schema=3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sign": 0}, InputError, r"sign must be \+1 or -1; got 0"),
        ({"delta": 0}, InputError, "delta must be positive"),
        ({"delta": math.nan}, NotFiniteError, "delta is nan"),
        ({"delta": "much"}, InputError, "delta must be a number; got 'much'"),
        ({"n": 0}, InputError, "n, the planned number of examples"),
        ({"n": 3.5}, InputError, "n, the planned number of examples"),
        ({"delta_c": -0.1}, InputError, "margins must not be negative"),
        ({"statement": " "}, InputError, "a claim needs a statement"),
        ({"kind": " "}, InputError, "a claim needs a kind"),
        ({"quantity": ""}, InputError, "a claim needs a quantity"),
        ({"condition": {"direction": "up"}}, UnknownNameError, "unknown direction 'up'; known: denoising, noising"),
        ({"condition": {"effect": "half"}}, UnknownNameError, "unknown effect 'half'; known: direct, total"),
        ({"nulls": (("control", 0.1),)}, InputError, "null names must differ"),
        ({"nulls": (("a", 0.1), ("a", 0.2))}, InputError, "null names must differ"),
        ({"nulls": ("ab!",)}, InputError, r"each of nulls must be \(name, margin\)"),
        ({"subject": "head"}, InputError, "subject must be a mapping; got str"),
        ({"parameters": {"fn": print}}, InputError, r"parameters\.fn is a builtins\.builtin_function"),
    ],
)
def test_impossible_claims_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        claim(**changes)


def test_json_with_unknown_or_missing_keys_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown field of Claim 'dleta'; known: .*delta"):
        Claim.from_json({**claim().to_json(), "dleta": 1})
    with pytest.raises(InputError, match=r"Claim lacks the field\(s\) delta, n"):
        Claim.from_json({k: v for k, v in claim().to_json().items() if k not in ("delta", "n")})
    with pytest.raises(InputError, match="Evidence must be a mapping; got list"):
        Evidence.from_json([])  # type: ignore[arg-type]


def test_a_family_counts_its_claims_and_its_id_ignores_when_it_was_sealed() -> None:
    family = Family(claims=(claim(), claim(n=64)), study="s")
    assert family.m == 2
    assert Family.from_json(json.loads(canonical_json(family))) == family
    assert dataclasses.replace(family, exploratory=True).id == family.id
    assert Family(claims=(claim(),), study="s").id != family.id != Family(claims=family.claims, study="t").id


def test_a_family_is_neither_empty_nor_counted_wrong() -> None:
    with pytest.raises(InputError, match="at least one claim"):
        Family(claims=())
    with pytest.raises(InputError, match="listed twice"):
        Family(claims=(claim(), claim()))
    with pytest.raises(InputError, match="m is 1 but the family holds 2 claims"):
        Family(claims=(claim(), claim(n=64)), m=1)


# --- evidence and verdicts -------------------------------------------------------------------------------------------


def test_evidence_survives_json_and_joins_labels() -> None:
    made = evidence()
    assert made.n == 3 and made.groups["names"] == ("Ann|Bo", "Cy", "Di")
    assert Evidence.from_json(json.loads(canonical_json(made))) == made
    assert Evidence.from_json(made.to_json()).id == made.id


def test_the_id_of_evidence_is_what_was_found_not_when_or_at_what_cost() -> None:
    made = evidence()
    assert evidence(created_at="2030-01-01", cost={"seconds": 9.9}).id == made.id
    for change in ({"effects": (0.5, 0.25, 1.5)}, {"seed": 1}, {"plan_hash": "p"}, {"diagnostics": {"norm": 2.0}}):
        assert evidence(**change).id != made.id


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"effects": (0.5, math.nan, 1)}, NotFiniteError, r"effects\[1\] is nan"),
        ({"nulls": {"shuffled": (0, 0, math.inf)}}, NotFiniteError, r"nulls\.shuffled\[2\] is inf"),
        ({"control": (0.0,)}, InputError, "control has 1 entries for 3 effects"),
        ({"groups": {"template": ("a",)}}, InputError, r"groups\.template has 1 entries for 3 effects"),
        ({"example_hashes": ()}, InputError, "example_hashes has 0 entries for 3 effects"),
        ({"n": 4}, InputError, "n is 4 but there are 3 effects"),
        ({"effects": ()}, InputError, "needs at least one effect"),
        ({"status": "maybe"}, UnknownNameError, "unknown status of evidence 'maybe'; known: measured, unmeasured"),
        ({"status": "unmeasured"}, InputError, "needs a reason and has no effects"),
        ({"diagnostics": {"other_conditions": {"abc": "low"}}}, InputError, "other_conditions.abc must be a number"),
    ],
)
def test_impossible_evidence_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evidence(**changes)


def test_unmeasured_says_why() -> None:
    made = unmeasured("c", "the gate failed", plan_hash="p")
    assert (made.measured, made.reason, made.n) == (False, "the gate failed", 0)
    assert Evidence.from_json(made.to_json()) == made


def test_a_verdict_survives_json_and_refuses_other_outcomes() -> None:
    numbers = {
        "p_supported": 0.01,
        "p_supported_holm": 0.02,
        "p_refuted": 1,
        "p_refuted_holm": 1,
        "n": 8,
        "n_groups": 4,
    }
    legs = ({"name": "effect", "theta": 0.2, "low": 0.1, "high": 0.3, "p_greater": 0.01, "p_less": 0.99},)
    made = Verdict(claim_id="c", outcome="SUPPORTED", reason=None, estimate=0.5, low=0.25, high=1, legs=legs, **numbers)
    assert Verdict.from_json(json.loads(canonical_json(made))) == made
    with pytest.raises(UnknownNameError, match="unknown outcome 'PROVEN'"):
        dataclasses.replace(made, outcome="PROVEN")
