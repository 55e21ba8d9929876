"""Synthesis of texts: against brute force where that is possible, and against the corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import vesalius as vs
from tiny_folder import tiny_folder
from vesalius.describe import Synthesis, synthesise
from vesalius.describe.synthesis import _Found
from vesalius.errors import InputError, UnknownNameError
from vesalius.jobs import Event


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> vs.Model:
    return tiny.model(request.param, layers=2)


def made(model: vs.Model, part: Any, **options: Any) -> Synthesis:
    return synthesise(model, part, **{"length": 3, "steps": 4, "sink": vs.silent, **options})


@pytest.mark.parametrize(("at", "steps"), [("last", 1), ("max", 1), ("sum", 3)])
def test_on_a_linear_unit_the_optimum_of_the_vocabulary_is_found(model: vs.Model, at: str, steps: int) -> None:
    vector = torch.randn(48, generator=torch.Generator().manual_seed(3))
    direction = vs.Direction("embed", vector)
    everything = model.module.get_input_embeddings().weight.detach() @ direction.vector
    found = made(model, direction, at=at, steps=steps, weights=(0.0,), candidates=1)
    best = float(everything.max()) * (3 if at == "sum" else 1)
    assert found.best.value == pytest.approx(best, rel=1e-5)
    assert int(everything.argmax()) in found.best.ids


def test_the_search_is_better_than_as_many_random_texts(model: vs.Model) -> None:
    draw = torch.Generator().manual_seed(5)
    random = torch.randint(tiny.VOCAB, (1000, 6), generator=draw)
    run = model.run(vs.Tokens(random), capture=["layers.1.mlp_post"])
    for neuron in (vs.neuron(1, 0), vs.neuron(1, 1)):
        found = made(model, neuron, length=6, steps=20, weights=(0.0,), candidates=8)
        assert found.cost.naive < 1000
        assert found.best.value > 1.1 * float(neuron.value(run)[:, -1].max())


def test_values_and_cross_entropies_are_those_of_plain_runs(model: vs.Model) -> None:
    neuron = vs.neuron(1, 5)
    found = made(model, neuron)
    for one in found.front:
        run = model.run(vs.Tokens(torch.tensor([one.ids])), capture=neuron.reads)
        assert one.value == pytest.approx(float(neuron.value(run)[0, -1]), abs=1e-4)
        plain = torch.nn.functional.cross_entropy(run.logits[0, :-1], torch.tensor(one.ids[1:]))
        assert one.cross_entropy == pytest.approx(float(plain), abs=1e-4)


def test_the_front_goes_from_strong_to_fluent_and_fluency_has_a_price(model: vs.Model) -> None:
    found = made(model, vs.neuron(1, 5), length=5, steps=10, weights=(0.0, 0.3, 3.0))
    values, entropies = ([getattr(one, name) for one in found.front] for name in ("value", "cross_entropy"))
    assert values == sorted(values, reverse=True)
    assert entropies == sorted(entropies, reverse=True)
    assert len(found.front) > 2
    assert entropies[-1] < entropies[0] - 0.5


def test_only_texts_that_nothing_beats_are_on_the_front() -> None:
    value, entropy = torch.tensor([3.0, 3.0, 2.0, 1.0, 4.0, 0.5]), torch.tensor([2.0, 1.0, 1.5, 0.5, torch.nan, 0.7])
    front = _Found(torch.arange(6)[:, None], value, entropy).front()
    assert front.ids[:, 0].tolist() == [1, 3]


def test_the_largest_activation_never_falls_and_the_seed_decides(model: vs.Model) -> None:
    first, again, other = (made(model, vs.neuron(0, 2), steps=6, seed=seed) for seed in (0, 0, 1))
    assert list(first.history) == sorted(first.history)
    assert first.front == again.front
    assert first.front != other.front


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> vs.Model:
    return vs.load(tiny_folder(tmp_path_factory.mktemp("model")))


def test_it_says_whether_the_corpus_is_beaten(reader: vs.Model) -> None:
    texts = ["the cat sat on the mat " * 5, "12 hens and the fox " * 12]
    part = vs.neuron(1, 2)
    examples = vs.describe.collect_examples(reader, texts, [part], context=20, sink=vs.silent)
    strong = made(reader, part, length=6, steps=15, examples=examples)
    assert strong.corpus_max == pytest.approx(examples[0].top[0].value)
    assert strong.beats_corpus is True
    assert "which beats the corpus's maximum" in repr(strong)
    weak = made(reader, part, length=1, steps=1, candidates=1, weights=(100.0,), examples=examples)
    assert weak.beats_corpus == (weak.best.value > examples[0].top[0].value)
    assert ("does not beat" in weak.verdict) == (not weak.beats_corpus)
    alone = made(reader, part)
    assert alone.beats_corpus is None
    assert "compared with no corpus" in alone._repr_html_()
    assert list(alone.to_frame()["value"]) == [one.value for one in alone.front]


def test_texts_begin_as_the_corpus_does_and_hold_no_special_tokens(reader: vs.Model) -> None:
    found = made(reader, vs.neuron(1, 2), length=4)
    special = set(reader.tokenizer.all_special_ids)
    bos = reader.tokenizer.bos_token_id
    for one in found.front:
        assert not special & set(one.ids)
        run = reader.run(vs.Tokens(torch.tensor([[bos, *one.ids]])), capture=["layers.1.mlp_post"])
        assert one.value == pytest.approx(float(vs.neuron(1, 2).value(run)[0, -1]), abs=1e-4)
        again = reader.tokenizer.encode(one.text, add_special_tokens=False)
        assert one.survives == (tuple(again) == one.ids)


def test_the_cost_is_said_before_the_search(model: vs.Model) -> None:
    heard: list[Event] = []
    made(model, vs.neuron(0, 2), sink=heard.append)
    assert heard[0].kind == "note"
    assert "forward passes" in heard[0].message
    assert [event.done for event in heard if event.kind == "advance"] == [1, 2, 3, 4]


def test_what_cannot_be_synthesised_is_refused(model: vs.Model, reader: vs.Model, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown place 'first'"):
        made(model, vs.neuron(0, 2), at="first")
    with pytest.raises(InputError, match="must be at least 1"):
        made(model, vs.neuron(0, 2), length=0)
    with pytest.raises(InputError, match="numbers at each position"):
        made(model, vs.Unit(vs.Site.parse("layers.1.mlp_out")))
    examples = vs.describe.collect_examples(reader, ["the cat sat"], [vs.neuron(1, 2)], context=20, sink=vs.silent)
    with pytest.raises(InputError, match="of another model"):
        made(model, vs.neuron(1, 2), examples=examples)
