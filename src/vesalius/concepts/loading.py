"""Concepts from files, data frames, minimal pairs and tagged words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vesalius.concepts.concept import Concept
from vesalius.data.tables import SUFFIXES, Records, read_each, read_table, text_of
from vesalius.data.texts import parquet_library
from vesalius.errors import FileFormatError, InputError, UnknownNameError
from vesalius.jobs.paths import check_file

PARQUET = ".parquet"
GIVEN = {"group": "group", "split": "split", "type": "type"}
"""Columns that are used when they are there."""


def load_concept(
    path: str | Path,
    *,
    text: str = "text",
    label: str = "label",
    group: str | None = None,
    split: str | None = None,
    span: tuple[str, str] | None = None,
    continuous: bool = False,
) -> Concept:
    """A concept from a .csv, .tsv, .jsonl, .json (array) or .parquet file, by the names of its columns.

    group, split: default the columns of these names, where there are any. span: columns with the first character and
    the one after the last of what the label is about. continuous: labels are numbers.

    Raises FileFormatError for a file that cannot be read, UnknownNameError for a column that is not there, and as
    `Concept`; several bad rows are listed in one error.
    """
    where = Path(path)
    wanted = [text, label, *filter(None, (group, split)), *(span or ())]
    records = _records(where, wanted)
    return _concept(where.stem, records, text, label, group, split, span, continuous, where.name)


def concept_from_frame(
    frame: Any,
    *,
    name: str = "concept",
    text: str = "text",
    label: str = "label",
    group: str | None = None,
    split: str | None = None,
    span: tuple[str, str] | None = None,
    continuous: bool = False,
) -> Concept:
    """A concept from a pandas DataFrame (or anything with `to_dict("records")`). Arguments as for `load_concept`."""
    records: Records = [(number, dict(row)) for number, row in enumerate(frame.to_dict("records"))]
    return _concept(name, records, text, label, group, split, span, continuous, name)


def minimal_pairs(
    good: Sequence[str],
    bad: Sequence[str],
    *,
    name: str = "pairs",
    groups: Sequence[str] = (),
    labels: tuple[str, str] = ("bad", "good"),
) -> Concept:
    """A concept of minimal pairs (Warstadt et al. 2020, BLiMP): sentences that differ in the concept and nothing else.

    Both sentences of a pair are in one group, or in the group that is given for the pair. labels: of bad and good.
    Raises InputError for pairs that do not match up, and as `Concept`.
    """
    if len(good) != len(bad) or (groups and len(groups) != len(good)):
        raise InputError(f"{name}: {len(good)} and {len(bad)} sentences, {len(groups)} groups; give one of each a pair")
    own = list(map(str, groups)) or [f"pair {number}" for number in range(len(good))]
    return Concept(name, (*good, *bad), (labels[1],) * len(good) + (labels[0],) * len(bad), (*own, *own))


def tagged_words(
    sentences: Iterable[Sequence[tuple[str, str]]], *, name: str = "tags", keep: Sequence[str] = ()
) -> Concept:
    """A concept of single words in sentences of (word, tag), such as parts of speech; words are joined by spaces.

    keep: the tags to take, default all. A sentence is a group; a word's type is the word itself in lower case.
    """
    texts, labels, groups, spans, types = [], [], [], [], []
    for number, sentence in enumerate(sentences):
        whole, start = " ".join(word for word, _ in sentence), 0
        for word, tag in sentence:
            if not keep or tag in keep:
                texts.append(whole)
                labels.append(tag)
                groups.append(f"sentence {number}")
                spans.append((start, start + len(word)))
                types.append(word.lower())
            start += len(word) + 1
    return Concept(name, tuple(texts), tuple(labels), tuple(groups), (), tuple(spans), tuple(types))


def _records(path: Path, wanted: Sequence[str]) -> Records:
    if path.suffix.lower() != PARQUET:
        check_file(path, (*SUFFIXES, PARQUET), "labelled texts")
        return read_table(path, "labelled texts", "text", wanted)
    check_file(path, (PARQUET,), "labelled texts")
    library = parquet_library()
    try:
        table = library.read_table(path)
    except (OSError, ValueError) as error:  # what pyarrow raises for a damaged file
        raise FileFormatError(f"{path.absolute()} cannot be read as parquet: {error}") from error
    return list(enumerate(table.to_pylist()))


def _concept(
    name: str,
    records: Records,
    text: str,
    label: str,
    group: str | None,
    split: str | None,
    span: tuple[str, str] | None,
    continuous: bool,
    where: str,
) -> Concept:
    known = list(dict.fromkeys(column for _, record in records for column in record))
    for column in (text, label, *filter(None, (group, split)), *(span or ())):
        if column not in known:
            raise UnknownNameError(f"column of {where}", column, known, "Name them: text=, label=, group=, split=.")
    found = {of: given or (usual if usual in known else None) for (of, usual), given in
             zip(GIVEN.items(), (group, split, None), strict=True)}  # fmt: skip

    def read(numbered: tuple[int, Mapping[str, object]]) -> tuple[Any, ...]:
        number, record = numbered
        here = f"{where}, line {number}"
        value = _number(record, label, here) if continuous else _cell(record, label, here)
        place = None if span is None else tuple(int(_number(record, column, here)) for column in span)
        others = (None if column is None else _cell(record, column, here) for column in found.values())
        return text_of(record, text, here), value, place, *others

    rows = read_each(records, read, where, "texts")
    texts, labels, spans, groups, splits, types = zip(*rows, strict=True)
    given = lambda cells, column: cells if column else ()  # noqa: E731
    return Concept(
        name, texts, labels, given(groups, found["group"]), given(splits, found["split"]), given(spans, span),
        given(types, found["type"]),
    )  # fmt: skip


def _cell(record: Mapping[str, object], name: str, where: str) -> str:
    """A label: text, a whole number or a truth value."""
    value = record.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    found = str(value).strip() if isinstance(value, str | int) else ""
    if not found:
        raise InputError(f"{where}: {name} is {value!r}; every text needs text, a whole number or a truth value there")
    return found


def _number(record: Mapping[str, object], name: str, where: str) -> float:
    try:
        found = float(str(record.get(name)))
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise InputError(f"{where}: {name} is {record.get(name)!r}, which is no number")
    return found
