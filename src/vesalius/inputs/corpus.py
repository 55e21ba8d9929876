"""Corpus: texts that a quantity is measured on, one example each, with groups and splits."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs.pairs import clusters_of
from vesalius.inputs.tokens import Tokens
from vesalius.protocol import content_hash


@dataclass(frozen=True, eq=False, repr=False)
class Corpus:
    """Texts, such as `Corpus(model.tokens(texts), splits=[...])`.

    groups: name -> one label per text (document, author, ...): texts that share a label are not independent. splits:
    one split name per text. Raises InputError when a label is missing.
    """

    tokens: Tokens
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    splits: tuple[str, ...] = ()
    name: str = ""
    rows_of: Corpus | None = None
    """What `subset` took these texts from; a split stands on its own."""

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, Tokens):
            raise InputError(f"a Corpus takes Tokens, such as model.tokens(texts); got {type(self.tokens).__name__}")
        object.__setattr__(self, "splits", tuple(self.splits))
        object.__setattr__(self, "groups", {kind: tuple(map(str, labels)) for kind, labels in self.groups.items()})
        for label, labels in {**self.groups, **({"splits": self.splits} if self.splits else {})}.items():
            if len(labels) != len(self.tokens):
                raise InputError(f"group {label!r} has {len(labels)} labels for {len(self.tokens)} texts")

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        splits = "".join(f"; {count} {name}" for name, count in Counter(self.splits).items())
        return f"Corpus({f'{self.name}, ' if self.name else ''}{len(self)} texts{splits})"

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
        groups = {kind: pick(labels) for kind, labels in self.groups.items()}
        tokens = self.tokens.take(torch.as_tensor(rows, dtype=torch.long))
        return replace(self, tokens=tokens, groups=groups, splits=pick(self.splits), rows_of=self.rows_of or self)

    @cached_property
    def example_hashes(self) -> tuple[str, ...]:
        """One hash per text."""
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
        return content_hash({"texts": list(self.example_hashes), "groups": groups, "splits": list(self.splits)})
