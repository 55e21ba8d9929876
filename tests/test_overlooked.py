"""What the model loses without a part: exactly, and by one gradient for all of them."""

from __future__ import annotations

import pytest
import torch

import tiny
import vesalius as vs
from vesalius.describe import overlooked
from vesalius.errors import InputError
from vesalius.metric import next_token_loss_of
from vesalius.toys import PlantedText, PlantedUnit, text_network

UNITS = [vs.neuron(0, number) for number in range(6)]


@pytest.fixture(scope="module")
def runs() -> vs.Runs:
    """Unit 0 knows what follows its words; unit 1 fires as often and tells nobody; unit 2 writes the wrong word."""
    given = [
        PlantedUnit((2, 3), 4.0, writes=0.5),
        PlantedUnit((2, 3), 4.0),
        PlantedUnit((2, 3), 4.0, writes=0.5, target=60),
    ]
    return vs.Runs(text_network(given), vs.Corpus(vs.Tokens(PlantedText(frequency=0.1).draw(60, 48, 0))))


def test_what_helps_comes_first_and_what_hurts_last(runs: vs.Runs) -> None:
    found = overlooked(runs, UNITS, most=3)
    assert found.parts[0] == UNITS[0] and found.costs[0].low > 0
    assert UNITS[2] in found.parts and found.costs[found.parts.index(UNITS[2])].high < 0
    assert abs(float(found.estimates[1])) < 1e-6
    assert -1 <= found.agreement <= 1
    assert "nats a token" in found._repr_html_()


def test_the_cost_is_that_of_a_plain_run_and_the_estimate_is_its_slope() -> None:
    """By finite differences: a millionth of the way from its values to its mean."""
    model, tokens = tiny.model("llama"), tiny.pairs(6).tokens("clean")
    runs, part = vs.Runs(model, vs.Corpus(tokens)), vs.neuron(1, 5)
    values = model.run(tokens, capture=[part.writes[0].whole])[part.writes[0].whole][..., 5]
    rest = float(values[tokens.real].double().mean())

    def loss(share: float) -> torch.Tensor:
        edit = vs.Patch(part, source=values + share * (rest - values))
        return next_token_loss_of(model.run(tokens, interventions=[edit]).logits, tokens).double()

    found = overlooked(runs, [part], most=1)
    assert found.costs[0].estimate == pytest.approx(float((loss(1) - loss(0)).mean()), abs=1e-6)
    slope = float((loss(0.02) - loss(-0.02)).mean()) / 0.04
    assert float(found.estimates[0]) == pytest.approx(slope, rel=0.02, abs=1e-6)


def test_what_is_explained_is_left_out_and_prompts_in_pairs_are_refused(runs: vs.Runs) -> None:
    assert UNITS[0] not in overlooked(runs, UNITS, [UNITS[0]], most=6).parts
    with pytest.raises(InputError, match="on texts"):
        overlooked(vs.Runs(tiny.model("gpt2"), tiny.pairs(4)), UNITS)
