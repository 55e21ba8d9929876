"""Prompts that a model should get wrong: made as they are said to be, and counted as they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vesalius as vs
from vesalius.describe import claim_about, foretold
from vesalius.errors import InputError
from vesalius.quantities import FAILS_WHERE, Contrast, Runs
from vesalius.toys import PlantedText, PlantedUnit, text_network

UNIT, RULE, LENGTH = vs.neuron(0, 0), {"word": ["w2", "w3"], "at": 0}, 6
GIVEN = {"rule": RULE, "until": LENGTH + 1}


@pytest.fixture(scope="module")
def texts() -> Runs:
    model = text_network([PlantedUnit((2, 3), 8.0)])
    return Runs(model, vs.Corpus(vs.Tokens(PlantedText(frequency=0.05).draw(60, 48, 0))))


def prompts(n: int = 20, bos: str = "") -> vs.Pairs:
    clean = torch.randint(4, 60, (n, 7), generator=torch.Generator().manual_seed(1))
    corrupted = clean.clone()
    corrupted[:, 3] = 61
    lengths = 5 + torch.arange(n) % 3
    answers = torch.full((n,), 1), torch.full((n,), 60)
    return vs.Pairs(clean, corrupted, *answers, lengths=lengths, read=lengths - 1, bos=bos)


@pytest.mark.parametrize("bos", ["", "w9"])
def test_every_prompt_comes_behind_a_piece_of_each_kind(texts: Runs, bos: str) -> None:
    pairs, first = prompts(bos=bos), int(bool(bos))
    made = foretold(texts, UNIT, RULE, pairs, threshold=4.0, length=LENGTH)
    n = len(pairs)
    assert len(made) == 2 * n
    assert torch.equal(made.at, torch.cat([pairs.at, pairs.at]) + LENGTH)
    assert made.groups["prompt"][:n] == made.groups["prompt"][n:]
    own = torch.cat([pairs.clean, pairs.clean])
    rest = torch.cat([made.clean[:, :first], made.clean[:, first + LENGTH :]], 1)
    assert torch.equal(rest, own)
    pieces = made.clean[:, first : first + LENGTH]
    assert torch.equal(pieces, made.corrupted[:, first : first + LENGTH])
    chosen = torch.isin(pieces, torch.tensor([2, 3]))
    assert bool(chosen[:n, -1].all()) and not bool(chosen[n:].any())


def test_a_model_that_is_wrong_behind_the_words_is_found_and_one_that_is_not_is_refuted(texts: Runs) -> None:
    made = foretold(texts, UNIT, RULE, prompts(150), threshold=4.0, length=LENGTH)
    kind = (torch.arange(300) < 150).float()

    def outcome(wrong: torch.Tensor) -> str:
        runs = Runs(texts.model, Contrast.of(made), components=["layers.0.mlp_out"], check=False)
        runs.once(("metric", "clean"), lambda: 1 - 2 * wrong)
        values = FAILS_WHERE.measure(runs, UNIT, GIVEN)
        shares = [float(wrong[kind == one].mean()) for one in (1, 0)]
        assert float(values.mean()) == pytest.approx(shares[0] - shares[1], abs=1e-6)
        claim = claim_about(runs, UNIT, FAILS_WHERE, GIVEN, size=0.4)
        evidence = vs.validate.check(replace(claim, sign=1), runs=runs)
        return vs.decide([replace(claim, sign=1)], {replace(claim, sign=1).id: evidence})[0].outcome

    draw = torch.rand(300, generator=torch.Generator().manual_seed(3))
    assert outcome((draw < 0.1 + 0.8 * kind).float()) == "SUPPORTED"
    assert outcome((draw < 0.2).float()) == "REFUTED"


def test_what_cannot_be_made_or_measured_is_refused(texts: Runs) -> None:
    with pytest.raises(InputError, match="no piece of 6 tokens of the kind 'planted'"):
        foretold(texts, UNIT, {"word": ["zebra"], "at": 0}, prompts(), threshold=4.0, length=LENGTH)
    with pytest.raises(InputError, match="taken from a corpus"):
        foretold(Runs(texts.model, Contrast.of(prompts())), UNIT, RULE, prompts())
    with pytest.raises(InputError, match="cannot be lengthened"):
        foretold(texts, UNIT, RULE, replace(prompts(), named_positions={"here": torch.zeros(20, dtype=torch.long)}))
    assert FAILS_WHERE.refuses(texts, UNIT) == "prompts with answers are needed"
