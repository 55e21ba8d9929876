"""Tables of the user's own: .jsonl, .json, .csv and .tsv files as records, each with the line it stands on."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from vesalius.errors import FileFormatError, InputError
from vesalius.jobs.paths import check_file
from vesalius.jobs.untrusted import UnreadableError, check_depth, decode_at, parse_json

R = TypeVar("R")
T = TypeVar("T")
Records = list[tuple[int, Mapping[str, object]]]

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
MOST_LISTED = 10
"""How many bad records one error describes."""


def read_table(path: Path, things: str, thing: str, needed: Sequence[str]) -> Records:
    """Line numbers and records of a file: JSON lines, a JSON array of objects, or CSV with a header.

    The delimiter of a .csv file (comma, semicolon or tab) is the one that finds most of the `needed` columns in its
    header. things, thing: what the file holds, in the plural and the singular, for messages.

    Raises FileFormatError for a file that is missing, empty, a pickle, not UTF-8, or in none of these formats.
    """
    check_file(path, SUFFIXES, things)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileFormatError(
            f"{path.absolute()} is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8"
        ) from error
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        records = _read_json_lines(path, text, needed)
    elif suffix == ".json":
        records = _read_json_array(path, text, needed)
    else:
        records = _read_csv(path, text, "\t" if suffix == ".tsv" else _delimiter(text, needed))
    if not records:
        raise FileFormatError(f"{path.absolute()} is empty: it needs one {thing} a line, with {', '.join(needed)}")
    return records


def read_each(records: Iterable[R], read: Callable[[R], T], where: str, things: str) -> list[T]:
    """`read` of every record.

    A single bad record raises its own error. Several raise one error that lists the first ten and says how many there
    are; it is of their class when they share one, else InputError.
    """
    made: list[T] = []
    errors: list[InputError] = []
    for record in records:
        try:
            made.append(read(record))
        except InputError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise _together(errors, len(made) + len(errors), where, things)
    return made


def _together(errors: Sequence[InputError], n: int, where: str, things: str) -> InputError:
    shared = {type(error) for error in errors}
    # Some classes build their message themselves and take no text.
    kind = shared.pop() if len(shared) == 1 and "__init__" not in vars(type(errors[0])) else InputError
    lines = [f"  {error}" for error in errors[:MOST_LISTED]]
    more = [f"  ... and {len(errors) - MOST_LISTED} more"] if len(errors) > MOST_LISTED else []
    return kind("\n".join([f"{where}: {len(errors)} of {n} {things} cannot be used", *lines, *more]))


def text_of(record: Mapping[str, object], name: str, where: str) -> str:
    """The text in a column. Raises FileFormatError when there is none, InputError for anything but text."""
    if name not in record:
        raise FileFormatError(f"{where} has no {name}")
    value = record[name]
    if not isinstance(value, str):
        raise InputError(f"{where}: {name} must be text, got {value!r} ({type(value).__name__})")
    return value


def _read_json_lines(path: Path, text: str, needed: Sequence[str]) -> Records:
    records: Records = []
    # Not splitlines(): JSON text may hold other characters that it takes for line ends.
    for line, raw in enumerate(text.split("\n"), 1):
        if not raw.strip():
            continue
        try:
            # What a number is has no meaning here: cells are text, and those that are not are named.
            record = parse_json(raw, finite=False)
        except UnreadableError as error:
            raise FileFormatError(f"{path.name}, line {line} is not JSON ({error}): {raw[:60]!r}") from error
        if not isinstance(record, dict):
            hint = "; an array of objects is read from a .json file" if isinstance(record, list) else ""
            raise FileFormatError(
                f"{path.name}, line {line} is not a JSON object with {', '.join(needed)}: {raw[:60]!r}{hint}"
            )
        records.append((line, record))
    return records


def _read_json_array(path: Path, text: str, needed: Sequence[str]) -> Records:
    """The array's objects one by one, because json.loads would not say on which line each begins."""
    at = _skip_space(text, 0)
    if text[at : at + 1] != "[":
        if at == len(text):
            return []
        raise FileFormatError(
            f"{path.name} is not a JSON array of objects with {', '.join(needed)}; one object a line is read from a "
            ".jsonl file"
        )
    records: Records = []
    line, counted = 1, 0
    at = _skip_space(text, at + 1)
    try:
        check_depth(text)
        while text[at : at + 1] != "]":
            line, counted = line + text.count("\n", counted, at), at
            record, at = decode_at(text, at)
            if not isinstance(record, dict):
                raise FileFormatError(f"{path.name}, line {line} is not a JSON object with {', '.join(needed)}")
            records.append((line, record))
            at = _skip_space(text, at)
            if text[at : at + 1] == ",":
                at = _skip_space(text, at + 1)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        end = _skip_space(text, at + 1)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except (json.JSONDecodeError, UnreadableError) as error:
        wrong = error if isinstance(error, json.JSONDecodeError) else error.__cause__
        line = wrong.lineno if isinstance(wrong, json.JSONDecodeError) else line
        raise FileFormatError(f"{path.name}, line {line} is not JSON ({error})") from error
    return records


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _delimiter(text: str, needed: Sequence[str]) -> str:
    """The delimiter whose header has most of the needed columns; a comma when there is no difference."""

    def found(delimiter: str) -> int:
        header = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
        return len({name.strip() for name in header} & set(needed))

    # max takes the first of equals.
    return max(DELIMITERS, key=found)


def _read_csv(path: Path, text: str, delimiter: str) -> Records:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    records: Records = []
    try:
        # Spaces around a column's name are layout; those in a cell are kept, since an answer begins with one.
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        for record in reader:
            if None in record:
                raise FileFormatError(
                    f"{path.name}, line {reader.line_num} has more fields than the header; quote text with "
                    f"{DELIMITERS[delimiter]}"
                )
            records.append((reader.line_num, {name: "" if value is None else value for name, value in record.items()}))
    except csv.Error as error:
        raise FileFormatError(f"{path.name}, line {reader.reader.line_num} is not CSV: {error}") from error
    return records
