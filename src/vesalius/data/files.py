"""The user's own pairs, from a .jsonl or .csv file."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vesalius.data.tasks.base import SPLITS, HasTokenizer, Row, build_pairs, tokenizer_of
from vesalius.errors import FileFormatError, InputError, PairsError, UnknownNameError
from vesalius.inputs import Pairs

NEEDED = ("clean", "corrupted", "answer", "distractor")
GROUP_COLUMNS = ("template", "names", "group")
LEAST_PAIRS = 4
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib")


def load_pairs(
    path: str | Path,
    model: HasTokenizer,
    *,
    beginning: str = "auto",
    corruption: str = "corrupted",
    groups: Sequence[str] | None = None,
) -> Pairs:
    """Pairs from a file with one pair a line (.jsonl) or row (.csv, with a header).

    Columns: clean, corrupted, answer, distractor; answer and distractor with the leading space they have after the
    prompt. Groups: the columns listed in `groups`, or else all named template, names, group or group_*; without any, a
    warning that intervals assume independent prompts. split: "discovery" or "validation"; without it, whole groups
    (of template, else of the first group column, else equal clean prompts) are divided, about half of the pairs each,
    by the hash of their label: the same file gives the same splits, in whatever order its rows stand.

    beginning and errors about tokens: as in `build_pairs`. Raises FileFormatError for a file that cannot be read or
    lacks columns, PairsError when there is too little to divide or splits share a prompt, TokenizerError when the
    model has no tokenizer.
    """
    tokenizer = tokenizer_of(model)
    path = Path(path)
    records = _read(path)
    columns = list(dict.fromkeys(name for _, record in records for name in record))
    _check_columns(path, columns, groups or ())
    chosen = list(groups) if groups else [name for name in columns if _is_group(name)]
    if not chosen:
        _warn_no_groups(path, columns)
    rows = [_row(path, line, record, chosen, "split" in columns) for line, record in records]
    rows = _with_splits(path, rows, chosen, given="split" in columns)
    _warn_no_space(path, rows)
    return build_pairs(rows, tokenizer, beginning=beginning, corruption=corruption, task=path.stem)


def _is_group(column: str) -> bool:
    return column in GROUP_COLUMNS or column.startswith("group_")


def _read(path: Path) -> list[tuple[int, Mapping[str, object]]]:
    """Line numbers and records."""
    _check_path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileFormatError(
            f"{path.absolute()} is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8"
        ) from error
    records = _read_json(path, text) if path.suffix.lower() == ".jsonl" else _read_csv(path, text)
    if not records:
        raise FileFormatError(f"{path.absolute()} is empty: it needs one pair a line, with {', '.join(NEEDED)}")
    return records


def _check_path(path: Path) -> None:
    where = path.absolute()
    if path.is_dir():
        raise FileFormatError(f"{where} is a directory; give the .jsonl or .csv file in it")
    if not path.exists():
        raise FileFormatError(f"there is no file {where}")
    if path.suffix.lower() in PICKLES:
        raise FileFormatError(
            f"{where}: pickled files can run code when they are opened and are refused; save as .jsonl"
        )
    if path.suffix.lower() not in (".jsonl", ".csv"):
        raise FileFormatError(f"{where} ends in {path.suffix or 'nothing'!r}; pairs are read from .jsonl or .csv")


def _read_json(path: Path, text: str) -> list[tuple[int, Mapping[str, object]]]:
    records: list[tuple[int, Mapping[str, object]]] = []
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
                f"{path.name}, line {line} is not a JSON object with {', '.join(NEEDED)}: {raw[:60]!r}"
            )
        records.append((line, record))
    return records


def _read_csv(path: Path, text: str) -> list[tuple[int, Mapping[str, object]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    records: list[tuple[int, Mapping[str, object]]] = []
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


def _check_columns(path: Path, columns: Sequence[str], groups: Sequence[str]) -> None:
    missing = [name for name in (*NEEDED, *groups) if name not in columns]
    if missing:
        raise FileFormatError(
            f"{path.name} lacks {', '.join(missing)}. Found: {', '.join(map(str, columns))}. "
            f"Needed: {', '.join((*NEEDED, *groups))}"
        )


def _row(path: Path, line: int, record: Mapping[str, object], groups: Sequence[str], has_split: bool) -> Row:
    where = f"{path.name}, line {line}"
    clean, corrupted, answer, distractor = (_text(record, name, where) for name in NEEDED)
    split = _text(record, "split", where) if has_split else ""
    if has_split and split not in SPLITS:
        raise UnknownNameError(f"split ({where})", split, SPLITS)
    labels = {name: _label(record, name, where) for name in groups}
    return Row(clean, corrupted, answer, distractor, labels, split, where=where)


def _text(record: Mapping[str, object], name: str, where: str) -> str:
    if name not in record:
        raise FileFormatError(f"{where} has no {name}")
    value = record[name]
    if not isinstance(value, str):
        raise InputError(f"{where}: {name} must be text, got {value!r} ({type(value).__name__})")
    return value


def _label(record: Mapping[str, object], name: str, where: str) -> str:
    """A group label: text, or a whole number in JSON."""
    value = record.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    text = _text(record, name, where)
    if not text.strip():
        raise InputError(f"{where}: group {name} is empty; every pair needs a label")
    return text


def _with_splits(path: Path, rows: Sequence[Row], groups: Sequence[str], given: bool) -> list[Row]:
    if given:
        _check_disjoint(rows)
        return list(rows)
    by = "template" if "template" in groups else next(iter(groups), None)
    labels = [row.groups[by] if by else row.clean for row in rows]
    sizes = Counter(labels)
    if len(rows) < LEAST_PAIRS or len(sizes) < len(SPLITS):
        what = f"groups of {by!r}" if by else "different prompts"
        raise PairsError(
            f"{path.name} has {len(rows)} pairs in {len(sizes)} {what}; at least {LEAST_PAIRS} pairs and {len(SPLITS)} "
            "groups are needed, since one part is for finding and the other for testing"
        )
    where = _divide(sizes)
    divided = [replace(row, split=where[label]) for row, label in zip(rows, labels, strict=True)]
    _check_disjoint(divided)
    return divided


def _divide(sizes: Mapping[str, int]) -> dict[str, str]:
    """Label -> split: labels in the order of their hash, each to the split that holds fewer pairs so far."""
    filled = dict.fromkeys(SPLITS, 0)
    where = {}
    for label in sorted(sizes, key=lambda text: hashlib.sha256(text.encode()).hexdigest()):
        where[label] = min(SPLITS, key=filled.__getitem__)
        filled[where[label]] += sizes[label]
    return where


def _check_disjoint(rows: Sequence[Row]) -> None:
    first: dict[str, Row] = {}
    for row in rows:
        other = first.setdefault(row.clean, row)
        if other.split != row.split:
            raise PairsError(
                f"{row.where} ({row.split}) repeats the clean prompt of {other.where} ({other.split}): what is tested "
                "must not have been seen. Drop one, or give both the same split or template"
            )


def _warn_no_groups(path: Path, columns: Sequence[str]) -> None:
    warnings.warn(
        f"{path.name} has no group columns (found: {', '.join(map(str, columns))}): intervals will assume independent "
        "prompts. If prompts share a template or names, intervals will be too narrow: add columns 'template', 'names'",
        UserWarning,
        stacklevel=3,
    )


def _warn_no_space(path: Path, rows: Sequence[Row]) -> None:
    """Warn of answers that would be glued to the last word of the prompt."""
    glued = [row for row in rows if row.clean[-1:].isalnum() and row.answer[:1].isalpha()]
    if glued:
        warnings.warn(
            f"{path.name}: {len(glued)} of {len(rows)} answers have no leading space, first in {glued[0].where}: they "
            f"continue the prompt's last word, {(glued[0].clean + glued[0].answer)[-30:]!r}. If a new word is meant, "
            f"write {' ' + glued[0].answer!r}",
            UserWarning,
            stacklevel=3,
        )
