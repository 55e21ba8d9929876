"""Units planted in text are as they were planted, and trials of claims about them come out as they should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from sklearn.metrics import roc_auc_score

import vesalius as vs
from vesalius.jobs import Blocks, silent
from vesalius.studies import text_trials as trials
from vesalius.studies.simulated import Rate
from vesalius.studies.text_trials import DRAWN, NULLS, PLAIN_DETECTION, QUANTITIES, STRENGTH, TRUE, UnitTrials
from vesalius.toys.text import FOLLOWS, TOPIC, PlantedText, PlantedUnit, noise, text_network

WORDS = torch.tensor([2, 3])


def test_a_planted_unit_separates_its_words_as_well_as_was_asked_for() -> None:
    text = PlantedText()
    ids = text.draw(2000, 64, 5)
    chosen = torch.isin(ids, WORDS)
    assert float(chosen.double().mean()) == pytest.approx(0.01, rel=0.05)
    model = text_network([PlantedUnit((2, 3), STRENGTH), PlantedUnit(copy_of=0), PlantedUnit(topic=2.0)])
    units = model.run(ids, capture=["layers.0.mlp_post"])["layers.0.mlp_post"]
    assert roc_auc_score(chosen.flatten(), units[..., 0].flatten()) == pytest.approx(0.85, abs=0.01)
    assert torch.equal(units[..., 0], units[..., 1])
    on_topic = ids[:, 0] == TOPIC
    assert float(units[on_topic, :, 2].mean() - units[~on_topic, :, 2].mean()) == pytest.approx(2.0, abs=0.05)


def test_noise_is_normal_and_the_same_in_every_run_and_no_units_share_it() -> None:
    ids = PlantedText().draw(100, 32, 1)
    found = noise(ids, 6, 0)
    assert torch.equal(found, noise(ids, 6, 0))
    assert kstest(found.flatten().numpy(), "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(found.flatten(0, 1).T) - np.eye(6)).max() < 0.08
    assert not torch.equal(found, noise(ids, 6, 1))
    changed = ids.clone()
    changed[:, 20:] = 9
    assert torch.equal(noise(changed, 6, 0)[:, :20], found[:, :20])  # reads backwards only


def test_what_follows_a_planted_word_and_how_frequent_they_are_on_the_topic() -> None:
    ids = PlantedText(on_topic=3.0).draw(4000, 64, 2)
    chosen = torch.isin(ids, WORDS)
    follows = ids[:, 1:][chosen[:, :-1]] == 1
    assert float(follows.double().mean()) == pytest.approx(FOLLOWS + (1 - FOLLOWS) * 0.11, abs=0.05)
    on_topic = ids[:, 0] == TOPIC
    shares = [float(chosen[rows, 1:].double().mean()) for rows in (on_topic, ~on_topic)]
    assert shares[0] / shares[1] == pytest.approx(3.0, rel=0.1)


@pytest.fixture(scope="module")
def few() -> tuple[UnitTrials, ...]:
    # The true sizes from fewer texts than in earnest.
    before, trials.PILOTS = trials.PILOTS, 8
    found = trials.text_trials(4, Blocks(None, ""), silent)
    trials.PILOTS = before
    return found


@pytest.mark.slow
def test_noise_and_decoys_are_not_supported_and_what_is_planted_is(few: tuple[UnitTrials, ...]) -> None:
    tested = [row for row in few if row.quantity not in trials.WITHOUT_A_TEST]
    for row in tested:
        if row.setting in ("nothing", "decoy: fires on a topic", "copy", "reads, does not act"):
            assert row.supported.k == 0, row
        elif row.true and row.quantity != DRAWN:
            assert row.supported.k >= 3, row
    assert {row.quantity for row in tested} == {one.name for one in QUANTITIES} | {DRAWN}
    assert {row.setting for row in few} == {setting.name for setting in (*NULLS, *TRUE)} | {tested[-1].setting}


@pytest.mark.slow
def test_a_score_above_nothing_is_no_test(few: tuple[UnitTrials, ...]) -> None:
    """The positive control: on noise, plain detection says yes about half of the time."""
    noisy = next(row for row in few if row.quantity == PLAIN_DETECTION and row.setting == "nothing")
    assert noisy.supported.k > 0
    assert noisy.holds(0.08, 0.8)  # it is there to compare, and held to nothing


@pytest.mark.slow
def test_the_strongest_tokens_do_not_show_what_a_unit_does_elsewhere(few: tuple[UnitTrials, ...]) -> None:
    hidden = {row.quantity: row for row in few if row.setting == "not at the top"}
    assert hidden["strongest tokens"].supported.k == 0
    assert hidden["promotes"].supported.k >= 3


def test_bounds_are_of_false_claims_and_power_of_true_ones() -> None:
    often, seldom = Rate(700, 760), Rate(30, 760)
    assert UnitTrials("auroc", "s", True, often, Rate(0, 760), Rate(60, 760)).holds(0.08, 0.8)
    assert not UnitTrials("auroc", "s", True, Rate(500, 760), Rate(0, 760), Rate(260, 760)).holds(0.08, 0.8)
    assert UnitTrials("auroc", "s", False, seldom, often, Rate(30, 760)).holds(0.08, 0.8)
    assert not UnitTrials("auroc", "s", False, Rate(60, 760), often, Rate(0, 760)).holds(0.08, 0.8)


def test_interrupted_trials_go_on_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "PILOTS", 1)
    monkeypatch.setattr(trials, "_BLOCK", 2)
    made: list[int] = []

    def counted(setting: trials.Setting, true: object, seed: int) -> list[str]:
        made.append(seed)
        if len(made) == 3:
            raise KeyboardInterrupt
        return ["INCONCLUSIVE"] * len(trials._names(setting))

    monkeypatch.setattr(trials, "_trial", counted)
    with pytest.raises(KeyboardInterrupt):
        trials.text_trials(4, Blocks(tmp_path, "plan"), silent)
    assert made == [0, 1, 2]
    found = trials.text_trials(4, Blocks(tmp_path, "plan"), silent)
    assert made[3:7] == [2, 3, 0, 1]  # the first two are kept
    assert all(row.inconclusive.n == 4 for row in found if row.quantity != DRAWN)


@pytest.mark.slow
def test_every_validator_of_descriptions_holds_its_level_and_has_power() -> None:
    for row in trials.text_trials(trials.TRIALS, Blocks(None, ""), silent):
        assert row.holds(0.08, 0.8), row


def test_a_toy_of_your_own_is_tested_the_same_way() -> None:
    """Any part of any network: a direction that mixes two units fires where either does."""
    model = text_network([PlantedUnit((2,), 3.0), PlantedUnit((3,), 3.0)])
    mixed = vs.Direction(vs.Site.parse("layers.0.mlp_post"), torch.eye(12)[:2].sum(0))
    runs = vs.Runs(model, vs.Corpus(vs.Tokens(PlantedText().draw(200, 64, 0))))
    given = {"rule": {"word": ["w2", "w3"], "at": 0}}
    claim = vs.describe.claim_about(runs, mixed, "auroc", parameters=given, size=0.2)
    fresh = vs.Runs(model, vs.Corpus(vs.Tokens(PlantedText().draw(200, 64, 1))))
    evidence = vs.validate.check(claim, runs=fresh, parts=[mixed])
    assert vs.decide([claim], {claim.id: evidence})[0].outcome == "SUPPORTED"
