"""Labelled texts: read from files, refused by line, divided so that no group is in both halves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vesalius.data import Labelled, load_labelled
from vesalius.errors import FileFormatError, InputError

TEXTS = tuple(f"text {number}" for number in range(40))


def made(labels: str = "ab" * 20, **changes: object) -> Labelled:
    return Labelled("set", TEXTS, tuple(labels), **changes)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.2, 0.25, 0.5]), st.integers(1, 4))
def test_halves_hold_every_text_once_and_no_group_twice(seed: int, share: float, size: int) -> None:
    found = made(groups=tuple(str(number // size) for number in range(40)))
    training, testing = found.halves(share, seed)
    assert sorted([*training, *testing]) == [*range(40)]
    assert {found.groups[n] for n in training} & {found.groups[n] for n in testing} == set()
    for label in found.classes:
        held = sum(found.labels[n] == label for n in testing)
        assert abs(held - share * 20) <= size


def test_marks_are_divided_alike_within_each_label() -> None:
    found = made(marks=tuple("xxyy" * 10))
    _, testing = found.halves(0.4)
    cells = [(found.labels[n], found.marks[n]) for n in testing]
    assert sorted(cells.count(cell) for cell in set(cells)) == [4, 4, 4, 4]


def test_the_same_seed_divides_alike_and_another_does_not() -> None:
    one, same, other = (made().halves(seed=seed)[1].tolist() for seed in (0, 0, 1))
    assert one == same != other


def test_equal_texts_are_never_divided() -> None:
    found = Labelled("set", ("x", "y", "z", "w", "v", "u") * 4, ("a", "b") * 12)
    training, testing = found.halves(0.4)
    assert {found.texts[n] for n in training} & {found.texts[n] for n in testing} == set()


def test_of_two_labels_one_is_the_target_and_of_more_every_one() -> None:
    assert made().targets == ("b",)
    assert made("abcd" * 10).targets == ("a", "b", "c", "d")
    assert made().of("a").tolist() == [True, False] * 20


def test_files_of_both_kinds_say_the_same(tmp_path: Path) -> None:
    rows = [{"text": f'a, "{number}"', "label": number % 2, "group": f"g{number // 2}"} for number in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    quoted = [f'"a, ""{number}""",{number % 2},g{number // 2}' for number in range(12)]
    (tmp_path / "b.csv").write_text("text,label,group\n" + "\n".join(quoted))
    one, other = load_labelled(tmp_path / "a.jsonl"), load_labelled(tmp_path / "b.csv")
    assert one.content_hash == other.content_hash
    assert (one.name, one.groups[3], one.labels[3]) == ("a", "g1", "1")


def test_arrays_and_other_delimiters_say_the_same(tmp_path: Path) -> None:
    rows = [{"text": f"a, {number}", "label": str(number % 2)} for number in range(12)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    cells = [("text", "label"), *((row["text"], row["label"]) for row in rows)]
    (tmp_path / "b.csv").write_text("\n".join(map(";".join, cells)))
    (tmp_path / "c.tsv").write_text("\n".join(map("\t".join, cells)))
    assert len({load_labelled(tmp_path / name).content_hash for name in ("a.json", "b.csv", "c.tsv")}) == 1


def test_bad_rows_are_listed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": "a", "label": " " if n % 2 else 1.5}) for n in range(4)))
    with pytest.raises(
        InputError, match=r"(?s)a.jsonl: 4 of 4 texts cannot be used\n.*line 1: label must.*line 2: label is"
    ):
        load_labelled(path)


def test_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "cities.csv"
    path.write_text("statement,true,city,male\n" + "\n".join(f"s{n},{n % 2},c{n},{n % 3 > 0:d}" for n in range(12)))
    found = load_labelled(path, text="statement", label="true", group="city", mark="male")
    assert (found.texts[1], found.labels[1], found.groups[1], found.marks[1]) == ("s1", "1", "c1", "1")
    with pytest.raises(
        FileFormatError, match=r"cities.csv lacks text, label. Found: statement, true, city, male. Name"
    ):
        load_labelled(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty: it needs one text a line, with text, label"),
        ('{"text": "a"}\n{"text": "b", "label": 1}', "line 1 has no label"),
        ('{"text": 3, "label": "x"}', "line 1: text must be text, got 3"),
        ('{"text": "a", "label": " "}', "line 1: label is empty"),
        ('{"text": "a", "label": 1.5}', "label must be text, got 1.5"),
        ("[1]", "line 1 is not a JSON object with text, label"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_by_line(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=words):
        load_labelled(path)


def test_sets_that_cannot_be_probed_are_refused() -> None:
    with pytest.raises(InputError, match="at least two labels are needed, with 4 texts each; got a 40"):
        made("a" * 40)
    with pytest.raises(InputError, match="got a 37, b 3"):
        made("a" * 37 + "bbb")
    with pytest.raises(InputError, match="39 labels for 40 texts"):
        Labelled("set", TEXTS, tuple("ab" * 20)[:-1])
    with pytest.raises(InputError, match="text 1 is empty"):
        Labelled("set", ("a", " "), ("a", "b"))
    with pytest.raises(InputError, match="too few groups of texts to have 'a' in both"):
        made(groups=("one",) * 40).halves()
    with pytest.raises(InputError, match="between 0 and 1; got 1"):
        made().halves(1)
