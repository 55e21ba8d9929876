"""Scores of a rule against other implementations, their standard errors against fresh draws, and effects by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score

import vesalius as vs
from vesalius.errors import InputError
from vesalius.quantities import (
    AUPRC,
    AUPRC_BALANCED,
    AUROC,
    DETECTION,
    FUZZING,
    PROMOTES,
    SIMULATION,
    STANDS_IN,
    TOLD_APART,
    Quantity,
)
from vesalius.quantities.fires_where import picked
from vesalius.quantities.rule_effects import levels
from vesalius.toys.text import PlantedText, PlantedUnit, text_network

RULE = {"word": ["w2", "w3"], "at": 0}
SUBJECT, OTHER, COPY = vs.neuron(0, 0), vs.neuron(0, 1), vs.neuron(0, 2)
UNITS = [PlantedUnit((2, 3), 1.5, writes=0.5), PlantedUnit((5, 6), 1.5), PlantedUnit(copy_of=0)]
GIVEN = {
    "rule": RULE, "threshold": 1.5, "neighbour": OTHER.ref, "neighbour_threshold": 1.5, "tokens": [1], "rest": 0.0,
}  # fmt: skip
SCORES = (AUROC, AUPRC, AUPRC_BALANCED, SIMULATION, DETECTION, FUZZING, TOLD_APART)


def runs_of(seed: int = 0, texts: int = 60, documents: int | None = None, frequency: float = 0.05) -> vs.Runs:
    ids = PlantedText(frequency=frequency).draw(texts, 32, seed)
    mask = torch.arange(32)[None] < (20 + torch.arange(texts) % 13)[:, None]
    groups = {"document": [str(row % documents) for row in range(texts)]} if documents else {}
    return vs.Runs(text_network(UNITS, seed), vs.Corpus(vs.Tokens(ids, mask), groups), seed=seed)


@pytest.fixture(scope="module")
def runs() -> vs.Runs:
    return runs_of()


def counting(runs: vs.Runs) -> torch.Tensor:
    """All tokens but padding and the first of each text."""
    return runs.data.tokens.real & (torch.arange(32) > 0)


def flat(runs: vs.Runs, part: vs.Part = SUBJECT) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Whether the rule picks a token, and a part's value there: over all that count, read off by hand."""
    tokens, real = runs.data.tokens, counting(runs)
    values = runs.model.run(tokens, capture=[part.reads[0]])[part.reads[0].whole][..., part.writes[0].index]
    chosen = torch.isin(tokens.ids, torch.tensor([2, 3]))
    return chosen[real].numpy(), values[real].numpy()


def shares(a: Any, b: Any) -> float:
    """Difference of shares of a among b and among the others, from the balanced accuracy of a as a guess of b."""
    hits = [a[b].mean(), a[~b].mean()]
    return float(hits[0] - hits[1])


def balanced(chosen: Any, values: Any) -> float:
    """Average precision with tokens weighted so that both kinds weigh the same."""
    weight = np.where(chosen, 0.5 / chosen.mean(), 0.5 / (1 - chosen.mean()))
    return float(average_precision_score(chosen, values, sample_weight=weight))


EXPECTED: dict[str, Callable[[vs.Runs], float]] = {
    "auroc": lambda runs: roc_auc_score(*flat(runs)) - 0.5,
    "auprc": lambda runs: average_precision_score(*flat(runs)) - flat(runs)[0].mean(),
    "auprc_balanced": lambda runs: balanced(*flat(runs)) - 0.5,
    "simulation": lambda runs: pearsonr(*map(np.asarray, flat(runs)))[0],
    "fuzzing": lambda runs: shares(flat(runs)[0], flat(runs)[1] > 1.5),
}


@pytest.mark.parametrize("of", [AUROC, AUPRC, AUPRC_BALANCED, SIMULATION, FUZZING], ids=lambda of: of.name)
@pytest.mark.parametrize("documents", [None, 7])
def test_a_score_is_what_other_implementations_give_and_pseudo_values_average_to_it(
    of: Quantity, documents: int | None
) -> None:
    runs = runs_of(documents=documents)
    values = of.measure(runs, SUBJECT, GIVEN)
    assert runs.mean(values) == pytest.approx(EXPECTED[of.name](runs), abs=1e-6)
    if documents is not None:
        assert len(set(values.tolist())) == documents  # alike in all texts of a document


def test_detection_and_neighbours_are_shares_of_texts_and_tokens(runs: vs.Runs) -> None:
    tokens, real = runs.data.tokens, counting(runs)
    own, other = (
        torch.zeros(real.shape).masked_scatter(real, torch.tensor(flat(runs, part)[1])) > 1.5
        for part in (SUBJECT, OTHER)
    )
    chosen = torch.isin(tokens.ids, torch.tensor([2, 3])) & real
    guess, truth = chosen.any(1).numpy(), own.any(1).numpy()
    assert runs.mean(DETECTION.measure(runs, SUBJECT, GIVEN)) == pytest.approx(shares(guess, truth), abs=1e-9)
    # Balanced accuracy has the texts that the rule picks for its classes; both say how far the two agree.
    assert (balanced_accuracy_score(guess, truth) > 0.5) == (shares(guess, truth) > 0)
    apart = float(chosen[own].float().mean() - chosen[other & ~own].float().mean())
    assert runs.mean(TOLD_APART.measure(runs, SUBJECT, GIVEN)) == pytest.approx(apart, abs=1e-6)
    assert apart > 0.05


def test_a_copy_cannot_be_told_apart(runs: vs.Runs) -> None:
    assert TOLD_APART.measure(runs, SUBJECT, {**GIVEN, "neighbour": COPY.ref}).tolist() == [0.0] * runs.n


@pytest.mark.parametrize("of", SCORES, ids=lambda of: of.name)
def test_pseudo_values_are_those_of_the_jackknife(of: Quantity, runs: vs.Runs) -> None:
    """Leaving one text out, an implementation that knows nothing of influence functions."""
    values, n = of.measure(runs, SUBJECT, GIVEN), runs.n
    whole, left_out = runs.mean(values), []
    for row in range(n):
        rest = vs.Runs(runs.model, runs.data.subset([other for other in range(n) if other != row]))
        left_out.append(n * whole - (n - 1) * rest.mean(of.measure(rest, SUBJECT, GIVEN)))
    assert np.corrcoef(values.numpy(), left_out)[0, 1] > 0.98
    assert float(values.std()) == pytest.approx(float(np.std(left_out)), rel=0.15)


@pytest.mark.parametrize("of", SCORES, ids=lambda of: of.name)
def test_standard_errors_are_the_spread_over_fresh_texts(of: Quantity) -> None:
    found = [of.measure(runs_of(seed), SUBJECT, GIVEN) for seed in range(24)]
    spread = np.std([float(values.mean()) for values in found], ddof=1)
    stated = np.mean([float(values.std()) / len(values) ** 0.5 for values in found])
    assert stated == pytest.approx(spread, rel=0.4)


@pytest.mark.parametrize("of", SCORES, ids=lambda of: of.name)
def test_random_tokens_score_nothing_and_a_rule_without_a_token_says_nothing(of: Quantity) -> None:
    nulls = [float(of.nulls(runs_of(seed), SUBJECT, GIVEN)["shuffled"].mean()) for seed in range(12)]
    assert abs(np.mean(nulls)) < 4 * np.std(nulls) / 12**0.5
    nothing = of.measure(runs_of(), SUBJECT, {**GIVEN, "rule": {"word": ["zebra"], "at": 0}})
    assert nothing.abs().max() == 0.0


# --- effects


def by_hand(runs: vs.Runs, values: torch.Tensor | None) -> torch.Tensor:
    """Logits with the subject's values set by a plain hook."""
    units = runs.model.module.layers[0].mlp.units

    def hook(_module: Any, _args: Any, out: torch.Tensor) -> torch.Tensor:
        return out if values is None else torch.cat([values[..., None], out[..., 1:]], -1)

    handle = units.register_forward_hook(hook)
    with torch.no_grad():
        found: torch.Tensor = runs.model.module(runs.data.tokens.ids).logits
    handle.remove()
    return found


def loss_by_hand(runs: vs.Runs, values: torch.Tensor | None) -> torch.Tensor:
    tokens, found = runs.data.tokens, []
    chances = by_hand(runs, values).log_softmax(-1)
    for row in range(runs.n):
        length = int(tokens.real[row].sum())
        each = [-float(chances[row, at, tokens.ids[row, at + 1]]) for at in range(length - 1)]
        found.append(sum(each) / len(each))
    return torch.tensor(found).double()


def test_a_rule_stands_in_for_a_part_as_plain_hooks_have_it(runs: vs.Runs) -> None:
    some = picked(runs, RULE)
    on, off, mean = levels(runs, SUBJECT, some)
    expected = loss_by_hand(runs, torch.full(some.shape, mean)) - loss_by_hand(runs, torch.where(some, on, off))
    assert STANDS_IN.measure(runs, SUBJECT, GIVEN).numpy() == pytest.approx(expected.numpy(), abs=1e-5)
    fixed = STANDS_IN.measure(runs, SUBJECT, {**GIVEN, "on": on, "off": off, "mean": mean})
    assert fixed.numpy() == pytest.approx(expected.numpy(), abs=1e-5)
    assert float(expected.mean()) > 0.002
    assert abs(float(STANDS_IN.nulls(runs, SUBJECT, GIVEN)["shuffled"].mean())) < float(expected.mean()) / 2
    assert STANDS_IN.diagnostics(runs, SUBJECT, GIVEN)["loss_with_rule"] == pytest.approx(
        float(loss_by_hand(runs, torch.where(some, on, off)).mean()), abs=1e-5
    )


def test_what_a_part_promotes_is_as_plain_hooks_have_it(runs: vs.Runs) -> None:
    some = picked(runs, RULE)
    before, after = (by_hand(runs, values).log_softmax(-1)[..., 1] for values in (None, torch.zeros(some.shape)))
    expected = ((before - after) * some).sum(1) / some.sum(1).clamp_min(1)
    assert PROMOTES.measure(runs, SUBJECT, GIVEN).numpy() == pytest.approx(expected.numpy(), abs=1e-5)
    assert float(expected.mean()) > 0.2
    assert float(PROMOTES.measure(runs, OTHER, GIVEN).mean()) == pytest.approx(0.0, abs=1e-6)  # writes nothing
    assert float(PROMOTES.nulls(runs, SUBJECT, GIVEN)["shuffled"].mean()) < 0.0


@pytest.mark.parametrize("of", [STANDS_IN, PROMOTES], ids=lambda of: of.name)
def test_each_control_is_put_to_its_own_values(of: Quantity, runs: vs.Runs) -> None:
    control = {"rule": "one other", "parts": [str(OTHER)]}
    assert of.control(runs, SUBJECT, GIVEN, control).abs().max() < 1e-6  # it writes nothing
    matched = of.matched(runs, SUBJECT, [SUBJECT], GIVEN)
    assert len(matched.parts) == 3
    assert matched.rule.startswith("the nearest 3 of 8 neurons of the same layer")


def test_rules_need_a_tokenizer(runs: vs.Runs) -> None:
    mute = vs.Model(runs.model.module, adapter=runs.model.adapter)
    with pytest.raises(InputError, match="has no tokenizer"):
        vs.validate.check(claim(AUROC, mute), runs=vs.Runs(mute, runs.data))


def claim(of: Quantity, model: vs.Model) -> vs.Claim:
    subject = {**SUBJECT.ref, "name": str(SUBJECT), "model_hash": model.content_hash}
    return vs.Claim(
        statement="fires", subject=subject, quantity=of.name, parameters=GIVEN, kind=of.kind, delta=0.01, scale=1.0,
        scale_name=of.scale, n=60,
    )  # fmt: skip


@pytest.mark.parametrize("of", [*SCORES, STANDS_IN, PROMOTES], ids=lambda of: of.name)
def test_every_score_and_effect_becomes_evidence_of_a_claim(of: Quantity, runs: vs.Runs) -> None:
    one = claim(of, runs.model)
    evidence = vs.validate.check(one, runs=runs)
    assert evidence.effects == pytest.approx(of.measure(runs, SUBJECT, GIVEN).tolist())
    assert set(evidence.nulls) == {"shuffled"}
    assert of.phrase(GIVEN)
