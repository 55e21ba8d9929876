"""Rules about text against the plain way, rules learned for planted units, and what becomes a claim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import vesalius as vs
from tiny_folder import tiny_folder
from vesalius.data.packing import Context, Group
from vesalius.describe import Discovery, claims_of
from vesalius.describe.collecting import Collector, Sizes
from vesalius.describe.examples import ActivatingExamples
from vesalius.describe.learned import LearnedRules
from vesalius.describe.learning import learn
from vesalius.errors import InputError, UnknownNameError, VesaliusError
from vesalius.quantities import FIRES_WHERE, Runs
from vesalius.quantities.rules import Text, in_words, matches, word_of
from vesalius.toys import PlantedText, PlantedUnit, text_network

WORDS = ["", " the", " King", " queen", " 42", ".", "\n", " sat", "ing", " USA"]
IDS = torch.tensor([[1, 2, 7, 5, 6, 1, 3], [4, 5, 1, 3, 8, 0, 0], [9, 1, 2, 2, 1, 7, 4]])
REAL = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 7]).bool()
TEXT = Text(IDS, REAL, WORDS.__getitem__)
RULES: dict[str, tuple[dict[str, Any], Callable[[list[str], int], bool]]] = {
    'on "king", "queen"': ({"word": ["king", "queen"], "at": 0}, lambda t, i: word_of(t[i]) in ("king", "queen")),
    'after "the"': ({"word": ["the"], "at": -1}, lambda t, i: i >= 1 and word_of(t[i - 1]) == "the"),
    "3 tokens after digits": ({"class": "digits", "at": -3}, lambda t, i: i >= 3 and t[i - 3].strip().isdigit()),
    "on a word in capitals": ({"class": "capitals"}, lambda t, i: t[i] == " USA"),
    'with "king" among the 2 tokens before': (
        {"seen": ["king"], "within": 2},
        lambda t, i: any(word_of(token) == "king" for token in t[max(i - 2, 0) : i]),
    ),
    'on a capitalised word, but not after "the"': (
        {"all": [{"class": "capitalised"}, {"not": {"word": ["the"], "at": -1}}]},
        lambda t, i: t[i] == " King" and not (i >= 1 and word_of(t[i - 1]) == "the"),
    ),
    "on a line break, or on punctuation": (
        {"any": [{"class": "line break"}, {"class": "punctuation"}]},
        lambda t, i: t[i] in ("\n", "."),
    ),
}


@pytest.mark.parametrize("phrase", RULES)
def test_a_rule_picks_what_reading_the_text_picks_and_never_padding(phrase: str) -> None:
    rule, plain = RULES[phrase]
    expected = torch.zeros_like(REAL)
    for row in range(len(IDS)):
        tokens = [WORDS[token] for token, real in zip(IDS[row].tolist(), REAL[row].tolist(), strict=True) if real]
        expected[row, : len(tokens)] = torch.tensor([plain(tokens, at) for at in range(len(tokens))])
    assert torch.equal(matches(rule, TEXT), expected)
    assert in_words(rule) == phrase
    assert bool(expected.any())


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        ({"token": 3}, InputError, "a rule is one of word, class"),
        (["word"], InputError, "a rule is one of"),
        ({"word": []}, InputError, "at least one"),
        ({"word": ["a"], "at": 1}, InputError, "at 0"),
        ({"word": ["a"], "at": -100}, InputError, "up to 64 before"),
        ({"word": ["a"], "when": 1}, UnknownNameError, "unknown field of a rule 'word' 'when'"),
        ({"class": "nouns"}, UnknownNameError, "unknown class of tokens 'nouns'"),
        ({"all": []}, InputError, "lists rules"),
        ({"seen": ["a"], "within": True + 100}, InputError, "up to 64"),
    ],
)
def test_what_is_no_rule_is_refused_by_name(rule: Any, error: type[VesaliusError], message: str) -> None:
    with pytest.raises(error, match=message):
        matches(rule, TEXT)


# --- learned


def planted(fires: Callable[[list[str], int], bool], seed: int = 0, kinds: int = 40) -> ActivatingExamples:
    """Examples of one unit on random text of "the", "king" and other words."""
    draw, words = np.random.default_rng(seed), [" the", " king", *(f" w{number}" for number in range(kinds))]
    share = np.array([0.1, 0.1, *[0.8 / kinds] * kinds])
    found = Collector(1, torch.tensor([True]), Sizes(), seed=0)
    for document in range(300):
        ids = draw.choice(len(words), 40, p=share)
        text = [words[token] for token in ids]
        values = torch.tensor([float(fires(text, at)) * (1 + draw.random()) for at in range(40)])[:, None]
        found.add(Group((Context(document, 0, ids.astype(np.int64), np.ones(40, dtype=bool)),)), values)
    tokenizer = SimpleNamespace(decode=lambda ids: words[ids[0]])
    return ActivatingExamples((vs.neuron(0, 0),), "", {}, found, tokenizer)


PLANTED: dict[str, Callable[[list[str], int], bool]] = {
    "a word": lambda t, i: t[i] == " king",
    "a word after a word": lambda t, i: i > 0 and t[i] == " king" and t[i - 1] == " the",
    "either of two words": lambda t, i: t[i] in (" w3", " w7"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[pytest.mark.slow] * (n > 1)) for n, one in enumerate(PLANTED)]
)
def test_what_was_planted_is_learned(name: str) -> None:
    fires = PLANTED[name]
    found = learn(planted(fires)[0])
    assert found is not None
    assert found.holds
    assert found.held_out > 0.9
    # On text that was never seen, the rule picks what fires.
    words = [" the", " king", *(f" w{number}" for number in range(40))]
    ids = torch.from_numpy(np.random.default_rng(9).integers(0, 42, (50, 40)))
    picked = matches(found.rule, Text(ids, torch.ones_like(ids, dtype=torch.bool), words.__getitem__))
    truth = torch.tensor([[fires([words[t] for t in row], at) for at in range(40)] for row in ids.tolist()])
    assert float((picked & truth).sum() * 2 / (picked.sum() + truth.sum())) > 0.9


def test_nothing_is_said_of_a_unit_without_a_rule() -> None:
    noise = np.random.default_rng(3)
    for seed in range(2):
        found = learn(planted(lambda t, i: bool(noise.random() < 0.02), seed)[0])
        assert found is None or not found.holds
    assert learn(planted(lambda t, i: False)[0]) is None


# --- measured


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> vs.Model:
    return vs.load(tiny_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def corpus(model: vs.Model) -> vs.Corpus:
    texts = [f"the cat sat on {number} mats and the fox ran from the hens " * (1 + number % 3) for number in range(24)]
    return vs.Corpus(model.tokens(texts), groups={"document": [f"d{row}" for row in range(24)]})


def test_it_measures_the_difference_between_picked_tokens_and_the_others(model: vs.Model, corpus: vs.Corpus) -> None:
    rule, part = {"class": "start of a word", "at": 0}, vs.neuron(1, 3)
    runs = Runs(model, corpus)
    found = FIRES_WHERE.measure(runs, part, {"rule": rule})
    rows, everything = [], []
    for ids, real in zip(corpus.tokens.ids, corpus.tokens.real, strict=True):
        own = ids[real]
        values = model.run(vs.Tokens(own[None]), capture=[part.site.whole])[part.site.whole][0, :, 3].double()
        # The first token is an outlier in language models, and counts neither here nor there.
        values, words = values[1:], [model.tokenizer.decode([token]) for token in own.tolist()[1:]]
        hit = torch.tensor([word[:1].isspace() and word.strip().isalnum() for word in words])
        rows.append(values[hit].mean() - values[~hit].mean() if bool(hit.any()) else torch.tensor(0.0))
        everything.append(values)
    torch.testing.assert_close(found, torch.stack(rows).double() / torch.cat(everything).std(), rtol=1e-4, atol=1e-5)
    moved = FIRES_WHERE.nulls(runs, part, {"rule": rule})["shuffled"]
    assert float(found.mean().abs()) > 0.1 > float(moved.mean().abs())
    nothing = FIRES_WHERE.measure(runs, part, {"rule": {"word": ["zebra"], "at": 0}})
    assert bool((nothing == 0).all())


def test_a_learned_rule_becomes_a_claim_that_fresh_texts_decide(model: vs.Model, tmp_path: Path) -> None:
    # The first neuron that some rule describes; its claim is tested on texts of other documents.
    texts = [f"the cat sat on {number} mats and the fox ran from {number * 7} hens. " * 3 for number in range(48)]
    documents = [f"d{row}" for row in range(48)]
    whole = vs.Corpus(model.tokens(texts), {"document": documents}, splits=["discovery"] * 24 + ["validation"] * 24)
    parts = [vs.neuron(layer, number) for layer in (0, 1) for number in range(12)]
    seen = vs.describe.collect_examples(model, texts[:24], parts, context=64, sink=vs.silent)
    with vs.Ledger(tmp_path / "ledger.sqlite") as ledger:
        runs = Runs(model, ledger.open(whole, "discovery"))
        setting, rules = Discovery.of(runs, parts, study="rules"), LearnedRules(seen)
        rules.prepare(setting, parts)
        said = [one for part in parts if (one := rules.describe(setting, part)) is not None and one.fits]
        assert said
        family = ledger.register([claim for one in said[:4] for claim, _ in claims_of(one, setting)])
        fresh = Runs(model, ledger.open(whole, "validation"))
        for claim in family.claims:
            ledger.append(vs.validate.check(claim, runs=fresh))
        # The evidence is the quantity on the fresh texts, beside the shuffled rule and other neurons.
        for claim in family.claims:
            evidence, part = ledger.evidence(claim)[-1], vs.validate.part_of(claim)
            rule = {"rule": claim.parameters["rule"]}
            assert evidence.effects == pytest.approx(FIRES_WHERE.measure(fresh, part, rule).tolist())
            shuffled = FIRES_WHERE.nulls(fresh, part, rule)["shuffled"]
            assert evidence.nulls["shuffled"] == pytest.approx(shuffled.tolist())
            assert evidence.control is not None
            assert ledger.verdict(claim).n == len(fresh.data)
    assert "fires more" in said[0].sentence


def test_a_rule_that_the_part_does_not_follow_is_refuted(model: vs.Model, corpus: vs.Corpus, tmp_path: Path) -> None:
    whole = replace(corpus, splits=("discovery",) * 12 + ("validation",) * 12)
    part, rule = vs.neuron(1, 3), {"word": ["zebra"], "at": 0}
    with vs.Ledger(tmp_path / "ledger.sqlite") as ledger:
        runs = Runs(model, ledger.open(whole, "discovery"))
        claim = vs.describe.claim_about(runs, part, "fires_where", {"rule": rule}, size=0.5)
        family = ledger.register([claim])
        ledger.append(vs.validate.check(family.claims[0], model=model, data=ledger.open(whole, "validation")))
        verdict = ledger.verdict(family.claims[0])
    assert (verdict.outcome, verdict.reason) == ("REFUTED", "absent")


# --- what else a rule predicts


@pytest.fixture(scope="module")
def units() -> tuple[vs.Model, vs.Corpus, list[vs.Part]]:
    """Two units of the same words, one of others, and two of noise."""
    clean = [PlantedUnit((2, 3), 8.0, writes=0.25), PlantedUnit((2, 3), 8.0), PlantedUnit((5, 6), 8.0)]
    model = text_network(clean)
    ids = PlantedText(frequency=0.05).draw(160, 32, 0)
    splits = ["discovery"] * 80 + ["validation"] * 80
    groups = {"document": [str(row) for row in range(160)]}
    return model, vs.Corpus(vs.Tokens(ids), groups, splits=splits), [vs.neuron(0, number) for number in range(5)]


def said_of(units: tuple[vs.Model, vs.Corpus, list[vs.Part]], *predicts: str) -> tuple[LearnedRules, Any]:
    model, corpus, parts = units
    discovery = corpus.split("discovery")
    seen = vs.describe.collect_examples(model, discovery.tokens, parts, bos="none", sink=vs.silent)
    rules = LearnedRules(seen, predicts=predicts)
    setting = Discovery.of(Runs(model, discovery), parts, study="rules")
    return rules, {part: rules.describe(setting, part) for part in parts}


def test_what_holds_on_discovery_is_claimed_and_a_rule_that_fits_the_neighbour_is_not_claimed_to_tell_them_apart(
    units: tuple[vs.Model, vs.Corpus, list[vs.Part]],
) -> None:
    rules, said = said_of(units, "fires_where", "auroc", "fuzzing", "told_apart", "stands_in")
    first, twin, other = units[2][:3]
    assert rules.neighbour(first) == twin
    assert [one.quantity for one in said[first].predictions] == ["fires_where", "auroc", "fuzzing", "stands_in"]
    assert said[first].note == "; the rule fits layers.0.mlp_post[1] about as well"
    assert said[first].sentence.endswith("; the rule fits layers.0.mlp_post[1] about as well.")
    # It writes nothing, so that nothing is lost without it; no other unit fires on its words.
    assert [one.quantity for one in said[other].predictions] == ["fires_where", "auroc", "fuzzing", "told_apart"]
    assert said[units[2][4]] is None
    assert all(one.fits for one in said.values() if one is not None)


def test_the_claims_of_a_rule_about_several_quantities_stand_on_fresh_texts(
    units: tuple[vs.Model, vs.Corpus, list[vs.Part]], tmp_path: Path
) -> None:
    model, corpus, parts = units
    _, said = said_of(units, "fires_where", "auprc", "simulation", "detection", "told_apart", "stands_in")
    with vs.Ledger(tmp_path / "ledger.sqlite") as ledger:
        setting = Discovery.of(Runs(model, ledger.open(corpus, "discovery")), parts, study="rules")
        made = [said[part] for part in (parts[0], parts[2])]
        family = ledger.register([claim for one in made for claim, _ in claims_of(one, setting)])
        fresh = Runs(model, ledger.open(corpus, "validation"))
        vs.validate.prepare(family.claims, fresh)
        for claim in family.claims:
            ledger.append(vs.validate.check(claim, runs=fresh))
        outcomes = {
            (str(claim.subject["name"]), claim.quantity): ledger.verdict(claim).outcome for claim in family.claims
        }
    assert set(outcomes.values()) == {"SUPPORTED"}, outcomes
    assert ("layers.0.mlp_post[2]", "told_apart") in outcomes
    assert ("layers.0.mlp_post[0]", "stands_in") in outcomes


def test_the_tokens_that_a_unit_promotes_are_claimed_where_its_rule_picks(
    units: tuple[vs.Model, vs.Corpus, list[vs.Part]],
) -> None:
    model, corpus, parts = units
    assert model.adapter is not None
    # Its residual stream is the logits, without a norm between.
    plain = vs.Model(model.module, model.tokenizer, replace(model.adapter, direct=True), name="plain")
    _, said = said_of((plain, corpus, parts), "fires_where", "promotes")
    (_, promotes) = said[parts[0]].predictions
    assert promotes.parameters["tokens"][0] == 1
    assert promotes.parameters["words"][0] == " w1"
    assert promotes.parameters["rest"] == pytest.approx(0.4, abs=0.3)  # its mean: it fires on 5 % of tokens
    assert promotes.mean > 0.2
    assert [one.quantity for one in said[parts[2]].predictions] == ["fires_where"]  # writes nothing
    _, unsaid = said_of(units, "fires_where", "promotes")
    assert [one.quantity for one in unsaid[parts[0]].predictions] == ["fires_where"]


@pytest.mark.parametrize("predicts", [("total_effect",), ()])
def test_a_rule_predicts_what_is_about_rules(predicts: tuple[str, ...]) -> None:
    with pytest.raises(UnknownNameError, match="unknown quantity that a rule predicts"):
        LearnedRules(planted(lambda t, i: False), predicts=predicts)
