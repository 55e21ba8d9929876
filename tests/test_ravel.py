"""RAVEL: on a network with two attributes along known directions, latents for one of them swap that one only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vesalius as vs
from test_concepts import coder
from vesalius.concepts import DasConfig, Entities, load_ravel, ravel, ravel_subspaces
from vesalius.concepts.entities import prompt_pairs, says_after, slopes
from vesalius.concepts.ravel import disentanglement
from vesalius.errors import FileFormatError, InputError, UnknownNameError
from vesalius.inputs import Tokens
from vesalius.site import Site

SITE = Site("module", module="middle")
PEOPLE = [f"e{number}" for number in range(32)]
COLOURS, SIZES = ["red", "blue", "green", "grey"], ["big", "small", "tiny", "huge"]
WORDS = ["<s>", *PEOPLE, *COLOURS, *SIZES, "colour", "size", "of", "the"]
NUMBER = {word: number for number, word in enumerate(WORDS)}
SPLITS = ("train", "test")


class Tokenizer:
    """Words apart by spaces."""

    bos_token, eos_token, unk_token, pad_token = "<s>", None, None, None
    all_special_tokens = ("<s>",)
    unk_token_id = None

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [NUMBER[word] for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(WORDS[number] for number in ids)

    def convert_tokens_to_ids(self, token: Any) -> Any:
        return NUMBER[token] if isinstance(token, str) else [NUMBER[one] for one in token]

    def get_added_vocab(self) -> dict[str, int]:
        return {"<s>": 0}

    def get_vocab(self) -> dict[str, int]:
        return dict(NUMBER)


def facts(person: int) -> dict[str, str]:
    return {"colour": COLOURS[person % 4], "size": SIZES[person // 4 % 4]}


class Knows(nn.Module):
    """ "colour of the e3" -> its colour. A person's vector holds colour (4 of 12 dimensions), size (4) and noise (4);
    the sum over the prompt is read along what the first word asks for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(len(WORDS), 14)
        self.middle = nn.Identity()
        with torch.no_grad():
            self.table.weight.zero_()
            for person, word in enumerate(PEOPLE):
                self.table.weight[NUMBER[word], person % 4] = 1.0
                self.table.weight[NUMBER[word], 4 + person // 4 % 4] = 1.0
                self.table.weight[NUMBER[word], 8 + person % 3] = 0.5
            self.table.weight[NUMBER["colour"], 12] = self.table.weight[NUMBER["size"], 13] = 1.0

    def forward(self, ids: Tensor) -> Tensor:
        whole = self.middle(self.table(ids)).cumsum(1)
        logits = torch.zeros(*ids.shape, len(WORDS))
        for start, words, asked in ((0, COLOURS, 12), (4, SIZES, 13)):
            for number, word in enumerate(words):
                logits[..., NUMBER[word]] = whole[..., start + number] * whole[..., asked]
        return logits


@pytest.fixture(scope="module")
def model() -> vs.Model:
    return vs.Model(Knows().eval(), tokenizer=Tokenizer(), adapter=None)


@pytest.fixture(scope="module")
def people() -> Entities:
    prompts = {name: (f"{name} of the %s", f"the {name} of %s") for name in ("colour", "size")}
    values = {person: facts(number) for number, person in enumerate(PEOPLE)}
    return Entities("city", prompts, values, {person: SPLITS[n % 5 > 2] for n, person in enumerate(PEOPLE)})


def axes(*which: int) -> Tensor:
    return torch.eye(14)[list(which)]


def test_the_closed_form() -> None:
    assert disentanglement([0.8, 0.6], [1.0, 0.4]) == pytest.approx(0.7)


def test_pairs_are_of_one_template_and_differ_in_what_the_model_says(model: vs.Model, people: Entities) -> None:
    found = prompt_pairs(model, people, "colour", "train", 60, 0)
    assert len(found) == 60
    for row in range(len(found)):
        base, source = (side.ids[row].tolist() for side in (found.base, found.source))
        at = int(found.base_at[row])
        assert base[:at] == source[:at] and base[at] != source[at]
        assert WORDS[base[at]] == found.entities[row]
        assert people.splits[found.entities[row]] == "train"
        assert WORDS[int(found.base_says[row])] == people.values[found.entities[row]]["colour"]
        assert found.base_says[row] != found.source_says[row]


def test_changes_at_the_entity_are_those_of_a_plain_run(model: vs.Model, people: Entities) -> None:
    swaps = prompt_pairs(model, people, "size", "test", 20, 0)
    change = torch.randn(20, 14, generator=torch.Generator().manual_seed(0))
    said = says_after(model, SITE, swaps, change, batch=7)
    net = model.module
    for row in range(20):
        ids = swaps.base.ids[row, : int(swaps.base.lengths[row])]
        total = (net.table(ids).detach().sum(0) + change[row]).tolist()
        scores = dict.fromkeys(WORDS, 0.0)
        scores |= {word: total[n] * total[12] for n, word in enumerate(COLOURS)}
        scores |= {word: total[4 + n] * total[13] for n, word in enumerate(SIZES)}
        assert scores[WORDS[int(said[row])]] == max(scores.values())


def test_slopes_are_finite_differences(model: vs.Model, people: Entities) -> None:
    swaps = prompt_pairs(model, people, "colour", "test", 5, 0)
    found = slopes(model, SITE, swaps)
    rows = torch.arange(5)

    def gap(change: Tensor) -> Tensor:
        edit = vs.Replace(SITE, SITE, fn=lambda whole: _added(whole, swaps.base_at, change), ref="t")
        logits = model.run(Tokens(swaps.base.ids), interventions=[edit]).logits[rows, swaps.base.lengths - 1]
        return logits[rows, swaps.source_says] - logits[rows, swaps.base_says]

    for axis in range(14):
        step = 1e-2 * torch.eye(14)[axis].expand(5, -1)
        assert torch.allclose((gap(step) - gap(-step)) / 2e-2, found[:, axis], atol=1e-3)


def _added(whole: Tensor, at: Tensor, change: Tensor) -> Tensor:
    edited = whole.clone()
    edited[torch.arange(len(at)), at] += change
    return edited


def test_latents_of_one_attribute_swap_it_and_nothing_else(model: vs.Model, people: Entities) -> None:
    apart = coder(axes(*range(12)), in_sites=(SITE,), out_sites=(SITE,))
    found = ravel(apart, people, ("colour", "size"), model, n=60, ks=(1, 4, 8))
    assert found["latents: disentanglement"].value == 1.0
    assert found["latents: disentanglement"].k == 4
    assert found["coordinates: disentanglement"].value == 1.0
    # Everything swapped: the right answer to the wrong question too.
    assert found["everything: cause"].value == 1.0
    assert found["everything: isolation"].value < 0.5
    assert found["random: disentanglement"].value < 0.9


def test_latents_that_mix_attributes_do_not_and_several_dictionaries_have_a_spread(
    model: vs.Model, people: Entities
) -> None:
    apart = coder(axes(*range(12)), in_sites=(SITE,), out_sites=(SITE,))
    pairs = torch.stack([axes(n)[0] + axes(4 + m)[0] for n in range(4) for m in range(4)])
    mixed = coder(pairs, encoder=pairs, b_enc=torch.full((16,), -1.5), in_sites=(SITE,), out_sites=(SITE,))
    found = ravel([apart, mixed], people, ("colour", "size"), model, n=60, ks=(4, 16))
    one, other = found["latents: disentanglement"].values
    assert one == 1.0
    assert other < 0.8
    assert found["latents: disentanglement"].spread == pytest.approx((one - other) / 2**0.5)
    line = found["latents: disentanglement"]
    assert line.low is not None and line.high is not None and line.low <= line.value <= line.high


def test_a_search_that_leaves_the_other_attribute_alone_finds_the_planted_subspace(
    model: vs.Model, people: Entities
) -> None:
    config = DasConfig(rank=4, steps=80, batch_size=32, lr=0.05)
    found = ravel_subspaces(model, SITE, people, ("colour", "size"), config=config, n=60)
    scores = {line.method: line.value for line in found.lines}
    assert scores["multi-task das: disentanglement"] == 1.0
    # Means of the four colours differ along three directions, and in sizes only as far as pairs are uneven.
    assert scores["probe: disentanglement"] > 0.9
    assert scores["das: cause"] == 1.0
    assert scores["multi-task das: isolation"] >= scores["das: isolation"]
    assert scores["random subspace: disentanglement"] < 0.8
    assert scores["everything: cause"] == 1.0
    assert scores["everything: isolation"] < 0.5


def test_what_cannot_be_asked_is_refused(model: vs.Model, people: Entities) -> None:
    apart = coder(axes(*range(12)), in_sites=(SITE,), out_sites=(SITE,))
    with pytest.raises(UnknownNameError, match="unknown attribute of city 'age'; known: colour, size"):
        ravel(apart, people, ("colour", "age"), model)
    wrong = Entities("city", people.prompts, {p: {"colour": "pink", "size": "odd"} for p in PEOPLE}, people.splits)
    with pytest.raises(InputError, match="knows colour in 0 prompts of city, no two of one template"):
        ravel(apart, wrong, ("colour", "size"), model)
    with pytest.raises(UnknownNameError, match="known: test, train, val"):
        people.of_split("all")


def test_the_files_of_ravel_are_read(tmp_path: Path) -> None:
    tables: dict[str, Any] = {
        "attribute_to_prompts": {"Country": ["%s is in", "%s or %s", "in"]},
        "entity_attributes": {"Oslo": {"Country": "Norway"}, "Rome": {"Country": "Italy"}},
        "entity_to_split": {"Oslo": "train", "Rome": "test"},
    }
    for name, table in tables.items():
        (tmp_path / f"ravel_city_{name}.json").write_text(json.dumps(table))
    found = load_ravel(tmp_path)
    assert found.prompts == {"Country": ("%s is in",)}  # one place for the entity
    assert found.of_split("test") == ("Rome",)
    with pytest.raises(UnknownNameError, match="kind of entity 'town'"):
        load_ravel(tmp_path, "town")
    with pytest.raises(FileFormatError, match=r"there is no file .*ravel_verb_attribute"):
        load_ravel(tmp_path, "verb")
    (tmp_path / "ravel_city_entity_to_split.json").write_text('{"Oslo": "train"}')
    with pytest.raises(FileFormatError, match="'Rome' has no split"):
        load_ravel(tmp_path)
    (tmp_path / "ravel_city_attribute_to_prompts.json").write_text('{"Country": "no list"}')
    with pytest.raises(FileFormatError, match="is not a table of RAVEL: prompts must be lists"):
        load_ravel(tmp_path)


def test_changing_nothing_scores_half(model: vs.Model, people: Entities) -> None:
    swaps = {name: prompt_pairs(model, people, name, "test", 40, 0) for name in ("colour", "size")}
    said = {name: says_after(model, SITE, side, torch.zeros(len(side), 14)) for name, side in swaps.items()}
    cause = [float((said[name] == side.source_says).double().mean()) for name, side in swaps.items()]
    isolation = [float((said[name] == side.base_says).double().mean()) for name, side in swaps.items()]
    assert disentanglement(cause, isolation) == 0.5
    assert np.mean(isolation) == 1.0
