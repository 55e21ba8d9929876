"""Tables that users hand over: one record a line (.jsonl) or row (.csv with a header), with the line each stands on."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from vesalius.errors import FileFormatError, InputError

SUFFIXES = (".jsonl", ".csv")
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib")
Records = list[tuple[int, Mapping[str, object]]]


def read_table(path: Path, things: str, thing: str, needed: Sequence[str]) -> Records:
    """Line numbers and records of a file. things, thing, needed: what is in it, for messages.

    Raises FileFormatError for a file that is not there, empty, a pickle, no UTF-8, or neither JSON lines nor CSV.
    """
    _check_path(path, things)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileFormatError(
            f"{path.absolute()} is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8"
        ) from error
    records = _read_json(path, text, needed) if path.suffix.lower() == ".jsonl" else _read_csv(path, text)
    if not records:
        raise FileFormatError(f"{path.absolute()} is empty: it needs one {thing} a line, with {', '.join(needed)}")
    return records


def text_of(record: Mapping[str, object], name: str, where: str) -> str:
    """The text in a column. Raises FileFormatError when there is none, InputError for anything but text."""
    if name not in record:
        raise FileFormatError(f"{where} has no {name}")
    value = record[name]
    if not isinstance(value, str):
        raise InputError(f"{where}: {name} must be text, got {value!r} ({type(value).__name__})")
    return value


def _check_path(path: Path, things: str) -> None:
    where = path.absolute()
    if path.is_dir():
        raise FileFormatError(f"{where} is a directory; give the .jsonl or .csv file in it")
    if not path.exists():
        raise FileFormatError(f"there is no file {where}")
    if path.suffix.lower() in PICKLES:
        raise FileFormatError(
            f"{where}: pickled files can run code when they are opened and are refused; save as .jsonl"
        )
    if path.suffix.lower() not in SUFFIXES:
        raise FileFormatError(f"{where} ends in {path.suffix or 'nothing'!r}; {things} are read from .jsonl or .csv")


def _read_json(path: Path, text: str, needed: Sequence[str]) -> Records:
    records: Records = []
    # not splitlines(): JSON text may hold other characters that count as line ends there
    for line, raw in enumerate(text.split("\n"), 1):
        if not raw.strip():
            continue
        try:
            record = json.loads(raw)
        except json.JSONDecodeError as error:
            raise FileFormatError(f"{path.name}, line {line} is not JSON ({error.msg}): {raw[:60]!r}") from error
        if not isinstance(record, dict):
            raise FileFormatError(
                f"{path.name}, line {line} is not a JSON object with {', '.join(needed)}: {raw[:60]!r}"
            )
        records.append((line, record))
    return records


def _read_csv(path: Path, text: str) -> Records:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    records: Records = []
    try:
        for record in reader:
            if None in record:
                raise FileFormatError(
                    f"{path.name}, line {reader.line_num} has more fields than the header; quote text with commas"
                )
            records.append((reader.line_num, {name: "" if value is None else value for name, value in record.items()}))
    except csv.Error as error:
        raise FileFormatError(f"{path.name}, line {reader.reader.line_num} is not CSV: {error}") from error
    return records
