"""Trained networks do what they were trained for, by the mechanism that is known of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vesalius as vs
from vesalius.errors import InputError, UnknownNameError
from vesalius.seeds import generator_for
from vesalius.toys import (
    KEYS,
    TRAINED,
    ModularAddition,
    every_pair,
    explained_by,
    frequencies,
    induction_scores,
    is_balanced,
    trained,
    trained_pairs,
)
from vesalius.toys.trained import balanced_rows, induction_rows, siit_label, siit_rows


@pytest.mark.parametrize("name", TRAINED)
def test_trained_networks_answer_their_pairs(name: str) -> None:
    model, pairs = trained(name), trained_pairs(name, 96)
    clean, corrupted = (vs.logit_diff(model.run(pairs.tokens(side)).logits, pairs) for side in ("clean", "corrupted"))
    assert float((clean > 0).float().mean()) >= 0.99
    assert float((corrupted < clean).float().mean()) >= 0.99


def test_an_unknown_one_is_refused() -> None:
    for make in (trained, trained_pairs):
        with pytest.raises(UnknownNameError, match="trained network"):
            make("other")


# --- induction (Olsson et al. 2022)


def test_induction_heads_have_the_pattern_that_gives_them_their_name() -> None:
    model = trained("induction")
    rows, repeated = induction_rows(64, generator_for("test"))
    run = model.run(rows, capture=["layers.*.q", "layers.*.k"])
    each = torch.nn.functional.cross_entropy(run.logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none")
    # A tenth of ln V, where a model that knows nothing has ln V.
    assert float(each[repeated[:, 1:]].mean()) < 0.1 * torch.tensor(32.0).log()
    first, second = (_patterns(model, run, layer) for layer in range(2))
    position = torch.arange(rows.shape[1])
    previous = first[:, :, position[3:], position[2:-1]].mean((0, 2))
    assert float(previous.max()) > 0.4
    assert float(induction_scores(second, rows).max()) > 0.5
    # Chance: as much as falls on one of the tokens before.
    assert float(induction_scores(first, rows).max()) < 0.5


def _patterns(model: vs.Model, run: vs.Run, layer: int) -> Tensor:
    q, k = run[f"layers.{layer}.q"], run[f"layers.{layer}.k"]
    scores = torch.einsum("eqhd,ekhd->ehqk", q, k) * q.shape[-1] ** -0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1)


# --- brackets


def test_balance_is_what_it_is() -> None:
    rows = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 1], [1, 0, 0, 1], [0, 0, 0, 1]])
    assert is_balanced(rows).tolist() == [True, True, False, False]


def test_the_classifier_is_right_on_fresh_rows() -> None:
    rows, balanced = balanced_rows(400, generator_for("test"))
    said = trained("brackets").run(rows).logits[:, 0].argmax(1).bool()
    assert float((said == balanced).float().mean()) >= 0.98


# --- strict interchange intervention training (Gupta et al. 2024)


def test_the_two_heads_hold_the_two_variables() -> None:
    """Interchange intervention accuracy of both, on fresh rows."""
    model, draw = trained("siit"), generator_for("test")
    base, source = siit_rows(300, draw), siit_rows(300, draw)
    for head, place in ((0, 1), (1, 2)):
        site = f"layers.0.z[{head}]"
        other = model.run(source, capture=[site])
        run = model.run(base, interventions=[vs.Interchange(site, source=other.activations)])
        mixed = base.clone()
        mixed[:, place] = source[:, place]
        assert float((run.logits[:, -1].argmax(1) == siit_label(mixed)).float().mean()) >= 0.99


def test_no_other_part_matters() -> None:
    model, pairs = trained("siit"), trained_pairs("siit", 96)
    parts = ["layers.0.mlp_out", "layers.1.z[0]", "layers.1.z[1]"]
    scores = vs.sweep(model, pairs, sites=parts, base="clean", sink=vs.silent)
    total = float((scores.base - scores.source).mean())
    assert float(scores.effects.abs().mean(1).max()) < 0.01 * total
    inside = vs.sweep(model, pairs, sites=["layers.0.z[0]", "layers.0.z[1]"], base="clean", sink=vs.silent)
    assert float(inside.effects.abs().mean(1).min()) > 0.2 * total


# --- modular addition by hand


def test_modular_addition_is_right_everywhere_and_its_keys_are_found() -> None:
    made = ModularAddition()
    assert made.first.shape == (2, 113, 45)
    inputs = every_pair(113)
    with torch.no_grad():
        logits = made(inputs)
    assert int((logits.argmax(1) == inputs.sum(1) % 113).sum()) == 12_769
    top = logits.topk(2, 1).values
    torch.testing.assert_close(
        top[:, 0] - top[:, 1], torch.full((12_769,), 1.20509, dtype=torch.float64), rtol=0, atol=1e-5
    )
    assert explained_by(logits, 113, KEYS) == pytest.approx(1.0, abs=1e-10)
    assert explained_by(logits, 113, KEYS[:4]) < 0.9
    for weights in (made.first[0], made.first[1], made.second.T):
        assert frequencies(weights.detach()) == KEYS


@pytest.mark.parametrize("keys", [(), (3, 3), (0, 1), (60,)])
def test_keys_that_are_none_are_refused(keys: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="keys are different numbers"):
        ModularAddition(113, keys)
