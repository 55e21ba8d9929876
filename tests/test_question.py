"""A question has both splits, shares nothing between them that was sampled, and is refused early when it cannot be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import solvable
import tiny
import vesalius as vs
from tiny_folder import tiny_folder
from vesalius.errors import FileFormatError, PairsError, UnknownNameError
from vesalius.studies.question import Question, check_question, example_texts, question_for, sampling_groups


def with_group(kind: str, labels: list[str]) -> vs.Pairs:
    pairs = solvable.random_pairs(16)
    return replace(pairs, groups={**pairs.groups, kind: tuple(labels)})


@pytest.mark.parametrize("kind", ["order", "gender", "group"])
def test_a_condition_that_both_splits_share_is_no_group(kind: str) -> None:
    pairs = sampling_groups(with_group(kind, ["ab", "ba"] * 8))
    assert sorted(pairs.groups) == ["names", "template"]


def test_a_kind_of_its_own_in_each_split_stays_a_group() -> None:
    pairs = with_group("subject", [f"s{row}" for row in range(16)])
    assert sampling_groups(pairs).groups == pairs.groups


@pytest.mark.parametrize("kind", ["template", "names", "entity"])
def test_sampled_things_that_both_splits_share_are_refused(kind: str) -> None:
    labels = [f"x{row}" for row in range(16)]
    labels[15] = labels[2]
    with pytest.raises(PairsError, match=rf"{kind} 'x2' occurs in the discovery and in the validation split.*disjoint"):
        sampling_groups(with_group(kind, labels))


def test_single_names_count_not_only_their_pairs() -> None:
    labels = [f"a{row}|b{row}" for row in range(16)]
    labels[12] = "other|b3"
    with pytest.raises(PairsError, match="names 'b3' occurs in the discovery and in the validation split"):
        sampling_groups(with_group("names", labels))


def test_pairs_without_splits_are_refused() -> None:
    with pytest.raises(PairsError, match="a study needs discovery and validation"):
        sampling_groups(tiny.pairs())


def test_a_question_needs_both_splits() -> None:
    pairs = solvable.random_pairs(16)
    with pytest.raises(PairsError, match="corruption 'a' have no validation split; a study needs both"):
        Question("q", "?", {"a": pairs.split("discovery")})
    with pytest.raises(PairsError, match="no discovery and no validation split"):
        Question("q", "?", {"a": replace(pairs, splits=())})
    with pytest.raises(PairsError, match="at least one corruption; got none"):
        Question("q", "?", {})


def test_a_question_needs_a_few_pairs_in_each_split() -> None:
    pairs = solvable.random_pairs(16).subset([0, 1, 2, 8, 9, 10, 11])
    with pytest.raises(PairsError, match="the discovery split has 3 pairs; a study needs at least 4"):
        Question("q", "?", {"a": pairs})


def test_an_unknown_question_lists_the_known() -> None:
    model = tiny.model("llama", layers=1)
    for refuse in (check_question, lambda what: question_for(what, model)):
        with pytest.raises(UnknownNameError, match=r"unknown question 'iio'; known: capitals, .*ioi.*\.jsonl or \.csv"):
            refuse("iio")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=f"there is no file {tmp_path}/mine.jsonl"):
        check_question(str(tmp_path / "mine.jsonl"))
    check_question("ioi")


def test_the_user_s_own_pairs_make_a_question(tmp_path: Path) -> None:
    model = vs.load(tiny_folder(tmp_path))
    rows = [
        {"clean": f"{a}{b}=1;", "corrupted": f"{b}{a}=1;", "answer": a, "distractor": b, "template": f"{a}.."}
        for a, b in zip("acegikmo", "bdfhjlnp", strict=True)
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    question = question_for(str(path), model, bos="none")
    assert (question.name, question.main, question.sizes) == ("mine", "corrupted", {"discovery": 4, "validation": 4})
    texts = example_texts(question, model)
    shown = next(row for row in rows if row["clean"] == texts["clean"])
    assert (texts["corrupted"], texts["answer"]) == (shown["corrupted"], shown["answer"])


def test_a_question_of_token_ids_shows_them() -> None:
    model = tiny.model("llama", layers=1)
    texts = example_texts(solvable.random_question(model), model)
    assert texts["clean"].split()[0].isdigit()


def test_the_plan_of_a_question_is_its_content() -> None:
    model = tiny.model("llama", layers=1)
    plan = solvable.random_question(model).plan()
    assert plan == solvable.random_question(model).plan()
    assert plan != solvable.random_question(model, wrong=(3,)).plan()
