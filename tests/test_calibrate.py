"""The calibration counts rightly, resumes, sees a defect when there is one, and its claims are true or idle as said."""

from __future__ import annotations

import json
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
from scipy.stats import binom

from vesalius.errors import InputError
from vesalius.jobs import Event
from vesalius.studies import known_claims
from vesalius.studies.calibrate import (
    BOUND,
    CIRCULAR,
    KNOWN,
    OF_CIRCUIT,
    PLANTED_SEEDS,
    QUICK,
    STUDY,
    Calibration,
    Network,
    Rate,
    Tried,
    calibrate,
    on_planted,
    on_random,
)
from vesalius.studies.question import Question
from vesalius.toys import PLANTED, planted_pairs, random_model

PARTS = {str(part): role for role, parts in PLANTED.items() for part in parts}
NEGATIVE = str(PLANTED["negative mover"][0])
SECOND = str(PLANTED["name mover"][1])


def tried(
    arm: str = KNOWN, quantity: str = "attends", outcome: str = "INCONCLUSIVE", part: str = "", p: float = 0.5
) -> Tried:
    return Tried(arm, quantity, part, "idle", outcome, p)


def idle(*outcomes: str, arm: str = KNOWN) -> Network:
    """A random network about which claims ended like this."""
    return Network(tuple(tried(arm, outcome=outcome) for outcome in outcomes), {})


def planted(outcome: str = "SUPPORTED", **changed: str) -> Network:
    """A planted network whose parts were all found, named and claimed about; changed: role given to a part."""
    members = PARTS | changed
    claims = [tried(arm, outcome=outcome, part=part) for part in members for arm in (STUDY, KNOWN)]
    whole = [tried(STUDY, quantity, outcome) for quantity in OF_CIRCUIT]
    return Network((*claims, *whole), members)


def row(calibration: Calibration, name: str) -> dict[str, object]:
    return next(v.to_json() for v in calibration.validators if v.name == name)


def test_bounds_are_those_of_the_binomial_distribution() -> None:
    for k, n in ((0, 100), (3, 100), (7, 160)):
        assert binom.cdf(k, n, Rate(k, n).upper) == pytest.approx(0.05)
    assert binom.sf(86, 100, Rate(87, 100).lower) == pytest.approx(0.05)


def test_three_false_positives_in_a_hundred_networks_are_within_the_bound_and_four_are_not() -> None:
    assert Rate(3, 100).upper <= BOUND < Rate(4, 100).upper


def test_a_network_counts_as_one_false_positive_however_many_claims_were_supported() -> None:
    networks = (idle("SUPPORTED", "SUPPORTED"), idle("REFUTED", "SUPPORTED"), idle("REFUTED"), idle("INCONCLUSIVE"))
    found = row(Calibration(networks, (planted(),)), KNOWN)
    assert (found["false_positive_rate"], found["n"], found["claims"]) == (0.5, 4, 6)


def test_a_study_and_the_claims_that_are_known_are_counted_apart() -> None:
    calibration = Calibration((idle("SUPPORTED", arm=STUDY), idle("REFUTED")), (planted(),))
    assert row(calibration, STUDY)["false_positive_rate"] == 0.5
    assert row(calibration, KNOWN)["false_positive_rate"] == 0.0
    assert row(calibration, "attends")["false_positive_rate"] == 0.0


def test_what_is_tested_on_its_own_prompts_is_never_counted_as_a_false_positive() -> None:
    calibration = Calibration((idle("SUPPORTED", arm=CIRCULAR), idle("REFUTED")), (planted(),))
    assert [validator.false_positives.k for validator in calibration.validators] == [0] * len(calibration.validators)
    assert calibration.to_json()["false_positives_on_their_own_prompts"]["k"] == 1


def test_power_of_a_quantity_is_the_share_of_true_claims_that_were_supported() -> None:
    half = Calibration((idle("REFUTED"),), (planted(), planted("INCONCLUSIVE")))
    assert [row(half, name)["power"] for name in (STUDY, KNOWN, "attends", "faithfulness")] == [0.5] * 4


def test_a_part_with_a_role_it_does_not_have_does_not_count_as_described() -> None:
    wrong = planted(**{NEGATIVE: "name mover"})
    parts = Calibration((idle("REFUTED"),), (wrong,)).parts
    assert {name: rate.k for name, rate in parts.items()} == {
        "found": 4, "named as planted": 3, "named truly": 3, "supported": 3,
    }  # fmt: skip


def test_a_mover_is_truly_called_an_induction_head_but_that_is_not_what_was_planted() -> None:
    parts = Calibration((idle("REFUTED"),), (planted(**{SECOND: "induction"}),)).parts
    assert (parts["named as planted"].k, parts["named truly"].k, parts["supported"].k) == (3, 4, 4)


def test_a_part_that_was_not_found_counts_against_the_study() -> None:
    whole = planted()
    without = Network(whole.claims, {part: role for part, role in whole.members.items() if part != SECOND})
    parts = Calibration((idle("REFUTED"),), (without,)).parts
    assert (parts["found"].k, parts["supported"].k, parts["supported"].n) == (3, 3, 4)


def test_the_calibration_holds_only_with_few_false_positives_and_enough_power() -> None:
    quiet, loud = [idle("REFUTED")] * 100, [idle("SUPPORTED")] * 4 + [idle("REFUTED")] * 96
    good, weak = (planted(),) * 5, (planted("INCONCLUSIVE"),) * 2 + (planted(),) * 3
    assert Calibration(tuple(quiet), good).holds
    assert not Calibration(tuple(loud), good).holds
    assert not Calibration(tuple(quiet), weak).holds
    assert not Calibration(tuple(quiet[:20]), good).holds  # too few networks to say so


def test_uncorrected_p_values_are_counted_over_claims() -> None:
    network = Network((tried(p=0.05), tried(p=0.051), tried(p=0.2), tried(p=0.001), tried(CIRCULAR, p=0.0)), {})
    rate = Calibration((network,), (planted(),)).uncorrected(KNOWN)
    assert (rate.k, rate.n) == (2, 4)


def test_the_figures_are_json_and_a_table() -> None:
    calibration = Calibration((idle("REFUTED"),) * 2 + (idle("REFUTED", arm=CIRCULAR),), (planted(),))
    data = json.loads(json.dumps(calibration.to_json()))
    assert data["seeds"] == 3 and data["planted_seeds"] == 1
    assert {"name", "false_positive_rate", "power", "n"} <= set(data["validators"][0])
    page = calibration._repr_html_()
    assert all(f"<td>{validator['name']}</td>" in page for validator in data["validators"])


class Counting:
    """Stands in for the measurements; fails at one seed if told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> None:
        self.seeds: Counter[tuple[str, int]] = Counter()
        self.fail_at = fail_at
        module = import_module("vesalius.studies.calibrate")
        monkeypatch.setattr(module, "on_random", lambda seed, device: self.measure("random", seed, idle("REFUTED")))
        monkeypatch.setattr(module, "on_planted", lambda seed, device: self.measure("planted", seed, planted()))
        monkeypatch.setattr(module, "text_trials", lambda trials, blocks, sink: ())

    def measure(self, kind: str, seed: int, network: Network) -> Network:
        if seed == self.fail_at:
            raise KeyboardInterrupt
        self.seeds[kind, seed] += 1
        return network


def test_an_interrupted_calibration_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(monkeypatch, fail_at=3)
    with pytest.raises(KeyboardInterrupt):
        calibrate(5, out=tmp_path)
    counting.fail_at = None
    found = calibrate(5, out=tmp_path)
    assert found == Calibration((idle("REFUTED"),) * 5, (planted(),) * 5)
    assert set(counting.seeds.values()) == {1} and len(counting.seeds) == 10
    calibrate(6, out=tmp_path)
    assert set(counting.seeds.values()) == {1} and len(counting.seeds) == 12


def test_power_needs_no_more_planted_networks_than_stated_and_quick_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    Counting(monkeypatch)
    large, quick = calibrate(PLANTED_SEEDS + 3), calibrate(quick=True)
    assert (len(large.random), len(large.planted)) == (PLANTED_SEEDS + 3, PLANTED_SEEDS)
    assert (len(quick.random), len(quick.planted)) == QUICK


def test_progress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    Counting(monkeypatch)
    events: list[Event] = []
    calibrate(2, sink=events.append)
    advanced = [(event.task, event.done, event.total) for event in events if event.kind == "advance"]
    tasks = ("calibrate: random networks", "calibrate: planted networks")
    assert advanced == [(task, done, 2) for task in tasks for done in (1, 2)]


def test_no_seeds_are_refused() -> None:
    with pytest.raises(InputError, match="seeds is 0; give at least 1"):
        calibrate(0)


@pytest.fixture(scope="module")
def on_noise() -> Network:
    return on_random(0)


def test_a_random_network_is_studied_and_claimed_about_and_nothing_stands(on_noise: Network) -> None:
    known = on_noise.of(KNOWN)
    assert Counter(claim.quantity for claim in known)["direct_effect"] == 5  # four heads and an MLP
    assert {"attends", "copies", "total_effect"} <= {claim.quantity for claim in known}
    assert set(OF_CIRCUIT) <= {claim.quantity for claim in on_noise.of(STUDY)}
    assert not [claim for claim in known + on_noise.of(STUDY) if claim.supported]


def test_the_same_claims_are_tested_on_the_prompts_they_were_made_from(on_noise: Network) -> None:
    fresh, own = on_noise.of(KNOWN), on_noise.of(CIRCULAR)
    assert [(claim.quantity, claim.part) for claim in fresh] == [(claim.quantity, claim.part) for claim in own]
    assert all(there.p != here.p for there, here in zip(fresh, own, strict=True))


@pytest.mark.slow
def test_a_planted_network_is_found_and_its_true_claims_stand() -> None:
    network = on_planted(0)
    assert set(PARTS) <= set(network.members)
    known = network.of(KNOWN)
    assert {claim.quantity for claim in known} == {
        "attends",
        "copies",
        "direct_effect",
        "moves_attention",
        "total_effect",
    }
    assert [claim for claim in known if not claim.supported] == []
    assert all(network.stands(part) for part in PARTS)


def test_the_same_claims_about_a_random_network_do_not_stand() -> None:
    question, model = Question("planted induction", "?", planted_pairs(24, seed=9)), random_model(9)
    verdicts, _ = known_claims.tested(question, model, known_claims.true_claims(question, model, seed=9), seed=9)
    assert len(verdicts) == 15
    assert [verdict for verdict in verdicts if verdict.outcome == "SUPPORTED"] == []


@pytest.mark.slow
def test_the_whole_procedure_holds_its_error_rate_and_finds_what_is_planted() -> None:
    calibration = calibrate(100)
    assert calibration.holds, calibration.to_json()
    # The measurement sees a defect: tested on the prompts they were made from, the same claims look better.
    theirs, fresh = (calibration.uncorrected(arm, student=True) for arm in (CIRCULAR, KNOWN))
    assert theirs.lower > fresh.share
