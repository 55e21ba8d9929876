"""Inputs: Tokens (one batch of text) and Pairs (clean and corrupted prompts with an answer and a distractor).

Sequences are padded on the right: with causal attention nothing before the padding can see it, so an example's numbers
do not depend on its neighbours' lengths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vesalius.errors import InputError, PairsError, UnknownNameError
from vesalius.records import content_hash
from vesalius.site import Site

LOGITS = Site("logits")


@dataclass(frozen=True, eq=False)
class Tokens:
    """Token ids with the mask of real tokens.

    ids: [batch, pos], int64. mask: [batch, pos], True on real tokens; default all real. decoder: [batch, pos], what the
    decoder of an encoder-decoder model is given; default its start token. landmarks: name -> [batch] or [batch, n]
    numbers of tokens in each prompt's own sequence, -1 for none: positions that interventions can name.

    Raises InputError for shapes that do not fit and for a landmark outside the prompts.
    """

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"] | None = None
    decoder: Int[Tensor, "batch decoder_pos"] | None = None
    landmarks: Mapping[str, Int[Tensor, batch * n]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_ids("ids", self.ids)
        if self.mask is not None and self.mask.shape != self.ids.shape:
            raise InputError(
                f"mask has shape {tuple(self.mask.shape)}, ids {tuple(self.ids.shape)}; they must be equal"
            )
        _check_decoder(self.decoder, len(self.ids))
        check_landmarks(self.landmarks, self.lengths)

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """True on real tokens."""
        return torch.ones_like(self.ids, dtype=torch.bool) if self.mask is None else self.mask

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        return self.real.sum(1)

    def real_at(self, site: Site) -> Bool[Tensor, "batch pos"]:
        """True on the real tokens that a site counts: the decoder's, or the prompts'."""
        if self.decoder is None or site.of_encoder:
            return self.real
        return torch.ones_like(self.decoder, dtype=torch.bool)

    def take(self, rows: Int[Tensor, " row"], width: int | None = None) -> Tokens:
        """Some of the prompts, perhaps cut to a width that holds them."""
        return Tokens(
            self.ids[rows, :width],
            None if self.mask is None else self.mask[rows, :width],
            None if self.decoder is None else self.decoder[rows],
            {name: at[rows] for name, at in self.landmarks.items()},
        )

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]], pad: int = 0) -> Tokens:
        """Right-padded batch from lists of token ids. Raises InputError for no rows or an empty one."""
        ids, lengths = pad_rows(rows, pad)
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
        return cls(ids, None if bool(mask.all()) else mask)

    @cached_property
    def content_hash(self) -> str:
        rows = [[int(i) for i in row[keep]] for row, keep in zip(self.ids, self.real, strict=True)]
        return content_hash(rows if self.decoder is None else [rows, self.decoder.tolist()])


def _check_decoder(ids: Tensor | None, batch: int) -> None:
    if ids is None:
        return
    _check_ids("decoder", ids)
    if len(ids) != batch:
        raise InputError(f"decoder has {len(ids)} rows for {batch} prompts")


def check_landmarks(landmarks: Mapping[str, Tensor], lengths: Int[Tensor, " batch"]) -> None:
    """Raises InputError for a landmark that is not int64 [batch] or [batch, n], or lies outside a prompt."""
    for name, at in landmarks.items():
        if at.dtype != torch.long or at.ndim not in (1, 2) or len(at) != len(lengths):
            raise InputError(
                f"landmark {name!r} must be int64 [{len(lengths)}] or [{len(lengths)}, n]; got {at.dtype} "
                f"{tuple(at.shape)}"
            )
        outside = (at < -1) | (at >= lengths.to(at.device).view(-1, *[1] * (at.ndim - 1)))
        if bool(outside.any()):
            row = int(outside.nonzero()[0, 0])
            raise InputError(
                f"landmark {name!r} of prompt {row} is {at[row].tolist()}, but the prompt has {int(lengths[row])} "
                "tokens, numbered from 0 (-1: none)"
            )


def pad_rows(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, " batch"]]:
    """Right-padded ids [batch, pos] and lengths [batch]."""
    if not rows or any(len(row) == 0 for row in rows):
        raise InputError("no tokens: give at least one prompt, and none of them empty")
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], dtype=torch.long)
    return ids, torch.tensor([len(row) for row in rows])


def _check_ids(name: str, ids: Tensor) -> None:
    if ids.ndim != 2 or ids.dtype != torch.long:
        raise InputError(f"{name} must be int64 token ids [batch, pos]; got {ids.dtype} {tuple(ids.shape)}")
    if ids.numel() == 0:
        raise InputError(f"{name} is empty: shape {tuple(ids.shape)}")
    if int(ids.min()) < 0:
        raise InputError(f"{name} holds a negative token id ({int(ids.min())})")


@dataclass(frozen=True, eq=False)
class Pairs:
    """Clean and corrupted prompts, aligned position by position.

    clean, corrupted: [example, pos] int64, right-padded. answer, distractor: [example] token ids: right and wrong
    continuation of the clean prompt. lengths: [example] real tokens. read: [example] position where the metric
    reads; default the last real token. groups: name -> one label per example (template, names, ...): prompts that
    share a label are not independent. splits: one split name per example. corruption: what was done to the clean
    prompts. beginning: what the prompts begin with ("<bos>" token text, or "none"). landmarks: name -> [example] or
    [example, n] positions, -1 for none; interventions can name them. decoder: [example, pos], what the decoder of an
    encoder-decoder model is given; the metric then reads its last position.

    Raises PairsError naming the pair when the two prompts differ in length or not at all, when answer equals
    distractor, or when a label is missing.
    """

    clean: Int[Tensor, "example pos"]
    corrupted: Int[Tensor, "example pos"]
    answer: Int[Tensor, " example"]
    distractor: Int[Tensor, " example"]
    lengths: Int[Tensor, " example"] | None = None
    read: Int[Tensor, " example"] | None = None
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    splits: tuple[str, ...] = ()
    corruption: str = "corrupted"
    task: str = ""
    beginning: str = ""
    landmarks: Mapping[str, Int[Tensor, example * n]] = field(default_factory=dict)
    decoder: Int[Tensor, "example decoder_pos"] | None = None

    def __post_init__(self) -> None:
        for name in ("clean", "corrupted"):
            _check_ids(name, getattr(self, name))
        if self.clean.shape != self.corrupted.shape:
            raise PairsError(
                f"clean is {tuple(self.clean.shape)} and corrupted {tuple(self.corrupted.shape)}: "
                "pairs must be aligned position by position, with equal lengths"
            )
        n, width = self.clean.shape
        if self.lengths is None:
            object.__setattr__(self, "lengths", torch.full((n,), width))
        if self.read is None:
            object.__setattr__(self, "read", self.size - 1)
        self._check_rows(n, width)
        _check_decoder(self.decoder, n)
        check_landmarks(self.landmarks, self.size)

    def _check_rows(self, n: int, width: int) -> None:
        for name in ("answer", "distractor", "lengths", "read"):
            value = getattr(self, name)
            if value.shape != (n,) or value.dtype != torch.long:
                raise PairsError(f"{name} must be int64 [{n}], one per pair; got {value.dtype} {tuple(value.shape)}")
        for label, labels in {**self.groups, **({"splits": self.splits} if self.splits else {})}.items():
            if len(labels) != n:
                raise PairsError(f"group {label!r} has {len(labels)} labels for {n} pairs")
        bad = {
            "length out of range": (self.size < 1) | (self.size > width),
            "read position past the end": (self.at < 0) | (self.at >= self.size),
            "answer equals distractor": self.answer == self.distractor,
            "clean and corrupted prompts are identical": ~(self.differs & self.real).any(1),
        }
        for what, rows in bad.items():
            if bool(rows.any()):
                raise PairsError(f"pair {int(rows.nonzero()[0])}: {what}")

    def __len__(self) -> int:
        return self.clean.shape[0]

    @property
    def size(self) -> Int[Tensor, " example"]:
        """Real tokens of each pair."""
        assert self.lengths is not None
        return self.lengths

    @property
    def at(self) -> Int[Tensor, " example"]:
        """Position where the metric reads."""
        assert self.read is not None
        return self.read

    def read_at(self, site: Site = LOGITS) -> Int[Tensor, " example"]:
        """Where the metric reads, among the tokens that a site counts: a decoder's last, or `at`."""
        if self.decoder is None or site.of_encoder:
            return self.at
        return torch.full_like(self.at, self.decoder.shape[1] - 1)

    @property
    def real(self) -> Bool[Tensor, "example pos"]:
        return torch.arange(self.clean.shape[1], device=self.clean.device)[None] < self.size[:, None]

    @property
    def differs(self) -> Bool[Tensor, "example pos"]:
        """Where clean and corrupted tokens differ."""
        return self.clean != self.corrupted

    def tokens(self, which: str) -> Tokens:
        """The clean or the corrupted prompts as Tokens."""
        if which not in ("clean", "corrupted"):
            raise UnknownNameError("prompts", which, ["clean", "corrupted"])
        real = self.real
        return Tokens(getattr(self, which), None if bool(real.all()) else real, self.decoder, self.landmarks)

    @property
    def split_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.splits))

    def split(self, name: str) -> Pairs:
        """Pairs of one split. Raises UnknownNameError for a split that is not there."""
        if name not in self.splits:
            raise UnknownNameError("split", name, self.split_names or ["(these pairs have no splits)"])
        return self.subset([row for row, split in enumerate(self.splits) if split == name])

    def subset(self, rows: Sequence[int]) -> Pairs:
        """The pairs with these row numbers, in this order."""
        index = torch.as_tensor(rows, dtype=torch.long)
        pick = lambda labels: tuple(labels[int(row)] for row in index)  # noqa: E731
        return replace(
            self,
            clean=self.clean[index],
            corrupted=self.corrupted[index],
            answer=self.answer[index],
            distractor=self.distractor[index],
            lengths=self.size[index],
            read=self.at[index],
            groups={name: pick(labels) for name, labels in self.groups.items()},
            splits=pick(self.splits) if self.splits else (),
            landmarks={name: at[index] for name, at in self.landmarks.items()},
            decoder=None if self.decoder is None else self.decoder[index],
        )

    @cached_property
    def example_hashes(self) -> tuple[str, ...]:
        """One hash per clean prompt: pairs that share the clean prompt share the example, whatever the corruption."""
        rows = self.clean.tolist()
        return tuple(
            hashlib.sha256(repr(row[:n]).encode()).hexdigest() for row, n in zip(rows, self.size.tolist(), strict=True)
        )

    @cached_property
    def content_hash(self) -> str:
        fields = {
            name: getattr(self, name).tolist() for name in ("clean", "corrupted", "answer", "distractor", "lengths")
        }
        if self.decoder is not None:
            fields["decoder"] = self.decoder.tolist()
        return content_hash(
            {**fields, "read": self.at.tolist(), "groups": {k: list(v) for k, v in self.groups.items()},
             "splits": list(self.splits), "corruption": self.corruption}
        )  # fmt: skip
