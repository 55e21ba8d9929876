"""Gemma 3 270M itself, where `make gemma` has put its weights: the converted model reads and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vesalius as vs
from vesalius.metric import next_token_loss_of

FILE = Path(__file__).parent.parent / ".gemma" / "gemma-3-270m-q4_k_m.gguf"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FILE.exists(), reason="make gemma installs the weights")]
STORY = (
    "The sun had just risen over the quiet village when the old baker opened his shop. He had been awake since four, "
    "kneading the dough and heating the oven, and now the smell of fresh bread drifted down the narrow street. "
    "Children on their way to school stopped at the window, and their mothers, who were in a hurry, pulled them along."
)


@pytest.fixture(scope="module")
def gemma() -> Any:
    return vs.load(FILE)


@pytest.mark.parametrize(
    ("prompt", "word", "within"),
    [
        ("The capital of France is", " Paris", 3),
        ("The capital of Germany is", " Berlin", 3),
        ("The opposite of hot is", " cold", 1),
        ("When Mary and John went to the store, John gave a drink to", " Mary", 1),
    ],
)
def test_it_answers(gemma: vs.Model, prompt: str, word: str, within: int) -> None:
    best = gemma.run(gemma.tokens(prompt, bos="<bos>")).logits[0, -1].topk(within).indices
    assert word in [gemma.tokenizer.decode([token]) for token in best.tolist()]


def test_english_is_as_likely_as_a_small_model_finds_it(gemma: vs.Model) -> None:
    tokens = gemma.tokens(STORY, bos="<bos>")
    assert 2.0 < float(next_token_loss_of(gemma.run(tokens).logits, tokens)) < 4.0


def test_windows_and_rotations_are_gemma_3s(gemma: vs.Model) -> None:
    config = gemma.module.config
    assert [n for n, kind in enumerate(config.layer_types) if kind == "full_attention"] == [5, 11, 17]
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 10_000
    assert (config.sliding_window, config.query_pre_attn_scalar) == (512, 256)


def test_a_sweep_of_it_passes_its_check(gemma: vs.Model) -> None:
    pairs = vs.data.ioi(gemma, n=4).split("discovery")
    scores = vs.sweep(gemma, pairs, sites="layers.*.z", each="head")
    assert scores.values.shape == (18, 4, 4)
    assert float(scores.effects.abs().max()) > 0.5
