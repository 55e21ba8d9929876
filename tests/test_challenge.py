"""Rules are broken by made inputs where they are wrong, revised by them, and not broken where they are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vesalius as vs
from vesalius.describe import Challenge, Learned, challenge, learn, revise, rivals
from vesalius.errors import InputError
from vesalius.quantities.rules import matches, reach
from vesalius.toys import PlantedText, PlantedUnit, text_network

UNIT, THRESHOLD = vs.neuron(0, 0), 4.0
RIGHT, TOO_WIDE, TOO_NARROW = ({"word": words, "at": 0} for words in (["w2", "w3"], ["w2", "w3", "w9"], ["w2"]))


def runs_of(seed: int = 0) -> vs.Runs:
    """A unit that fires on w2 and w3 alone, which have like embeddings."""
    model = text_network([PlantedUnit((2, 3), 8.0)], seed)
    with torch.no_grad():
        model.module.embed.weight += torch.randn(model.module.embed.weight.shape, generator=torch.manual_seed(0))
        model.module.embed.weight[3] = model.module.embed.weight[2] + 0.01
    ids = PlantedText(frequency=0.05).draw(60, 64, seed)
    return vs.Runs(model, vs.Corpus(vs.Tokens(ids), {"document": [f"discovery {row}" for row in range(60)]}), seed=seed)


@pytest.fixture(scope="module")
def runs() -> vs.Runs:
    return runs_of()


def of(runs: vs.Runs, rule: dict[str, Any], made: int = 64) -> Challenge:
    return challenge(runs, UNIT, rule, THRESHOLD, made=made)


def test_a_rule_that_is_right_stands(runs: vs.Runs) -> None:
    found = of(runs, RIGHT)
    assert len(found.placed) == len(found.taken) == 64
    assert not found.broken
    assert found.usual == (1.0, 0.0)


def test_a_rule_that_says_too_much_is_silent_where_its_words_are_written(runs: vs.Runs) -> None:
    found = of(runs, TOO_WIDE)
    assert {example.token for example in found.silent} == {" w9"}
    assert not found.firing
    assert "silent on" in found.sentence and "<h4>" in found._repr_html_()


def test_a_rule_that_says_too_little_is_found_by_a_token_like_the_one_it_names(runs: vs.Runs) -> None:
    found = of(runs, TOO_NARROW)
    assert {example.token for example in found.firing} == {" w3"}
    assert not found.silent


def test_made_inputs_are_what_they_say(runs: vs.Runs) -> None:
    """Their last token is picked, or is not; and their values are those of a plain run."""
    found = of(runs, {"all": [{"word": ["w2"], "at": 0}, {"word": ["w1", "w4", "w5"], "at": -1}]}, 16)
    assert found.placed and found.taken
    for some, expected in ((found.placed, True), (found.taken, False)):
        for example in some:
            tokens = vs.Tokens(torch.tensor([example.ids]))
            text = vs.describe.learning.Text(tokens.ids, tokens.real, lambda token: f" w{token}")
            assert bool(matches(found.rule, text)[0, -1]) is expected
            plain = runs.model.run(tokens, capture=["layers.0.mlp_post"])["layers.0.mlp_post"][0, -1, 0]
            assert example.value == pytest.approx(float(plain), abs=1e-6)


def test_made_inputs_stay_on_the_half_of_their_document() -> None:
    """Or what a rule is learned from and what it is held to would share texts."""
    runs = runs_of()
    few = vs.Runs(runs.model, runs.data.subset([4, 9, 21, 33]))
    found = challenge(few, UNIT, RIGHT, THRESHOLD)
    assert {example.document for example in found.made} <= {4, 9, 21, 33}
    assert {example.document % 2 for example in found.made} == {0, 1}


def examples_of(runs: vs.Runs) -> vs.describe.PartExamples:
    texts = [runs.model.tokenizer.decode(row) for row in runs.data.tokens.ids.tolist()]
    return vs.describe.collect_examples(runs.model, texts, [UNIT], context=64, sink=vs.silent)[0]


@pytest.mark.parametrize("wrong", [TOO_WIDE, TOO_NARROW], ids=["too wide", "too narrow"])
def test_a_broken_rule_is_revised_and_remembers_what_it_was(runs: vs.Runs, wrong: dict[str, Any]) -> None:
    examples = examples_of(runs)
    against = challenge(runs, UNIT, wrong, examples.threshold)
    better = revise(examples, Learned(wrong, 0.9, 0.9, 0.0), against)
    assert better is not None and better.rule == RIGHT
    assert better.revised[0]["rule"] == wrong
    assert better.revised[0]["silent"] + better.revised[0]["firing"] == len(against.broken)
    assert better.held_out > better.revised[0]["f1"]
    assert Learned.from_json(better.to_json()) == better
    # What stands is not revised.
    found = learn(examples)
    assert found is not None and found.rule == RIGHT
    assert revise(examples, found, challenge(runs, UNIT, RIGHT, examples.threshold)) is None


def test_what_was_given_up_goes_into_the_claim_and_the_sentence(runs: vs.Runs) -> None:
    texts = [runs.model.tokenizer.decode(row) for row in runs.data.tokens.ids.tolist()]
    examples = vs.describe.collect_examples(runs.model, texts, [UNIT], context=64, sink=vs.silent)
    against = challenge(runs, UNIT, TOO_WIDE, examples[0].threshold)
    rules = vs.describe.LearnedRules(examples)
    rules.recall(UNIT, revise(examples[0], Learned(TOO_WIDE, 0.9, 0.9, 0.0), against))
    discovery = vs.describe.Discovery.of(runs, [UNIT])
    description = vs.describe.describe(discovery, [rules])[UNIT]
    assert description is not None
    assert 'it was said to fire on "w2", "w3", "w9" until' in description.sentence
    assert vs.describe.Description.from_json(description.to_json()) == description
    claim = vs.describe.claims_of(description, discovery)[0][0]
    assert claim.origin["given_up"][0]["rule"] == TOO_WIDE
    assert vs.Claim.from_json(claim.to_json()).id == claim.id


def test_rules_that_pick_the_same_places_are_rivals_and_worse_ones_are_told_apart() -> None:
    """On the topic of a text, two words that are there alike say the same; a word that is anywhere does not."""
    runs = runs_of(3)
    found = rivals(runs, UNIT, RIGHT, [{"word": ["w3", "w2"], "at": 0}, {"word": ["w20", "w21"], "at": 0}])
    assert [one["told_apart"] for one in found] == [False, True]
    assert found[0]["difference"] == 0.0


def test_how_far_a_rule_looks_back() -> None:
    far = {"any": [{"word": ["a"], "at": -2}, {"all": [{"seen": ["b"], "within": 5}, {"not": {"class": "digits"}}]}]}
    assert reach(far) == 5
    assert reach(RIGHT) == 0


def test_a_rule_is_challenged_on_texts_and_nothing_else() -> None:
    runs = vs.Runs(runs_of().model, vs.Corpus(vs.Tokens(torch.tensor([[5, 6, 7]]))))
    nothing = challenge(runs, UNIT, RIGHT)
    assert nothing.made == () and "none of 0" in nothing.sentence
    with pytest.raises(InputError, match="on texts"):
        challenge(vs.Runs(vs.toys.planted_induction(0), vs.toys.planted_pairs(8, 0)), UNIT, RIGHT)
