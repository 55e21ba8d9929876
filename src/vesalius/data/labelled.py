"""Labelled: texts with a label each, the form in which a concept is given; parts of them that share no group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vesalius.data.tables import read_each, read_table, text_of
from vesalius.errors import FileFormatError, InputError
from vesalius.protocol import content_hash
from vesalius.seeds import generator_for

GROUP = "group"
LEAST = 4
"""Texts of a class that are needed, so that each half has two."""
Numbers = NDArray[np.intp]


@dataclass(frozen=True)
class Labelled:
    """Texts [example] and labels [example].

    groups: [example], texts that are alike (of one template, about one entity) have one group, and are not divided
    between training and test; default equal texts. marks: [example], a second label that may be spurious.

    Raises InputError for unequal lengths, an empty text, or fewer than two labels or four texts of one.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    groups: tuple[str, ...] = ()
    marks: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for part in ("texts", "labels", "groups", "marks"):
            object.__setattr__(self, part, tuple(map(str, getattr(self, part))))
        object.__setattr__(self, "groups", self.groups or self.texts)
        for part in ("labels", "groups", "marks"):
            given = getattr(self, part)
            if len(given) != len(self.texts) and not (part == "marks" and not given):
                raise InputError(f"{self.name}: {len(given)} {part} for {len(self.texts)} texts; give one each")
        empty = [number for number, text in enumerate(self.texts) if not text.strip()]
        if empty:
            raise InputError(f"{self.name}: text {empty[0]} is empty; drop it")
        counts = Counter(self.labels)
        if len(counts) < 2 or min(counts.values()) < LEAST:
            found = ", ".join(f"{label} {count}" for label, count in sorted(counts.items()))
            raise InputError(
                f"{self.name}: at least two labels are needed, with {LEAST} texts each; got {found or 'none'}"
            )

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels there are, sorted."""
        return tuple(sorted(set(self.labels)))

    @property
    def targets(self) -> tuple[str, ...]:
        """Labels to tell from all others: every one, or of two the last."""
        return self.classes[1:] if len(self.classes) == 2 else self.classes

    @property
    def content_hash(self) -> str:
        """Of everything but the name."""
        return content_hash([self.texts, self.labels, self.groups, self.marks])

    def of(self, label: str) -> NDArray[np.bool_]:
        """[example] whether each has this label."""
        return np.array([own == label for own in self.labels])

    def halves(self, test: float = 0.25, seed: int = 0) -> tuple[Numbers, Numbers]:
        """Numbers of the texts for training, and of those for testing (about this share), in order; by whole groups.

        Both get labels, and marks within each label, in about equal proportion. Raises InputError for a share outside
        (0, 1), and when a label is missing in one of the two.
        """
        if not 0 < test < 1:
            raise InputError(f"test is a share of the texts, between 0 and 1; got {test}")
        strata = [f"{label}\0{mark}" for label, mark in zip(self.labels, self.marks or self.labels, strict=True)]
        held_out = _test_groups(self.groups, strata, test, seed)
        training, testing = (
            np.flatnonzero(np.array([group in held_out for group in self.groups]) == side) for side in (0, 1)
        )
        for numbers in (training, testing):
            missing = set(self.classes) - {self.labels[number] for number in numbers}
            if missing:
                raise InputError(f"{self.name}: too few groups of texts to have {sorted(missing)[0]!r} in both halves")
        return training, testing


def load_labelled(
    path: str | Path, *, text: str = "text", label: str = "label", group: str | None = None, mark: str | None = None
) -> Labelled:
    """Texts and labels by the names of their columns, from a .jsonl, .json (array), .csv or .tsv file with a header.

    The delimiter of a .csv file may be a comma, a semicolon or a tab. group: column of what texts share; default the
    column "group", if there is one. mark: column of a second label.

    Raises FileFormatError for a file that cannot be read or lacks a column, InputError as `Labelled`; several bad rows
    are listed in one error.
    """
    where = Path(path)
    wanted = [text, label, *filter(None, (group, mark))]
    records = read_table(where, "labelled texts", "text", wanted)
    known = list(dict.fromkeys(name for _, record in records for name in record))
    missing = [name for name in wanted if name not in known]
    if missing:
        raise FileFormatError(
            f"{where.name} lacks {', '.join(missing)}. Found: {', '.join(map(str, known))}. Name them: text=, label="
        )
    by = group or (GROUP if GROUP in known else None)
    cells = [label, *filter(None, (by, mark))]

    def read(numbered: tuple[int, Mapping[str, object]]) -> list[str]:
        line, record = numbered
        here = f"{where.name}, line {line}"
        return [text_of(record, text, here), *(_cell(record, name, here) for name in cells)]

    rows = read_each(records, read, where.name, "texts")
    texts, labels, *others = zip(*rows, strict=True)
    groups = others.pop(0) if by else ()
    return Labelled(where.stem, texts, labels, groups, others.pop(0) if mark else ())


def _cell(record: Mapping[str, object], name: str, where: str) -> str:
    """A label: text, a whole number or a truth value."""
    value = record.get(name)
    if isinstance(value, bool | int):
        return str(value)
    found = text_of(record, name, where).strip()
    if not found:
        raise InputError(f"{where}: {name} is empty; every text needs one")
    return found


def _test_groups(groups: Sequence[str], labels: Sequence[str], share: float, seed: int) -> set[Hashable]:
    """Groups for testing: in random order, each one that brings the labels' counts nearer to their target."""
    counts: dict[str, Counter[str]] = {}
    for group, label in zip(groups, labels, strict=True):
        counts.setdefault(group, Counter())[label] += 1
    target = {label: share * count for label, count in Counter(labels).items()}
    names, chosen, have = sorted(counts), set[Hashable](), Counter[str]()
    for place in torch.randperm(len(names), generator=generator_for("labelled", seed)).tolist():
        own = counts[names[place]]
        # How much the sum over labels of (count - target)^2 / target falls when this group is added, halved.
        gain = sum((target[label] - have[label] - n / 2) * n / target[label] for label, n in own.items())
        if gain > 0:
            chosen.add(names[place])
            have.update(own)
    return chosen
