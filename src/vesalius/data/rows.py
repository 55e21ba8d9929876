"""Tables from files, data frames and scikit-learn: columns of numbers as they are, words as one column a category.

What was learned about the columns (which are words, which categories there are) is an `Encoding`, so that later rows
are laid out alike, and a category that was not there before is refused instead of being taken for none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vesalius.data.tables import SUFFIXES, read_table
from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Table

Record = Mapping[str, object]
BUILT_IN = ("breast_cancer", "diabetes", "iris", "wine")
MOST_CATEGORIES = 50
"""Of one column; with more it is hardly one of categories."""


@dataclass(frozen=True)
class Encoding:
    """How records become rows: target and what it can be, columns of numbers, and the categories of columns of words.

    classes: empty for a target that is a number. groups, labels: columns that are kept beside the rows.
    """

    target: str
    classes: tuple[str, ...]
    numbers: tuple[str, ...]
    categories: Mapping[str, tuple[str, ...]]
    groups: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the table's columns: of categories "colour=red"."""
        words = [f"{name}={one}" for name, some in self.categories.items() for one in some]
        return (*self.numbers, *words)

    def table(self, records: Sequence[Record], name: str = "") -> Table:
        """A table of these records.

        Raises InputError naming row and column for a cell that is missing or is no number, and for a category, or a
        class, that was not there when the encoding was made.
        """
        rows = [self._row(record, number) for number, record in enumerate(records, 1)]
        words = [str(_cell(record, self.target, number)) for number, record in enumerate(records, 1)]
        if self.classes:
            target = torch.tensor([_known(self.target, one, self.classes, n) for n, one in enumerate(words, 1)])
        else:
            target = torch.tensor([_number(record, self.target, n) for n, record in enumerate(records, 1)])
        groups, labels = (
            {one: tuple(str(_cell(record, one, n)) for n, record in enumerate(records, 1)) for one in named}
            for named in (self.groups, self.labels)
        )
        return Table(torch.tensor(rows), self.columns, target, self.classes, labels, groups, name=name)

    def _row(self, record: Record, number: int) -> list[float]:
        found = [_number(record, one, number) for one in self.numbers]
        for name, some in self.categories.items():
            own = _known(name, str(_cell(record, name, number)), some, number)
            found += [float(place == own) for place in range(len(some))]
        return found


def encoding_of(
    records: Sequence[Record], target: str, *, classes: bool | None = None, groups: Sequence[str] = (),
    labels: Sequence[str] = (), leave_out: Sequence[str] = (),
) -> Encoding:  # fmt: skip
    """How these records become rows. A column is one of numbers when every cell is one, else one of categories.

    classes: whether the target is a name; default, when not every cell of it is a number, or all are 0 and 1. Raises
    UnknownNameError for a column that is not there, InputError for no records, columns with too many categories or
    with one, and a target with one class.
    """
    if not records:
        raise InputError("no rows to make a table of")
    names = list(records[0])
    for name in (target, *groups, *labels, *leave_out):
        if name not in names:
            raise UnknownNameError("column", name, names)
    others = [name for name in names if name not in {target, *groups, *labels, *leave_out}]
    numeric = {name for name in (*others, target) if all(_is_number(record.get(name)) for record in records)}
    words = {name: _categories(records, name) for name in others if name not in numeric}
    named = classes if classes is not None else target not in numeric or _binary(records, target)
    return Encoding(
        target,
        _categories(records, target) if named else (),
        tuple(name for name in others if name in numeric),
        words,
        tuple(groups),
        tuple(labels),
    )


def load_rows(path: str | Path, target: str, **how: Any) -> tuple[Table, Encoding]:
    """A table from a .csv, .tsv, .jsonl or .json file, and how its records were laid out (for later files).

    how: as `encoding_of`; encoding= that of an earlier file. Raises as that, FileFormatError for another file.
    """
    encoding = how.pop("encoding", None)
    given = Path(path)
    records = [record for _, record in read_table(given, "rows of a table", "row", [target])]
    found = encoding if encoding is not None else encoding_of(records, target, **how)
    return found.table(records, given.stem), found


def table_from_frame(frame: Any, target: str, **how: Any) -> Table:
    """A table from a pandas DataFrame. how: as `encoding_of`."""
    records = frame.to_dict("records")
    return encoding_of(records, target, **how).table(records)


def builtin_table(name: str) -> Table:
    """A table that comes with scikit-learn: breast_cancer (Wisconsin cytology), diabetes, iris, wine.

    Raises UnknownNameError for another one; it lists `SUFFIXES` for files of your own.
    """
    if name not in BUILT_IN:
        raise UnknownNameError("table", name, BUILT_IN, f"Or give a file: {', '.join(SUFFIXES)}.")
    # Late and here only: importing vesalius must stay light.
    from sklearn import datasets

    found = getattr(datasets, f"load_{name}")()
    columns = tuple(map(str, found.feature_names))
    values = torch.from_numpy(found.data).float()
    if name == "diabetes":
        return Table(values, columns, torch.from_numpy(found.target).float(), name=name)
    target, classes = torch.from_numpy(found.target).long(), tuple(map(str, found.target_names))
    if name == "breast_cancer":
        # scikit-learn counts benign as 1; here the second class is the one whose odds are spoken of.
        target, classes = 1 - target, ("benign", "malignant")
    return Table(values, columns, target, classes, name=name)


def _cell(record: Record, name: str, number: int) -> object:
    if record.get(name) in (None, ""):
        raise InputError(f"row {number} has no {name!r}; fill in what is missing, or leave the row out")
    return record[name]


def _number(record: Record, name: str, number: int) -> float:
    cell = _cell(record, name, number)
    if not _is_number(cell):
        raise InputError(f"row {number}: {name!r} is a column of numbers, and holds {cell!r}")
    return float(str(cell))


def _is_number(cell: object) -> bool:
    try:
        return math.isfinite(float(str(cell))) and not isinstance(cell, bool)
    except ValueError:
        return False


def _known(name: str, cell: str, some: Sequence[str], number: int) -> int:
    if cell not in some:
        raise InputError(
            f"row {number}: {name} {cell!r} was not there when the table was laid out; known: {', '.join(some)}. Add "
            "rows of it and fit again, or leave the row out"
        )
    return some.index(cell)


def _categories(records: Sequence[Record], name: str) -> tuple[str, ...]:
    found = tuple(sorted({str(_cell(record, name, number)) for number, record in enumerate(records, 1)}))
    if len(found) < 2:
        raise InputError(f"column {name!r} holds only {found[0]!r}; leave it out, or give rows that differ in it")
    if len(found) > MOST_CATEGORIES:
        raise InputError(
            f"column {name!r} holds {len(found)} different words; leave it out (leave_out=), or name it in groups= if "
            "it says which rows belong together"
        )
    return found


def _binary(records: Sequence[Record], name: str) -> bool:
    return {float(str(record[name])) for record in records} <= {0.0, 1.0}
