"""Corpus: texts or images that a quantity is measured on, one example each, with groups and splits."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs.pairs import clusters_of
from vesalius.inputs.raw import Raw
from vesalius.inputs.tokens import Tokens
from vesalius.protocol import content_hash


@dataclass(frozen=True, eq=False, repr=False)
class Corpus:
    """Texts, such as `Corpus(model.tokens(texts), splits=[...])`, or images, `Corpus(Raw(images))`.

    groups: name -> one label per text (document, author, ...): texts that share a label are not independent. splits:
    one split name per text. Raises InputError when a label is missing.
    """

    inputs: Tokens | Raw
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    splits: tuple[str, ...] = ()
    name: str = ""
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What is known of each example: name -> one value each. No groups: splits share them on purpose."""
    rows_of: Corpus | None = None
    """What `subset` took these texts from; a split stands on its own."""

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Tokens | Raw):
            raise InputError(
                f"a Corpus takes Tokens, such as model.tokens(texts), or Raw images; got {type(self.inputs).__name__}"
            )
        object.__setattr__(self, "splits", tuple(self.splits))
        object.__setattr__(self, "groups", {kind: tuple(map(str, labels)) for kind, labels in self.groups.items()})
        object.__setattr__(self, "labels", {kind: tuple(map(str, some)) for kind, some in self.labels.items()})
        given = {**self.groups, **self.labels, **({"splits": self.splits} if self.splits else {})}
        for label, labels in given.items():
            if len(labels) != len(self.inputs):
                raise InputError(f"group {label!r} has {len(labels)} labels for {len(self.inputs)} {self.kind}")

    @property
    def tokens(self) -> Tokens:
        """The texts. Raises InputError for images."""
        if not isinstance(self.inputs, Tokens):
            raise InputError(f"this is measured on texts; got {self!r}")
        return self.inputs

    @property
    def raw(self) -> Raw:
        """The images. Raises InputError for texts."""
        if not isinstance(self.inputs, Raw):
            raise InputError(f"this is measured on images; got {self!r}")
        return self.inputs

    @property
    def kind(self) -> str:
        """What one example is, in words."""
        return "texts" if isinstance(self.inputs, Tokens) else "images"

    def __len__(self) -> int:
        return len(self.inputs)

    def __repr__(self) -> str:
        splits = "".join(f"; {count} {name}" for name, count in Counter(self.splits).items())
        return f"Corpus({f'{self.name}, ' if self.name else ''}{len(self)} {self.kind}{splits})"

    @property
    def clusters(self) -> tuple[str, ...]:
        """Kinds of group that intervals respect; see `Pairs.clusters`."""
        return clusters_of(self.groups)

    @property
    def split_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.splits))

    def split(self, name: str) -> Corpus:
        """Texts of one split. Raises UnknownNameError for a split that is not there."""
        if name not in self.splits:
            raise UnknownNameError("split", name, self.split_names or ["(these texts have no splits)"])
        return replace(self.subset([row for row, split in enumerate(self.splits) if split == name]), rows_of=None)

    def subset(self, rows: Sequence[int]) -> Corpus:
        """The texts with these row numbers, in this order."""
        pick = lambda labels: tuple(labels[row] for row in rows) if labels else ()  # noqa: E731
        groups, known = ({kind: pick(some) for kind, some in each.items()} for each in (self.groups, self.labels))
        inputs = self.inputs.take(torch.as_tensor(rows, dtype=torch.long))
        return replace(
            self, inputs=inputs, groups=groups, labels=known, splits=pick(self.splits), rows_of=self.rows_of or self
        )

    @cached_property
    def example_hashes(self) -> tuple[str, ...]:
        """One hash per example."""
        if isinstance(self.inputs, Raw):
            return self.inputs.hashes
        rows = zip(self.tokens.ids.tolist(), self.tokens.real.tolist(), strict=True)
        kept = ([token for token, real in zip(ids, mask, strict=True) if real] for ids, mask in rows)
        return tuple(hashlib.sha256(repr(row).encode()).hexdigest() for row in kept)

    @property
    def source_hash(self) -> str:
        """Content hash of what `subset` took these texts from, such as the split that was opened; else their own."""
        return self.content_hash if self.rows_of is None else self.rows_of.content_hash

    @cached_property
    def content_hash(self) -> str:
        groups = {kind: list(labels) for kind, labels in self.groups.items()}
        known = {"labels": {kind: list(some) for kind, some in self.labels.items()}} if self.labels else {}
        whole = {self.kind: list(self.example_hashes), "groups": groups, "splits": list(self.splits), **known}
        return content_hash(whole)
