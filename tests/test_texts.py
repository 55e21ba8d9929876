"""Texts come whole and in order from wherever they are kept; what cannot be read is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import pytest

from vesalius.data.packing import Tally, tokenized
from vesalius.data.texts import texts_from
from vesalius.errors import FileFormatError, InputError, UnknownNameError

PLAIN = ["first", "", "  ", "first", "zwei\n\u2028drei \U0001f600"]


def listed(given: Any, **options: str) -> list[Any]:
    return list(texts_from(given, **options).read())


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", "utf-8")
    return path


def test_a_list_is_read_as_it_is_nothing_left_out() -> None:
    texts = texts_from(PLAIN)
    assert list(texts.read()) == list(texts.read()) == PLAIN
    assert texts.size == sum(map(len, PLAIN))
    assert texts_from([*PLAIN]).description == texts.description
    assert texts_from(["fir", "st", *PLAIN[1:]]).description != texts.description


def test_the_standard_library_describes_itself() -> None:
    texts = texts_from("stdlib")
    documents = list(texts.read())
    assert documents[: len(topics.topics)] == list(topics.topics.values())
    assert len(documents) > 400
    assert 1e6 < sum(map(len, documents)) == texts.size
    assert any(json.__doc__.strip()[:40] in document for document in documents if isinstance(document, str))
    assert texts.description["python"] == sys.version.split()[0]


def test_a_folder_is_read_file_by_file_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("B\ntwo lines", "utf-8")
    jsonl(tmp_path / "a.jsonl", [{"text": "A1", "more": 1}, "A2", {"text": ""}])
    (tmp_path / "sub" / "c.TXT").write_text("\ufeffC", "utf-8")
    (tmp_path / "notes.md").write_text("no text")
    (tmp_path / ".hidden.txt").write_text("no text")
    texts = texts_from(tmp_path)
    assert list(texts.read()) == ["A1", "A2", "", "B\ntwo lines", "C"]
    assert texts.left_out == ("notes.md",)
    assert [file["name"] for file in texts.description["files"]] == ["a.jsonl", "b.txt", "sub/c.TXT"]
    sizes = [(tmp_path / name).stat().st_size for name in ("a.jsonl", "b.txt", "sub/c.TXT")]
    assert texts.size == sum(sizes)
    before = dict(texts.description)
    (tmp_path / "b.txt").write_text("B\ntwo linez", "utf-8")
    assert texts_from(tmp_path).description["sha256"] != before["sha256"]


def test_lines_of_json_may_hold_other_line_ends(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", PLAIN)
    assert listed(path) == PLAIN
    assert listed(jsonl(tmp_path / "y.jsonl", [{"body": text} for text in PLAIN]), column="body") == PLAIN


def test_an_iterable_of_rows_texts_or_ids(tmp_path: Path) -> None:
    class Table:
        """Like a dataset: begins anew, rows are mappings."""

        def __iter__(self) -> Any:
            return ({"text": text, "n": 1} for text in PLAIN)

    texts = texts_from(Table())
    assert list(texts.read()) == list(texts.read()) == PLAIN
    assert texts.rereadable
    assert texts.description["type"].endswith("Table")
    assert listed([[1, 2], (3,), []]) == [[1, 2], (3,), []]
    once = texts_from(iter(PLAIN))
    assert not once.rereadable
    assert list(once.read()) == PLAIN


def test_rows_of_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    parquet.write_table(arrow.table({"n": list(range(len(PLAIN))), "body": PLAIN}), path, row_group_size=2)
    assert listed(path, column="body") == PLAIN
    with pytest.raises(UnknownNameError, match=r"unknown column \(.*x\.parquet\) 'text'; known: body, n"):
        listed(path)
    with pytest.raises(InputError, match=r"x\.parquet, row 0: n must be text or token ids, got int"):
        listed(path, column="n")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(FileFormatError, match=r"x\.parquet cannot be read as parquet"):
        listed(path, column="body")


def test_parquet_without_its_library_names_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="pip install pyarrow"):
        texts_from(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("x.txt", b"ab\xff\xfe", FileFormatError, r"x\.txt is not UTF-8 text"),
        ("x.jsonl", b'{"text": "a"}\n{"text": \xff}\n', FileFormatError, r"x\.jsonl, line 2 is not UTF-8 text"),
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', FileFormatError, r"x\.jsonl, line 2 is not JSON"),
        ("x.jsonl", b"1\n", FileFormatError, r"x\.jsonl, line 1 is neither a text nor a JSON object with 'text'"),
        ("x.jsonl", b'{"body": "a"}\n', UnknownNameError, r"unknown column \(.*x\.jsonl, line 1\) 'text'; known: body"),
        ("x.jsonl", b'{"text": [1, 2.5]}\n', InputError, r"x\.jsonl, line 1: text must be text or token ids, got list"),
        (
            "x.jsonl",
            b'{"text": "a"}\n{"text": [-1]}\n',
            InputError,
            r"x\.jsonl, line 2: text must be text or token ids",
        ),
        ("x.jsonl", b'{"text": [true]}\n', InputError, r"x\.jsonl, line 1: text must be text or token ids, got list"),
        ("x.csv", b"text\na\n", FileFormatError, r"x\.csv ends in '\.csv'; texts are read from \.txt, \.jsonl, \.parq"),
    ],
)
def test_what_cannot_be_read_is_named(
    name: str, content: bytes, error: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        listed(tmp_path / name)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"no file or folder .*/nowhere; texts are 'stdlib' \(a built-in corpus"):
        texts_from(tmp_path / "nowhere")
    (tmp_path / "x.md").write_text("x")
    with pytest.raises(FileFormatError, match=r"holds no texts: 1 files, none of which ends in \.txt"):
        texts_from(tmp_path)
    for given in (7, None, b"text"):
        with pytest.raises(InputError, match="texts must be 'stdlib', a path, or an iterable of texts"):
            texts_from(given)
    with pytest.raises(InputError, match="text 1 is a int; texts are str"):
        listed(["a", 3])
    with pytest.raises(UnknownNameError, match=r"unknown column \(row 0\) 'text'; known: body"):
        listed([{"body": "a"}])


def test_null_is_left_out_and_counted_and_token_ids_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a b"}\n{"text": null}\n{"text": [3, 4]}\nnull\n[5, 6, 7]\n\n""\n')
    assert listed(path) == ["a b", (), [3, 4], (), [5, 6, 7], ""]
    tally = Tally()
    rows = [{"text": None}, {"text": [1, 2]}, None, {"text": np.array([3])}]
    ids = list(tokenized(texts_from(rows).read(), None, tally))
    assert [row.tolist() for row in ids] == [[], [1, 2], [], [3]]
    assert (tally.texts, tally.nulls, tally.empty) == (4, 2, 0)
    for given, where in ((path, r"x\.jsonl, line 2: text must be text or token ids, got null"), (rows, "row 0: text")):
        with pytest.raises(InputError, match=where):
            list(texts_from(given, nulls="error").read())
    with pytest.raises(UnknownNameError, match="way with rows that hold null 'drop'; known: error, skip"):
        texts_from(path, nulls="drop")


def test_null_and_token_ids_of_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    parquet.write_table(arrow.table({"text": ["a", None], "ids": [[1, 2], None]}), path)
    assert listed(path) == ["a", ()]
    assert listed(path, column="ids") == [[1, 2], ()]
    with pytest.raises(InputError, match=r"x\.parquet, row 1: ids must be text or token ids, got null"):
        list(texts_from(path, "ids", nulls="error").read())
