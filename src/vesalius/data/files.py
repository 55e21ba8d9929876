"""The user's own pairs: read from a file, divided into splits, and some of them drawn."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vesalius.data.tables import read_each, read_table, text_of
from vesalius.data.tasks.base import SPLITS, Encoded, HasTokenizer, Row, assemble, encode_row, tokenizer_of
from vesalius.errors import FileFormatError, InputError, PairsError, UnknownNameError
from vesalius.inputs import Pairs
from vesalius.seeds import generator_for

NEEDED = ("clean", "corrupted", "answer", "distractor")
GROUP_COLUMNS = ("template", "names", "group")
LEAST_PAIRS = 4


def load_pairs(
    path: str | Path,
    model: HasTokenizer,
    *,
    bos: str = "auto",
    corruption: str = "corrupted",
    groups: Sequence[str] | None = None,
) -> Pairs:
    """Pairs from a file: one a line (.jsonl), an array of them (.json), or a row each (.csv or .tsv, with a header).

    The delimiter of a .csv file may be a comma, a semicolon or a tab. Columns: clean, corrupted, answer, distractor;
    answer and distractor with the leading space they have after the prompt. Groups: the columns listed in `groups`, or
    else all named template, names, group or group_*; without any, a warning that intervals assume independent prompts.
    split: "discovery" or "validation"; without it, whole groups (of template, else of the first group column, else
    equal clean prompts) are divided, about half of the pairs each, by the hash of their label: the same file gives the
    same splits, whatever the order of its rows.

    bos: as in `build_pairs`. Raises FileFormatError for a file that cannot be read or lacks columns, PairsError when
    there is too little to divide or splits share a prompt, TokenizerError when the model has no tokenizer, and for
    rows that are no pairs the errors of `build_pairs`: of one bad row its own, of several one error that lists them.
    """
    tokenizer = tokenizer_of(model)
    path = Path(path)
    records = read_table(path, "pairs", "pair", NEEDED)
    columns = list(dict.fromkeys(name for _, record in records for name in record))
    _check_columns(path, columns, groups or ())
    chosen = list(groups) if groups else [name for name in columns if _is_group(name)]
    if not chosen:
        _warn_no_groups(path, columns)

    def read(numbered: tuple[int, Mapping[str, object]]) -> tuple[Row, Encoded]:
        row = _row(path, *numbered, chosen, "split" in columns)
        return row, encode_row(tokenizer, row, row.where)

    pairs = read_each(records, read, path.name, "pairs")
    rows = _with_splits(path, [row for row, _ in pairs], chosen, given="split" in columns)
    _warn_no_space(path, rows)
    encoded = [replace(ids, split=row.split) for row, (_, ids) in zip(rows, pairs, strict=True)]
    return assemble(encoded, tokenizer, bos=bos, corruption=corruption, task=path.stem)


def subsample(pairs: Pairs, n: int, seed: int = 0) -> Pairs:
    """n pairs of each split, in their order; of pairs without splits n in all.

    Whole groups (of template, else of the first kind of group, else equal clean prompts) are drawn by seed as long as
    they fit; what is then missing comes from one more group. Raises InputError when a split has fewer than n pairs.
    """
    if n < 1:
        raise InputError(f"n is {n}; give at least one pair")
    by = "template" if "template" in pairs.groups else next(iter(pairs.groups), None)
    labels = pairs.groups[by] if by else pairs.example_hashes
    # split -> label -> numbers of its pairs
    grouped: dict[str, dict[str, list[int]]] = {}
    for number, (split, label) in enumerate(zip(pairs.splits or ("",) * len(pairs), labels, strict=True)):
        grouped.setdefault(split, {}).setdefault(label, []).append(number)
    drawn: list[int] = []
    for split, groups in grouped.items():
        size = sum(map(len, groups.values()))
        if size < n:
            where = f"the {split} split has" if split else "there are"
            raise InputError(f"n is {n}, but {where} only {size} pairs; give a smaller n")
        drawn += _draw(list(groups.values()), n, generator_for("subsample", split, seed))
    return pairs.subset(sorted(drawn))


def _draw(groups: Sequence[Sequence[int]], n: int, generator: torch.Generator) -> list[int]:
    """n of the numbers: whole groups in random order while they fit, then part of the first that did not."""
    taken: list[int] = []
    left: list[int] = []
    for group in torch.randperm(len(groups), generator=generator).tolist():
        (taken if len(taken) + len(groups[group]) <= n else left).extend(groups[group])
    return taken + left[: n - len(taken)]


def _is_group(column: str) -> bool:
    return column in GROUP_COLUMNS or column.startswith("group_")


def _check_columns(path: Path, columns: Sequence[str], groups: Sequence[str]) -> None:
    missing = [name for name in (*NEEDED, *groups) if name not in columns]
    if missing:
        raise FileFormatError(
            f"{path.name} lacks {', '.join(missing)}. Found: {', '.join(map(str, columns))}. "
            f"Needed: {', '.join((*NEEDED, *groups))}"
        )


def _row(path: Path, line: int, record: Mapping[str, object], groups: Sequence[str], has_split: bool) -> Row:
    where = f"{path.name}, line {line}"
    clean, corrupted, answer, distractor = (text_of(record, name, where) for name in NEEDED)
    split = text_of(record, "split", where) if has_split else ""
    if has_split and split not in SPLITS:
        raise UnknownNameError(f"split ({where})", split, SPLITS)
    labels = {name: _label(record, name, where) for name in groups}
    return Row(clean, corrupted, answer, distractor, labels, split, where=where)


def _label(record: Mapping[str, object], name: str, where: str) -> str:
    """A group label: text, or a whole number in JSON."""
    value = record.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    text = text_of(record, name, where)
    if not text.strip():
        raise InputError(f"{where}: group {name} is empty; every pair needs a label")
    return text


def _with_splits(path: Path, rows: Sequence[Row], groups: Sequence[str], given: bool) -> list[Row]:
    if given:
        # Equal clean prompts in both splits would be tested on what was seen.
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
    # The order of the hashes is random, and the same for every order of the file's rows.
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
    """Warn of answers without a leading space, which would continue the last word of the prompt."""
    glued = [row for row in rows if row.clean[-1:].isalnum() and row.answer[:1].isalpha()]
    if glued:
        warnings.warn(
            f"{path.name}: {len(glued)} of {len(rows)} answers have no leading space, first in {glued[0].where}: they "
            f"continue the prompt's last word, {(glued[0].clean + glued[0].answer)[-30:]!r}. If a new word is meant, "
            f"write {' ' + glued[0].answer!r}",
            UserWarning,
            stacklevel=3,
        )
