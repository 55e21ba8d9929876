"""Tokens and Pairs hold together or say which pair does not; hashes see what matters and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import families
import tiny
import vesalius as vs
from vesalius.data.texts import texts_from
from vesalius.errors import InputError, PairsError, UnknownNameError

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def pairs(**changes: Any) -> vs.Pairs:
    corrupted = IDS.clone()
    corrupted[:, 1] = 3
    given = {"clean": IDS, "corrupted": corrupted, "answer": torch.tensor([1, 2]), "distractor": torch.tensor([2, 1])}
    return vs.Pairs(**{**given, **changes})


# --------------------------------------------------------------------------------------------------------------- tokens


def test_rows_are_padded_on_the_right() -> None:
    tokens = vs.Tokens.from_rows([[4, 5], [6, 7, 8]], pad=1)
    assert tokens.ids.tolist() == [[4, 5, 1], [6, 7, 8]]
    assert tokens.real.tolist() == [[True, True, False], [True, True, True]]
    assert tokens.lengths.tolist() == [2, 3]
    assert vs.Tokens.from_rows([[4, 5], [6, 7]]).mask is None


def test_the_hash_sees_real_tokens_and_not_the_padding() -> None:
    one, other = vs.Tokens.from_rows([[4, 5], [6, 7, 8]], pad=1), vs.Tokens.from_rows([[4, 5], [6, 7, 8]], pad=0)
    assert one.content_hash == other.content_hash
    assert one.content_hash != vs.Tokens.from_rows([[6, 7, 8], [4, 5]]).content_hash
    assert one.content_hash != vs.Tokens.from_rows([[4, 5, 1], [6, 7, 8]]).content_hash


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vs.Tokens(torch.zeros(2, 3)), r"must be int64 token ids \[batch, pos\]; got torch.float32 \(2, 3\)"),
        (lambda: vs.Tokens(torch.zeros(3, dtype=torch.long)), "must be int64 token ids"),
        (lambda: vs.Tokens(torch.zeros(2, 0, dtype=torch.long)), r"ids is empty: shape \(2, 0\)"),
        (lambda: vs.Tokens(torch.tensor([[1, -4]])), r"ids holds a negative token id \(-4\)"),
        (lambda: vs.Tokens(IDS, torch.ones(2, 3).bool()), r"mask has shape \(2, 3\), ids \(2, 4\); they must be equal"),
        (lambda: vs.Tokens.from_rows([]), "no tokens: give at least one prompt"),
        (lambda: vs.Tokens.from_rows([[1], []]), "none of them empty"),
    ],
)
def test_what_is_no_batch_of_tokens_is_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


# ---------------------------------------------------------------------------------------------------------------- pairs


def test_lengths_and_the_read_position_default_to_the_whole_prompt() -> None:
    made = pairs()
    assert made.size.tolist() == [4, 4]
    assert made.at.tolist() == [3, 3]
    assert pairs(lengths=torch.tensor([3, 4])).at.tolist() == [2, 3]
    assert made.tokens("clean").mask is None


def test_tokens_of_either_side_carry_the_mask() -> None:
    made = pairs(lengths=torch.tensor([3, 4]))
    for which in ("clean", "corrupted"):
        tokens = made.tokens(which)
        assert torch.equal(tokens.ids, getattr(made, which))
        assert torch.equal(tokens.real, made.real)
    with pytest.raises(UnknownNameError, match="unknown prompts 'dirty'; known: clean, corrupted"):
        made.tokens("dirty")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": torch.tensor([1, 1]), "distractor": torch.tensor([2, 1])}, "pair 1: answer equals distractor"),
        (
            {"corrupted": torch.tensor([[5, 3, 7, 8], [9, 10, 11, 12]])},
            "pair 1: clean and corrupted prompts are identical",
        ),
        ({"lengths": torch.tensor([5, 4])}, "pair 0: length out of range"),
        ({"lengths": torch.tensor([4, 0])}, "pair 1: length out of range"),
        ({"read": torch.tensor([3, 4])}, "pair 1: read position past the end"),
        ({"read": torch.tensor([-1, 2])}, "pair 0: read position past the end"),
        ({"lengths": torch.tensor([4, 1])}, "pair 1: clean and corrupted prompts are identical"),
        ({"corrupted": IDS[:, :3]}, r"clean is \(2, 4\) and corrupted \(2, 3\): pairs must be aligned"),
        ({"answer": torch.tensor([1, 2, 3])}, r"answer must be int64 \[2\], one per pair; got torch.int64 \(3,\)"),
        ({"answer": torch.tensor([1.0, 2.0])}, r"answer must be int64 \[2\], one per pair; got torch.float32"),
        ({"groups": {"template": ("a",)}}, "group 'template' has 1 labels for 2 pairs"),
        ({"splits": ("discovery",)}, "group 'splits' has 1 labels for 2 pairs"),
    ],
)
def test_what_is_no_pair_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PairsError, match=message):
        pairs(**changes)


def test_prompts_that_are_no_token_ids_are_named() -> None:
    with pytest.raises(InputError, match="corrupted must be int64 token ids"):
        pairs(corrupted=IDS.float())


LABELS = {"groups": {"template": ("a", "b"), "name": ("x", "y")}, "splits": ("discovery", "validation")}


def test_a_split_takes_its_rows_with_everything_that_belongs_to_them() -> None:
    made = pairs(**LABELS, lengths=torch.tensor([4, 3]), read=torch.tensor([3, 2]), corruption="swap", task="t")
    assert made.split_names == ("discovery", "validation")
    part = made.split("validation")
    assert (len(part), part.splits, part.groups) == (1, ("validation",), {"template": ("b",), "name": ("y",)})
    assert part.clean.tolist() == [IDS[1].tolist()]
    assert (part.answer.tolist(), part.size.tolist(), part.at.tolist()) == ([2], [3], [2])
    assert (part.corruption, part.task) == ("swap", "t")


def test_a_split_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(UnknownNameError, match="unknown split 'test'; known: discovery, validation"):
        pairs(**LABELS).split("test")
    with pytest.raises(UnknownNameError, match="these pairs have no splits"):
        pairs().split("discovery")


def test_a_subset_keeps_the_order_asked_for() -> None:
    made = tiny.pairs()
    part = made.subset([4, 1])
    assert torch.equal(part.clean, made.clean[[4, 1]])
    assert part.example_hashes == (made.example_hashes[4], made.example_hashes[1])
    assert made.subset(range(6)).content_hash == made.content_hash


def test_the_same_clean_prompt_is_the_same_example_whatever_the_corruption() -> None:
    one, other = pairs(), pairs(corrupted=IDS.flip(1), corruption="flip", answer=torch.tensor([7, 8]))
    assert one.example_hashes == other.example_hashes
    assert one.content_hash != other.content_hash
    assert len(set(one.example_hashes)) == 2


def test_an_examples_hash_does_not_see_its_padding() -> None:
    wide = torch.nn.functional.pad(IDS, (0, 2), value=1)
    corrupted = torch.nn.functional.pad(pairs().corrupted, (0, 2), value=0)
    assert pairs(clean=wide, corrupted=corrupted, lengths=torch.tensor([4, 4])).example_hashes == pairs().example_hashes


@pytest.mark.parametrize(
    "change",
    [
        {"answer": torch.tensor([1, 3])},
        {"read": torch.tensor([2, 3])},
        {"lengths": torch.tensor([4, 3])},
        {"splits": ("a", "b")},
        {"groups": {"template": ("a", "b")}},
        {"corruption": "swap"},
        {"clean": IDS + 20},
    ],
)
def test_the_content_hash_sees_every_field(change: dict[str, Any]) -> None:
    assert pairs(**change).content_hash != pairs().content_hash
    assert pairs(**change).content_hash == pairs(**change).content_hash


# ---------------------------------------------------------------------------------------------------------- activations


def test_activations_are_a_read_only_mapping_in_forward_order() -> None:
    found = vs.Activations(
        {vs.Site("z", 1): torch.arange(24.0).view(1, 2, 3, 4), vs.Site("embed"): torch.zeros(1, 2, 5)}
    )
    assert [str(site) for site in found] == ["embed", "layers.1.z"]
    assert torch.equal(found["layers.1.z[2]"], found["layers.1.z"][:, :, 2])
    assert "layers.1.z[2]" in found
    assert "layers.2.z" not in found
    assert "no site at all" not in found
    assert len(found) == 2
    assert repr(found) == "Activations(embed [1, 2, 5], layers.1.z [1, 2, 3, 4])"
    with pytest.raises(TypeError):
        found[vs.Site("embed")] = torch.zeros(1)  # type: ignore[index]
    with pytest.raises(UnknownNameError, match=r"unknown captured site 'layers.2.z'; known: embed, layers.1.z"):
        found["layers.2.z"]


# ------------------------------------------------------------------------------- too long, or in another form


@pytest.mark.parametrize(
    "name, most",
    [("gpt2", 64), ("opt", 64), ("gpt_neo", 64), ("gptj", 64), ("bert", 64), ("albert", 64), ("roberta", 67)],
)
def test_a_prompt_past_the_table_of_positions_is_refused(name: str, most: int) -> None:
    model = vs.Model(families.FAMILIES[name].build() if name != "gpt2" else tiny.gpt2())
    ids = torch.randint(2, 50, (2, most + 1), generator=torch.Generator().manual_seed(0))
    assert model.run(ids[:, :most]).logits.shape[1] == most
    with pytest.raises(InputError, match=f"{most + 1} tokens are more than the {most} that .* has positions for"):
        model.run(ids)


def test_positions_that_are_computed_have_no_end() -> None:
    assert tiny.model("llama").run(torch.ones(1, 100, dtype=torch.long)).logits.shape[1] == 100


def test_writing_past_the_table_of_positions_is_refused_before_it_begins() -> None:
    model = vs.Model(tiny.gpt2())
    assert len(model.generate(torch.ones(1, 60, dtype=torch.long), 5).new[0]) == 5
    with pytest.raises(InputError, match="65 tokens are more than the 64"):
        model.generate(torch.ones(1, 60, dtype=torch.long), 6)


@pytest.mark.parametrize("as_given", [torch.tensor, np.array, list])
def test_a_tokenizers_output_is_taken_as_it_is(as_given: Any) -> None:
    model = tiny.model("llama")
    ids, mask = [[5, 6, 7], [8, 9, 1]], [[1, 1, 1], [1, 1, 0]]
    encoding = {"input_ids": as_given(ids), "attention_mask": as_given(mask)}
    expected = model.run(vs.Tokens(torch.tensor(ids), torch.tensor(mask).bool())).logits
    assert torch.equal(model.run(encoding).logits, expected)


def test_a_tokenizers_output_of_several_lengths_is_padded() -> None:
    found = vs.Tokens.from_encoding({"input_ids": [[5, 6, 7], [8]], "attention_mask": [[1, 1, 1], [1]]})
    assert found.lengths.tolist() == [3, 1]
    assert len(vs.Tokens.from_encoding({"input_ids": [5, 6], "token_type_ids": [0, 0]})) == 1


@pytest.mark.parametrize("more", [{"position_ids": torch.tensor([[3, 4]])}, {"token_type_ids": [[0, 1]]}])
def test_an_encoding_with_more_than_is_held_is_refused(more: Any) -> None:
    with pytest.raises(InputError, match="may hold attention_mask, decoder_input_ids; got input_ids, "):
        vs.Tokens.from_encoding({"input_ids": torch.tensor([[5, 6]]), **more})


def test_tokens_where_texts_are_wanted_are_refused_or_read_as_tokens() -> None:
    encoding = {
        "input_ids": torch.tensor([[5, 6, 7], [8, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
    }
    rows = [[5, 6, 7], [8]]
    assert list(texts_from(encoding).read()) == rows
    assert list(texts_from(vs.Tokens.from_encoding(encoding)).read()) == rows
    with pytest.raises(InputError, match="give one entry of this dict: train, test"):
        texts_from({"train": ["a"], "test": ["b"]})
    wordy = vs.Model(tiny.llama(), tokenizer=object())
    for tokens in (encoding, encoding["input_ids"]):
        with pytest.raises(
            InputError, match=r"texts must be a str or a list of str; got \w+; tokens need no tokenizer"
        ):
            wordy.tokens(tokens)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"ids must be .* got dict; Tokens.from_encoding reads a tokenizer's output"):
        vs.Tokens(encoding)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"clean must be .* got dict; Tokens.from_encoding"):
        vs.Pairs(encoding, encoding, torch.ones(2), torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a Corpus takes Tokens"):
        vs.Corpus(encoding)  # type: ignore[arg-type]
