from __future__ import annotations

import csv
import json
import pickle
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vesalius.data import load_pairs
from vesalius.data.files import subsample
from vesalius.data.tasks.base import SPLITS
from vesalius.errors import FileFormatError, InputError, PairsError, TokenizerError, UnknownNameError

NAMES = ("Anna", "Paul", "Mary", "John", "Kate", "Tom", "Lucy", "Mark")
WHERE = ("market", "station", "garden", "school")


def tiny_tokenizer() -> Any:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    words = [*NAMES, *NAMES, *WHERE, "At", "the", "met", "and", "gave", "it", "to", "walk"]
    core.train_from_iterator([f" {w}" for w in words] * 3 + list(NAMES) * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|endoftext|>")


MODEL = SimpleNamespace(tokenizer=tiny_tokenizer())


def record(i: int, **fields: Any) -> dict[str, Any]:
    a, b = NAMES[i % 8], NAMES[(i + 1 + i // 8) % 8]
    place = WHERE[i % len(WHERE)]
    start = f"At the {place} {a} met {b} and"
    return {
        "clean": f"{start} {b} gave it to",
        "corrupted": f"{start} {a} gave it to",
        "answer": f" {a}",
        "distractor": f" {b}",
        "template": place,
        "names": f"{a}|{b}",
        **fields,
    }


RECORDS = [record(i) for i in range(16)]


def write(path: Path, records: list[dict[str, Any]], delimiter: str = ",") -> Path:
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else delimiter)
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def without(records: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in names} for r in records]


# --- what is read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".JSONL"])
def test_a_file_gives_back_its_prompts_answers_and_groups(tmp_path: Path, suffix: str) -> None:
    pairs = load_pairs(write(tmp_path / f"mine{suffix}", RECORDS), MODEL)
    decode = MODEL.tokenizer.decode
    for i, source in enumerate(RECORDS):
        size = int(pairs.size[i])
        assert decode(pairs.clean[i, :size]) == "<|endoftext|>" + source["clean"]
        assert decode(pairs.corrupted[i, :size]) == "<|endoftext|>" + source["corrupted"]
        assert decode([int(pairs.answer[i])]) == source["answer"]
        assert decode([int(pairs.distractor[i])]) == source["distractor"]
    assert pairs.groups == {key: tuple(r[key] for r in RECORDS) for key in ("template", "names")}
    assert (pairs.task, pairs.corruption, pairs.bos) == ("mine", "corrupted", "<|endoftext|>")


def test_answers_of_several_tokens_are_read_from_a_file(tmp_path: Path) -> None:
    records = [{**r, "answer": f"{r['answer']} and Kate"} if i in (1, 4) else r for i, r in enumerate(RECORDS)]
    pairs = load_pairs(write(tmp_path / "p.jsonl", records), MODEL)
    assert pairs.answer.shape == pairs.distractor.shape == (16, 3)
    for ids, source in zip(pairs.answer, records, strict=True):
        assert MODEL.tokenizer.decode(ids[ids >= 0]) == source["answer"]


def test_all_formats_give_equal_pairs(tmp_path: Path) -> None:
    found = {
        load_pairs(write(tmp_path / f"p{s}", RECORDS), MODEL).content_hash for s in (".jsonl", ".json", ".csv", ".tsv")
    }
    for delimiter in (";", "\t"):
        found.add(load_pairs(write(tmp_path / "p.csv", RECORDS, delimiter), MODEL).content_hash)
    assert len(found) == 1


def test_the_delimiter_is_found_in_the_header_whatever_the_cells_hold(tmp_path: Path) -> None:
    records = [
        {**r, "clean": f"{r['clean']}, and; it, to", "corrupted": f"{r['corrupted']}, and; it, to"} for r in RECORDS
    ]
    for delimiter in (",", ";", "\t"):
        path = write(tmp_path / "p.csv", records, delimiter)
        pairs = load_pairs(path, MODEL, bos="none")
        assert MODEL.tokenizer.decode(pairs.clean[3, : int(pairs.size[3])]) == records[3]["clean"]


def test_names_of_columns_may_be_spaced_out(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", RECORDS, ";")
    header, _, rows = path.read_text().partition("\n")
    path.write_text(header.replace(";", " ; ") + "\n" + rows)
    assert len(load_pairs(path, MODEL)) == 16


def test_a_byte_order_mark_and_empty_lines_are_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(r) for r in RECORDS), encoding="utf-8")
    assert len(load_pairs(path, MODEL)) == 16


def test_bos_and_corruption_are_passed_on(tmp_path: Path) -> None:
    pairs = load_pairs(write(tmp_path / "p.jsonl", RECORDS), MODEL, bos="none", corruption="swap")
    assert (pairs.bos, pairs.corruption) == ("none", "swap")
    assert MODEL.tokenizer.decode([int(pairs.clean[0, 0])]) == "At"


def test_group_columns_are_found_by_name_or_as_listed(tmp_path: Path) -> None:
    records = [{**r, "group_place": i % 3, "group": "x", "note": "n"} for i, r in enumerate(RECORDS)]
    path = write(tmp_path / "p.jsonl", records)
    assert set(load_pairs(path, MODEL).groups) == {"template", "names", "group", "group_place"}
    assert load_pairs(path, MODEL).groups["group_place"][:4] == ("0", "1", "2", "0")
    assert set(load_pairs(path, MODEL, groups=["note", "template"]).groups) == {"note", "template"}
    with pytest.raises(FileFormatError, match="lacks speaker"):
        load_pairs(path, MODEL, groups=["speaker"])


def test_missing_groups_are_warned_about(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", without(RECORDS, "template", "names"))
    with pytest.warns(
        UserWarning, match=r"no group columns \(found: clean, .*intervals will assume independent prompts"
    ):
        assert load_pairs(path, MODEL).groups == {}


def test_answers_glued_to_the_prompt_are_warned_about(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{**r, "answer": r["answer"].strip()} for r in RECORDS])
    with pytest.warns(
        UserWarning, match=r"16 of 16 answers have no leading space, first in p.jsonl, line 1: .*write ' Anna'"
    ):
        load_pairs(path, MODEL)


# --- splits ----------------------------------------------------------------------------------------------------


def test_given_splits_are_kept(tmp_path: Path) -> None:
    given = ["validation" if i < 5 else "discovery" for i in range(16)]
    path = write(tmp_path / "p.csv", [{**r, "split": s} for r, s in zip(RECORDS, given, strict=True)])
    assert load_pairs(path, MODEL).splits == tuple(given)


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    given = ["test", *["discovery", "validation"] * 8]
    path = write(tmp_path / "p.csv", [{**r, "split": s} for r, s in zip(RECORDS, given, strict=False)])
    with pytest.raises(UnknownNameError, match=r"unknown split \(p.csv, line 2\) 'test'; known: discovery, validation"):
        load_pairs(path, MODEL)


def test_whole_templates_are_divided_about_half_and_half(tmp_path: Path) -> None:
    pairs = load_pairs(write(tmp_path / "p.jsonl", RECORDS), MODEL)
    assert Counter(pairs.splits) == {"discovery": 8, "validation": 8}
    templates = [set(pairs.split(s).groups["template"]) for s in ("discovery", "validation")]
    assert not templates[0] & templates[1]
    assert len(templates[0]) == len(templates[1]) == 2


def test_splits_do_not_depend_on_the_order_of_the_rows(tmp_path: Path) -> None:
    shuffled = random.Random(1).sample(RECORDS, len(RECORDS))
    one, two = (load_pairs(write(tmp_path / f"{i}.jsonl", r), MODEL) for i, r in enumerate((RECORDS, shuffled)))
    assert dict(zip(one.example_hashes, one.splits, strict=True)) == dict(
        zip(two.example_hashes, two.splits, strict=True)
    )


def test_without_templates_the_other_group_is_divided_and_without_groups_the_prompts(tmp_path: Path) -> None:
    named = [{**r, "names": NAMES[i % 8]} for i, r in enumerate(without(RECORDS, "template"))]
    pairs = load_pairs(write(tmp_path / "named.jsonl", named), MODEL)
    names = [set(pairs.split(s).groups["names"]) for s in ("discovery", "validation")]
    assert not names[0] & names[1]
    bare = without(RECORDS, "template", "names")
    twice = [*bare, *({**r, "answer": " the", "distractor": " to"} for r in bare)]
    with pytest.warns(UserWarning, match="no group columns"):
        pairs = load_pairs(write(tmp_path / "bare.jsonl", twice), MODEL)
    assert pairs.splits[:16] == pairs.splits[16:]
    assert Counter(pairs.splits) == {"discovery": 16, "validation": 16}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{**r, "template": "one"} for r in RECORDS], "has 16 pairs in 1 groups of 'template'; at least"),
        (RECORDS[:3], "has 3 pairs in 3 groups of 'template'; at least 4 pairs"),
    ],
)  # fmt: skip
def test_too_little_to_divide_is_refused(tmp_path: Path, records: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(PairsError, match=message):
        load_pairs(write(tmp_path / "p.jsonl", records), MODEL)


def test_a_prompt_in_both_splits_is_refused(tmp_path: Path) -> None:
    records = [{**r, "split": "discovery"} for r in RECORDS] + [{**RECORDS[2], "split": "validation"}]
    with pytest.raises(
        PairsError, match=r"line 17 \(validation\) repeats the clean prompt of p.jsonl, line 3 \(discovery\)"
    ):
        load_pairs(write(tmp_path / "p.jsonl", records), MODEL)


# --- what is refused -------------------------------------------------------------------------------------------


def test_files_that_cannot_be_pairs_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileFormatError, match=f"there is no file {tmp_path}/none.jsonl"):
        load_pairs("none.jsonl", MODEL)
    (tmp_path / "dir.jsonl").mkdir()
    with pytest.raises(FileFormatError, match=f"{tmp_path}/dir.jsonl is a directory"):
        load_pairs("dir.jsonl", MODEL)
    write(tmp_path / "pairs.txt", RECORDS)
    with pytest.raises(
        FileFormatError, match=r"pairs.txt ends in '.txt'; pairs are read from .jsonl, .json, .csv or .tsv"
    ):
        load_pairs("pairs.txt", MODEL)


@pytest.mark.parametrize("suffix", [".pkl", ".pt"])
def test_a_pickle_is_refused_unopened(tmp_path: Path, suffix: str) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "ran").touch, ())

    path = tmp_path / f"pairs{suffix}"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(FileFormatError, match="pickled files can run code"):
        load_pairs(path, MODEL)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b"", "p.jsonl is empty"),
        ("p.csv", b"clean,corrupted,answer,distractor\n", "p.csv is empty"),
        ("p.jsonl", b'{"clean": "a"}\n{"clean": \n', "p.jsonl, line 2 is not JSON"),
        ("p.jsonl", b'["a", "b"]\n', "p.jsonl, line 1 is not a JSON object"),
        ("p.jsonl", b'{"clean": "a", "text": "b"}\n', "lacks corrupted, .*Found: clean, text. Needed: clean,"),
        ("p.csv", b"clean,answer\na,b\n", "lacks corrupted, distractor. Found: clean, answer"),
        ("p.csv", b"clean,corrupted,answer,distractor\na,b,c,d,e\n", "2 has more fields .* quote text with commas"),
        ("p.csv", b"clean;corrupted;answer;distractor\na;b;c;d;e\n", "2 has more fields .* quote text with semicolons"),
        ("p.tsv", b"clean\tcorrupted\nb\n", "lacks answer, distractor. Found: clean, corrupted. Needed"),
        ("p.json", b"", "p.json is empty"),
        ("p.json", b" [ ] ", "p.json is empty"),
        ("p.json", b'{"clean": "a"}', "p.json is not a JSON array of objects with clean, .*from a .jsonl file"),
        ("p.json", b'[{"clean": "a"},\n\n "b"]', "p.json, line 3 is not a JSON object with clean"),
        ("p.json", b'[{"clean": "a"},\n {"clean": }]', "p.json, line 2 is not JSON"),
        ("p.json", b'[{"clean": "a"}\n {"clean": "b"}]', "p.json, line 2 is not JSON .Expecting ',' delimiter"),
        ("p.json", b'[{"clean": "a"}', "p.json, line 1 is not JSON"),
        ("p.json", b'[{"clean": "a"}]\n[]', "p.json, line 2 is not JSON .Extra data"),
        ("p.json", b'[{"clean": "a"},\n{"clean": "b", "corrupted": "c", "answer": 1, "distractor": "d", "group": "g"}]',
         "2 of 2 pairs cannot be used\n  p.json, line 1 has no corrupted\n  p.json, line 2: answer must be text"),
        ("p.jsonl", b"[{}]", "line 1 is not a JSON object .*an array of objects is read from a .json file"),
        ("p.csv", b'clean,corrupted,answer,distractor\na,"b\n', "p.csv, line 2 is not CSV"),
        ("p.csv", b"clean,corrupted,answer,distractor,names\na,b\n", "line 2: group names is empty"),
        ("p.jsonl", b'{"clean": "caf\xe9"}\n', r"p.jsonl is not UTF-8 text \(byte 14"),
    ],
)  # fmt: skip
def test_broken_contents_are_refused_with_the_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_pairs(tmp_path / name, MODEL)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"clean": ""}, InputError, "p.jsonl, line 2: clean is empty"),
        ({"answer": float("nan")}, InputError, r"p.jsonl, line 2: answer must be text, got nan \(float\)"),
        ({"corrupted": None}, InputError, "p.jsonl, line 2: corrupted must be text, got None"),
        ({"template": float("nan")}, InputError, "p.jsonl, line 2: template must be text, got nan"),
        ({"template": ""}, InputError, "p.jsonl, line 2: group template is empty"),
        ({"answer": " Anna" * 9}, TokenizerError, r"line 2: answer .* is \[' Anna', .* give 1 to 8 tokens"),
        ({"answer": " to", "distractor": " to"}, PairsError, "p.jsonl, line 2: answer equals distractor"),
        ({"corrupted": "At the market"}, PairsError, r"line 2: clean has \d+ tokens and corrupted 3.*\['At', ' the'"),
        ({"corrupted": record(1)["clean"]}, PairsError, "p.jsonl, line 2: clean and corrupted prompts are identical"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_pair_is_refused_with_its_line(
    tmp_path: Path, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    records = [record(1, **fields) if i == 1 else r for i, r in enumerate(RECORDS)]
    with pytest.raises(error, match=message):
        load_pairs(write(tmp_path / "p.jsonl", records), MODEL)


def test_bad_pairs_are_listed_at_once(tmp_path: Path) -> None:
    records = [{**r, "answer": " Anna" * 9} if i in (1, 4) else r for i, r in enumerate(RECORDS)]
    with pytest.raises(
        TokenizerError, match=r"(?s)^p.jsonl: 2 of 16 pairs cannot be used\n  p.jsonl, line 2: .*, line 5:"
    ):
        load_pairs(write(tmp_path / "p.jsonl", records), MODEL)
    mixed = [{**r, "clean": ""} if i == 2 else r for i, r in enumerate(records)]
    with pytest.raises(
        InputError, match=r"(?s)3 of 16 pairs.*line 3: answer .*line 4: clean is empty\n.*line 6: answer"
    ):
        load_pairs(write(tmp_path / "p.csv", mixed), MODEL)


def test_of_many_bad_pairs_ten_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    records = [{**r, "distractor": r["answer"]} if i else r for i, r in enumerate(RECORDS)]
    with pytest.raises(PairsError, match="15 of 16 pairs cannot be used") as refusal:
        load_pairs(write(tmp_path / "p.jsonl", records), MODEL)
    lines = str(refusal.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:11]] == [f"p.jsonl, line {n}" for n in range(2, 12)]
    assert lines[11:] == ["  ... and 5 more"]


# --- some of the pairs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 4, 5, 8])
def test_a_subsample_has_n_pairs_of_each_split_in_whole_groups_where_they_fit(tmp_path: Path, n: int) -> None:
    pairs = load_pairs(write(tmp_path / "p.jsonl", RECORDS), MODEL)
    some = subsample(pairs, n, seed=3)
    assert Counter(some.splits) == {"discovery": n, "validation": n}
    assert set(some.example_hashes) <= set(pairs.example_hashes)
    order = [pairs.example_hashes.index(one) for one in some.example_hashes]
    assert order == sorted(order)
    for split in SPLITS:
        whole = Counter(pairs.split(split).groups["template"])
        partial = [name for name, count in Counter(some.split(split).groups["template"]).items() if count < whole[name]]
        assert len(partial) == (1 if n % 4 else 0)


def test_a_subsample_is_drawn_by_seed(tmp_path: Path) -> None:
    pairs = load_pairs(write(tmp_path / "p.jsonl", RECORDS), MODEL)
    drawn = {subsample(pairs, 4, seed).content_hash for seed in range(8)}
    assert len(drawn) > 1
    assert subsample(pairs, 4, 1).content_hash == subsample(pairs, 4, 1).content_hash
    assert subsample(pairs, 8, 1).content_hash == pairs.content_hash


def test_a_subsample_of_pairs_without_groups_or_splits(tmp_path: Path) -> None:
    pairs = load_pairs(write(tmp_path / "p.jsonl", RECORDS), MODEL)
    bare = replace(pairs, groups={}, splits=())
    assert len(subsample(bare, 5)) == 5
    with pytest.raises(InputError, match="n is 17, but there are only 16 pairs; give a smaller n"):
        subsample(bare, 17)
    with pytest.raises(InputError, match=r"n is 9, but the (discovery|validation) split has only 8 pairs"):
        subsample(pairs, 9)
    with pytest.raises(InputError, match="n is 0; give at least one"):
        subsample(pairs, 0)


# --- what is refused in a row -----------------------------------------------------------------------------------


def test_a_missing_field_in_one_line_is_refused(tmp_path: Path) -> None:
    records = [*RECORDS[:2], *without(RECORDS[2:3], "answer"), *RECORDS[3:]]
    with pytest.raises(FileFormatError, match=r"p\.jsonl, line 3 has no answer"):
        load_pairs(write(tmp_path / "p.jsonl", records), MODEL)


def test_a_model_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"SimpleNamespace has no tokenizer.*vesalius.Pairs"):
        load_pairs(write(tmp_path / "p.jsonl", RECORDS), SimpleNamespace(tokenizer=None))
