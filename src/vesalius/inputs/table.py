"""Table: rows of numbers in named columns, with what is to be predicted and what else is known of each row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from vesalius.errors import InputError, NotFiniteError, UnknownNameError
from vesalius.inputs.pairs import clusters_of
from vesalius.inputs.raw import Raw
from vesalius.protocol import content_hash

DISCOVERY, VALIDATION = "discovery", "validation"


@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """Rows [row, column] with a target each, such as patients with measurements and a diagnosis.

    target: [row] int64 number of the class (in `classes`), or floats, where there are no classes. labels: what else is
    known of each row, name -> one word a row (a hospital, a concept). groups: name -> one label a row: rows that share
    one are not independent (several samples of a patient); without any, every row stands for itself. splits: one name a
    row.

    Raises NotFiniteError naming row and column, InputError for columns that are named twice or too few names, for a
    target of another length or kind, for a class that does not exist, and when a label is missing.
    """

    values: Float[Tensor, "row column"]
    columns: tuple[str, ...]
    target: Shaped[Tensor, " row"]
    classes: tuple[str, ...] = ()
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    splits: tuple[str, ...] = ()
    name: str = ""
    rows_of: Table | None = None
    """What `subset` took these rows from; a split stands on its own."""

    def __post_init__(self) -> None:
        for part in ("columns", "classes", "splits"):
            object.__setattr__(self, part, tuple(map(str, getattr(self, part))))
        for part in ("labels", "groups"):
            object.__setattr__(self, part, {kind: tuple(map(str, row)) for kind, row in getattr(self, part).items()})
        self._check_values()
        self._check_target()
        named = {**self.labels, **self.groups, **({"splits": self.splits} if self.splits else {})}
        for kind, row in named.items():
            if len(row) != len(self.values):
                raise InputError(f"{kind!r} has {len(row)} labels for {len(self.values)} rows")

    def _check_values(self) -> None:
        values = self.values
        if values.ndim != 2 or not values.is_floating_point() or not values.numel():
            raise InputError(f"a table is floats [row, column]; got {values.dtype} {tuple(values.shape)}")
        if len(self.columns) != values.shape[1] or len(set(self.columns)) < len(self.columns):
            raise InputError(f"{values.shape[1]} columns need as many different names; got {list(self.columns)}")
        bad = (~torch.isfinite(values)).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            raise NotFiniteError(
                f"row {row}, column {self.columns[column]!r} is {float(values[row, column])}; fill in or leave out "
                "what is missing"
            )

    def _check_target(self) -> None:
        target = self.target
        if target.shape != (len(self.values),):
            raise InputError(f"a target is one number a row; got {tuple(target.shape)} for {len(self.values)} rows")
        if not self.classes:
            if not target.is_floating_point() or not bool(torch.isfinite(target).all()):
                raise InputError(f"a target without classes is finite floats; got {target.dtype}; give classes=")
            return
        if target.dtype != torch.long or len(set(self.classes)) < max(2, len(self.classes)):
            raise InputError(f"a target with classes is int64, of two or more of them; got {target.dtype}")
        if int(target.min()) < 0 or int(target.max()) >= len(self.classes):
            raise InputError(
                f"targets run from {int(target.min())} to {int(target.max())}, but there are {len(self.classes)} "
                f"classes: {list(self.classes)}"
            )

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        splits = "".join(f"; {count} {name}" for name, count in Counter(self.splits).items())
        what = f"classes {list(self.classes)}" if self.classes else "a number to predict"
        return f"Table({self.name + ', ' if self.name else ''}{len(self)} rows of {len(self.columns)}, {what}{splits})"

    @property
    def clusters(self) -> tuple[str, ...]:
        """Kinds of group that intervals respect; see `Pairs.clusters`."""
        return clusters_of(self.groups)

    @property
    def split_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.splits))

    def column(self, name: str) -> int:
        """The number of a column. Raises UnknownNameError for one that is not there."""
        if name not in self.columns:
            raise UnknownNameError("column", name, self.columns)
        return self.columns.index(name)

    def label(self, name: str) -> tuple[str, ...]:
        """Labels by name; "target" is the class to predict. Raises UnknownNameError for one that is not there."""
        if name == "target" and self.classes:
            return tuple(self.classes[number] for number in self.target.tolist())
        if name not in self.labels:
            raise UnknownNameError("label", name, [*self.labels, *(["target"] if self.classes else [])])
        return self.labels[name]

    def split(self, name: str) -> Table:
        """Rows of one split. Raises UnknownNameError for a split that is not there."""
        if name not in self.splits:
            raise UnknownNameError("split", name, self.split_names or ["(these rows have no splits; see divided)"])
        return replace(self.subset([row for row, split in enumerate(self.splits) if split == name]), rows_of=None)

    def subset(self, rows: Sequence[int]) -> Table:
        """The rows with these numbers, in this order."""
        pick = lambda labels: tuple(labels[row] for row in rows) if labels else ()  # noqa: E731
        index = torch.as_tensor(rows, dtype=torch.long)
        return replace(
            self,
            values=self.values[index],
            target=self.target[index],
            labels={kind: pick(row) for kind, row in self.labels.items()},
            groups={kind: pick(row) for kind, row in self.groups.items()},
            splits=pick(self.splits),
            rows_of=self.rows_of or self,
        )

    def divided(self, seed: int = 0, share: float = 0.5, names: tuple[str, str] = (DISCOVERY, VALIDATION)) -> Table:
        """With splits: a share of every class for the first, the others for the second.

        Equal rows, and rows of one group (of the first kind), stay on one side. Raises InputError when a class would be
        missing on a side.
        """
        kind = next(iter(self.groups), None)
        keys = self.example_hashes if kind is None else self.groups[kind]
        # A group goes with its first row's class; equal rows of two groups are rare, and the ledger refuses them.
        own = {key: row for row, key in reversed(list(enumerate(keys)))}
        strata = self.label("target") if self.classes else ("",) * len(self)
        first: set[str] = set()
        for stratum in sorted(set(strata)):
            members = sorted(key for key, row in own.items() if strata[row] == stratum)
            order = np.random.default_rng(seed).permutation(len(members))
            first |= {members[number] for number in order[: round(share * len(members))]}
        made = replace(self, splits=tuple(names[0 if key in first else 1] for key in keys))
        for name in names:
            made.check_classes(name)
        return made

    def check_classes(self, split: str) -> None:
        """Raises InputError when a split lacks a class, or all of its targets are alike."""
        rows = [row for row, own in enumerate(self.splits) if own == split]
        seen = set(self.target[rows].tolist())
        missing = [name for number, name in enumerate(self.classes) if number not in seen]
        if missing or len(seen) < 2:
            what = f"no row of class {missing[0]!r}" if missing else "only one value to predict"
            raise InputError(f"split {split!r} of {len(rows)} rows has {what}; give more rows of it, or leave it out")

    @cached_property
    def example_hashes(self) -> tuple[str, ...]:
        """One hash per row's values."""
        return Raw(self.values).hashes

    @property
    def source_hash(self) -> str:
        """Content hash of what `subset` took these rows from, such as the split that was opened; else their own."""
        return self.content_hash if self.rows_of is None else self.rows_of.content_hash

    @cached_property
    def content_hash(self) -> str:
        named = {part: {kind: list(row) for kind, row in getattr(self, part).items()} for part in ("labels", "groups")}
        listed = {part: list(getattr(self, part)) for part in ("columns", "classes", "splits")}
        return content_hash({"rows": list(self.example_hashes), "target": self.target.tolist(), **named, **listed})

    @property
    def inputs(self) -> Raw:
        """What a network is given."""
        return Raw(self.values)

    @property
    def numbers(self) -> Int[Tensor, " row"]:
        """Number of each row's class. Raises InputError where there are no classes."""
        if not self.classes:
            raise InputError(f"{self!r} has numbers to predict and no classes")
        return self.target
