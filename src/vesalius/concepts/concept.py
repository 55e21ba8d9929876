"""Concept: examples with what they are labelled as, in splits that share no text and no group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vesalius.data import Labelled
from vesalius.data.labelled import LEAST
from vesalius.directions import digest
from vesalius.errors import InputError, UnknownNameError
from vesalius.protocol import content_hash

DISCOVERY, VALIDATION = "discovery", "validation"
SYNONYMS = {"train": DISCOVERY, "training": DISCOVERY, "test": VALIDATION, "testing": VALIDATION}
"""Names of the two splits that others use."""
Numbers = NDArray[np.intp]
Span = tuple[int, int]


@dataclass(frozen=True, eq=False, repr=False)
class Concept:
    """Examples [example] of a concept: texts, token ids [example, pos], or images and other floats [example, ...], with
    a label each.

    labels: names of classes (two or more), or numbers for a concept that is a matter of degree. groups: examples that
    are not independent of each other (one entity, one template) have one group; default equal texts. splits: one name
    each, "discovery" (also "train"), which probes are fitted to, "validation" ("test"), and any others, which are other
    distributions that a probe should hold on; without splits, `divided` makes the first two. spans: the characters
    (start, end) of each text that the label is about, such as one word. types: what a label could be learned by heart
    for, such as the word itself: see `probe_controls`.

    Raises InputError for unequal lengths, empty texts, one class only, too few examples of a class (saying how many are
    needed), labels that contradict each other, and for a text or group that is in two splits.
    """

    name: str
    inputs: tuple[str, ...] | Tensor
    labels: tuple[str, ...] | tuple[float, ...]
    groups: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()
    types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Tensor):
            object.__setattr__(self, "inputs", tuple(map(str, self.inputs)))
        number = all(isinstance(label, float) for label in self.labels)
        object.__setattr__(self, "labels", tuple(self.labels if number else map(str, self.labels)))
        object.__setattr__(self, "groups", tuple(map(str, self.groups)) or self.keys)
        object.__setattr__(self, "splits", tuple(SYNONYMS.get(str(name), str(name)) for name in self.splits))
        object.__setattr__(self, "spans", tuple((int(start), int(end)) for start, end in self.spans))
        object.__setattr__(self, "types", tuple(map(str, self.types)))
        self._check_lengths()
        self._check_texts()
        self._check_labels()
        self._check_leaks()

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        what = "a matter of degree" if self.continuous else ", ".join(self.classes[:8])
        splits = "".join(f"; {count} {name}" for name, count in Counter(self.splits).items())
        return f"Concept({self.name}: {len(self)} examples, {what}{splits})"

    def _check_lengths(self) -> None:
        if not len(self.labels):
            raise InputError(f"{self.name} has no examples")
        for part in ("inputs", "groups", "splits", "spans", "types"):
            given = len(getattr(self, part))
            if given != len(self) and (given or part in ("inputs", "groups")):
                raise InputError(f"{self.name}: {given} {part} for {len(self)} labels; give one each")

    def _check_texts(self) -> None:
        if isinstance(self.inputs, Tensor):
            if self.spans:
                raise InputError(f"{self.name}: spans are of texts")
            return
        for number, text in enumerate(self.inputs):
            if not text.strip():
                raise InputError(f"{self.name}: text {number} is empty; drop it")
            if self.spans and not 0 <= self.spans[number][0] < self.spans[number][1] <= len(text):
                raise InputError(f"{self.name}: span {self.spans[number]} is outside text {number} ({text[:60]!r})")

    def _check_labels(self) -> None:
        if self.continuous:
            if not np.isfinite(self.numbers).all() or float(np.ptp(self.numbers)) == 0.0:
                raise InputError(f"{self.name}: labels that are numbers must be finite, and not all the same")
            return
        seen = [row for row, split in enumerate(self.splits or [DISCOVERY] * len(self)) if split == DISCOVERY]
        counts = Counter(str(self.labels[row]) for row in seen)
        where = " in discovery" if self.splits else ""
        if seen and len(counts) < 2:
            raise InputError(f"{self.name}: every example{where} is labelled {min(counts)!r}; two labels are needed")
        least = LEAST // 2 if self.splits else LEAST
        few = [label for label, count in counts.items() if count < least]
        if few:
            raise InputError(
                f"{self.name}: label {few[0]!r} has {counts[few[0]]} examples{where}; {least} of each are needed"
            )

    def _check_leaks(self) -> None:
        seen: dict[str, int] = {}
        for number, key in enumerate(self.keys):
            first = seen.setdefault(key, number)
            if self.labels[first] != self.labels[number]:
                raise InputError(
                    f"{self.name}: examples {first} and {number} are the same and labelled {self.labels[first]!r} and "
                    f"{self.labels[number]!r}; drop one"
                )
        for what, of in (("example", self.keys), ("group", self.groups)):
            self._check_leak(what, of)

    def _check_leak(self, what: str, of: Sequence[str]) -> None:
        where: dict[str, str] = {}
        for key, split in zip(of, self.splits, strict=False):
            other = where.setdefault(key, split)
            if other != split:
                raise InputError(
                    f"{self.name}: {what} {key[:80]!r} is in {other!r} and in {split!r}, so that what is tested would "
                    "have been seen; give each group one split, or leave the splits out and call divided()"
                )

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """What makes two examples the same: the text, and its span where it has one; of floats their hash."""
        if isinstance(self.inputs, Tensor):
            return tuple(digest(row) for row in self.inputs)
        if not self.spans:
            return self.inputs
        return tuple(f"{text}\0{span}" for text, span in zip(self.inputs, self.spans, strict=True))

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts. Raises InputError for a concept of something else."""
        if isinstance(self.inputs, Tensor):
            raise InputError(f"{self.name} is made of {self.inputs.dtype} {list(self.inputs.shape)}, not of texts")
        return self.inputs

    @property
    def of_floats(self) -> bool:
        """Whether inputs are images or other floats."""
        return isinstance(self.inputs, Tensor) and self.inputs.is_floating_point()

    @property
    def continuous(self) -> bool:
        """Whether labels are numbers."""
        return isinstance(self.labels[0], float)

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels there are, sorted; of two the second is the one that is asked for. None of a continuous one."""
        return () if self.continuous else tuple(sorted(set(map(str, self.labels))))

    @property
    def numbers(self) -> NDArray[np.float64]:
        """[example] labels of a continuous concept, else the number of each one's class."""
        if self.continuous:
            return np.array(self.labels, dtype=np.float64)
        places = {label: float(place) for place, label in enumerate(self.classes)}
        return np.array([places[str(label)] for label in self.labels])

    @property
    def split_names(self) -> tuple[str, ...]:
        """Splits, in the order in which they come."""
        return tuple(dict.fromkeys(self.splits))

    @property
    def shifted(self) -> tuple[str, ...]:
        """Splits that are other distributions: all but discovery and validation."""
        return tuple(name for name in self.split_names if name not in (DISCOVERY, VALIDATION))

    @cached_property
    def content_hash(self) -> str:
        """Of everything but the name."""
        return content_hash([self.keys, self.labels, self.groups, self.splits, self.types])

    @property
    def labelled(self) -> Labelled:
        """The same for the metrics of dictionaries. Raises InputError where it is no concept of whole texts."""
        if self.continuous or self.spans:
            raise InputError(f"{self.name}: these metrics take whole texts with names of classes")
        return Labelled(self.name, self.texts, tuple(map(str, self.labels)), self.groups)

    def rows(self, split: str) -> Numbers:
        """Numbers of the examples of a split. Raises UnknownNameError for one that is not there."""
        name = SYNONYMS.get(split, split)
        if name not in self.splits:
            raise UnknownNameError("split", split, self.split_names or ["(none: call divided())"])
        return np.flatnonzero(np.array(self.splits) == name)

    def subset(self, rows: Sequence[int] | Numbers, name: str = "") -> Concept:
        """The examples with these numbers, in this order."""
        picked: dict[str, Any] = {
            part: tuple(values[row] for row in rows)
            for part in ("labels", "groups", "splits", "spans", "types")
            if (values := getattr(self, part))
        }
        whole = self.inputs
        inputs = whole[np.asarray(rows)] if isinstance(whole, Tensor) else tuple(whole[row] for row in rows)
        return replace(self, name=name or self.name, inputs=inputs, **picked)

    def divided(self, validation: float = 0.5, seed: int = 0) -> Concept:
        """With about this share of the examples in the validation split, by whole groups; labels in about the same
        proportion on both sides. Raises InputError when there are splits already, or too few groups.
        """
        if self.splits:
            raise InputError(
                f"{self.name} has the splits {', '.join(self.split_names)} already; other distributions are added to a "
                "concept that is divided, with with_shifted()"
            )
        # Numbers are divided by the half that they are in.
        middle = np.median(self.numbers) if self.continuous else 0.0
        halves = ["high" if number > middle else "low" for number in self.numbers]
        labels = halves if self.continuous else list(map(str, self.labels))
        parts = Labelled(self.name, self.keys, tuple(labels), self.groups).halves(validation, seed)
        splits = np.full(len(self), DISCOVERY, dtype=object)
        splits[parts[1]] = VALIDATION
        return replace(self, splits=tuple(splits))

    def with_shifted(self, others: Mapping[str, Concept]) -> Concept:
        """With the examples of other concepts of texts as splits of these names.

        What was seen on discovery is left out: examples whose text or group is in that split. Other splits give up
        nothing, so that a group may not be in two of them. Raises InputError when nothing is left of one, when labels
        are of another kind, or before this concept is divided.
        """
        seen = set(self.rows(DISCOVERY).tolist())
        keys, groups = ({of[row] for row in seen} for of in (self.keys, self.groups))
        made = self
        for name, other in others.items():
            if other.continuous != self.continuous or not set(other.classes) <= set(self.classes):
                raise InputError(f"{name}: labels {list(other.classes)} are not those of {self.name}")
            fresh = [row for row, key in enumerate(other.keys) if key not in keys and other.groups[row] not in groups]
            if not fresh:
                raise InputError(f"{name}: every example, or its group, is among those that {self.name} is fitted to")
            made = made._joined(name, other.subset(fresh))
        return made

    def _joined(self, name: str, other: Concept) -> Concept:
        both: dict[str, Any] = {
            part: (*getattr(self, part), *getattr(other, part)) for part in ("labels", "spans", "types")
        }
        # Groups of another distribution are told apart from those of validation, which share the entities.
        groups = (*self.groups, *(f"{name}: {group}" for group in other.groups))
        splits = (*self.splits, *(name for _ in other.labels))
        return replace(self, inputs=(*self.texts, *other.texts), groups=groups, splits=splits, **both)

    def balance(self) -> dict[str, dict[str, int]]:
        """Split -> label -> number of examples, and under "groups" that of groups; of numbers only the latter."""
        found: dict[str, dict[str, int]] = {}
        for split in self.split_names or ("",):
            rows = self.rows(split) if split else np.arange(len(self))
            counts = Counter(str(self.labels[row]) for row in rows) if not self.continuous else Counter()
            found[split or "all"] = {**dict(sorted(counts.items())), "groups": len({self.groups[row] for row in rows})}
        return found

    def _repr_html_(self) -> str:
        """The balance as a table, for notebooks."""
        table = self.balance()
        heads = list(dict.fromkeys(name for counts in table.values() for name in counts))
        rows = "".join(
            f"<tr><th>{escape(split)}</th>{''.join(f'<td>{counts.get(head, 0)}</td>' for head in heads)}</tr>"
            for split, counts in table.items()
        )
        columns = "".join(f"<th>{escape(head)}</th>" for head in heads)
        return f"<table><caption>{escape(self.name)}</caption><tr><th></th>{columns}</tr>{rows}</table>"
