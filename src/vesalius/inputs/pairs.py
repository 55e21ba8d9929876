"""Pairs: clean and corrupted inputs with an answer and a distractor."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vesalius.errors import InputError, NotFiniteError, PairsError, UnknownNameError
from vesalius.inputs.raw import Inputs, Raw
from vesalius.inputs.tokens import Tokens, bring_to_cpu, check_decoder, check_ids, check_named_positions, check_tensor
from vesalius.protocol import content_hash
from vesalius.site import Site

LOGITS = Site("logits")


@dataclass(frozen=True, eq=False, repr=False)
class Pairs:
    """Clean and corrupted prompts, aligned position by position; or images, or other floats a network takes.

    clean, corrupted: [example, pos] int64, right-padded; or floats [example, ...], such as images, whose answer and
    distractor are classes (lengths, named_positions and decoder are for prompts only). answer, distractor: [example]
    token ids: right and wrong continuation of the clean prompt; of several tokens [example, token], -1 after the last:
    these are scored as sequences, see `teacher_forced`. lengths: [example] real tokens. read: [example] position
    where the metric reads; default the last real token (of logits [example, class] there is only one).
    groups: name -> one label per example (template, names, ...): prompts that share a label are not independent, nor
    are those that share one of the names of a label such as "Mary|John".
    splits: one split name per example. corruption: what was done to the clean prompts. bos: text of the token that
    prompts begin with, or "none". named_positions: name -> [example] or [example, n] positions, -1 for none;
    interventions can name them. decoder: [example, pos], what the decoder of an encoder-decoder model is given; the
    metric then reads its last position.

    Raises PairsError naming the pair when the two prompts differ in length or not at all, when answer equals
    distractor, or when a label is missing. Raises NotFiniteError for floats that hold NaN or infinity.
    """

    clean: Int[Tensor, "example pos"] | Float[Tensor, "example ..."]
    corrupted: Int[Tensor, "example pos"] | Float[Tensor, "example ..."]
    answer: Int[Tensor, example * token]
    distractor: Int[Tensor, example * token]
    lengths: Int[Tensor, " example"] | None = None
    read: Int[Tensor, " example"] | None = None
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    splits: tuple[str, ...] = ()
    corruption: str = "corrupted"
    task: str = ""
    bos: str = ""
    named_positions: Mapping[str, Int[Tensor, example * n]] = field(default_factory=dict)
    decoder: Int[Tensor, "example decoder_pos"] | None = None
    targets: Int[Tensor, "example token"] | None = None
    """Of teacher-forced rows: the tokens that are scored, the first one after the read position; -1 after the last."""
    rows_of: Pairs | None = None
    """What `subset` took these rows from; a split stands on its own."""

    def __post_init__(self) -> None:
        for name in ("clean", "corrupted", "answer", "distractor"):
            check_tensor(name, getattr(self, name))
        for name in ("clean", "corrupted"):
            _check_side(name, getattr(self, name), self.raw)
        labels = ("answer", "distractor", "lengths", "read", "named_positions", "decoder", "targets")
        bring_to_cpu(self, "clean", "corrupted", *labels)
        if self.clean.shape != self.corrupted.shape:
            raise PairsError(
                f"clean is {tuple(self.clean.shape)} and corrupted {tuple(self.corrupted.shape)}: "
                "pairs must be aligned position by position, with equal lengths"
            )
        self._align_answers()
        n, width = self.clean.shape[0], 1 if self.raw else self.clean.shape[1]
        if self.raw and (self.named_positions or self.decoder is not None):
            raise PairsError("named_positions and decoder are for prompts; these pairs hold floats")
        if self.lengths is None:
            object.__setattr__(self, "lengths", torch.full((n,), width))
        if self.read is None:
            # The last position, whatever the number of them.
            object.__setattr__(self, "read", self.size - (2 if self.raw else 1))
        self._check_rows(n, width)
        check_decoder(self.decoder, n)
        check_named_positions(self.named_positions, self.size)

    def _align_answers(self) -> None:
        """Both [example], or both [example, token] of one width when any has several tokens."""
        both = [label if label.ndim > 1 else label[:, None] for label in (self.answer, self.distractor)]
        width = max((label.shape[1] for label in both), default=1)
        for name, label in zip(("answer", "distractor"), both, strict=True):
            padded = torch.nn.functional.pad(label, (0, width - label.shape[1]), value=-1)
            object.__setattr__(self, name, padded if width > 1 else padded[:, 0])

    def _check_rows(self, n: int, width: int) -> None:
        tokens = self.answer.shape[1:]
        for name in ("answer", "distractor", "lengths", "read"):
            value, shape = getattr(self, name), (n, *tokens) if name in ("answer", "distractor") else (n,)
            if value.shape != shape or value.dtype != torch.long:
                raise PairsError(
                    f"{name} must be int64 {list(shape)}, one per pair; got {value.dtype} {tuple(value.shape)}"
                )
            if len(shape) > 1 and bool(((value < 0).int().diff(dim=1) < 0).any() or (value[:, 0] < 0).any()):
                raise PairsError(f"{name} of several tokens has them first and -1 only after the last")
        for label, labels in {**self.groups, **({"splits": self.splits} if self.splits else {})}.items():
            if len(labels) != n:
                raise PairsError(f"group {label!r} has {len(labels)} labels for {n} pairs")
        bad = {
            "length out of range": (self.size < 1) | (self.size > width),
            "read position past the end": (self.at < -1) if self.raw else (self.at < 0) | (self.at >= self.size),
            "answer equals distractor": (self.answer == self.distractor).reshape(n, -1).all(1),
            "clean and corrupted prompts are identical": ~(self.differs & self.real).any(1),
        }
        for what, rows in bad.items():
            if bool(rows.any()):
                raise PairsError(f"pair {int(rows.nonzero()[0])}: {what}")

    def __len__(self) -> int:
        return self.clean.shape[0]

    def __repr__(self) -> str:
        what = (
            f"{list(self.clean.shape[1:])}" if self.raw else f"{int(self.size.min())} to {int(self.size.max())} tokens"
        )
        splits = ", ".join(f"{count} {name}" for name, count in Counter(self.splits).items())
        kept = {"groups": list(self.groups), "named_positions": list(self.named_positions)}
        told = "".join(f"; {name} {', '.join(names)}" for name, names in kept.items() if names)
        task = f"{self.task}, " if self.task else ""
        return f"Pairs({task}{len(self)} of {what}, {self.corruption}{f'; {splits}' if splits else ''}{told})"

    @property
    def raw(self) -> bool:
        """Floats, such as images, and no tokens."""
        return self.clean.is_floating_point()

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

    @property
    def several(self) -> bool:
        """Whether answers have several tokens."""
        return self.answer.ndim > 1

    def teacher_forced(self) -> Pairs:
        """Twice as many rows: every prompt with its answer, then every one with its distractor, up to the last token.

        A row's `targets` are scored where each would be predicted. Positions of the prompt stay what they are. Raises
        PairsError for floats, for a decoder, and where the metric reads before the prompt's end.
        """
        if self.raw or self.decoder is not None or not torch.equal(self.at, self.size - 1):
            raise PairsError(
                f"answers of several tokens follow the end of a decoder-only model's prompts; got {self!r}"
            )
        targets = torch.cat([self.answer, self.distractor])
        twice = [*range(len(self)), *range(len(self))]
        rows, more = self.subset(twice), targets.shape[1] - 1
        at = rows.size[:, None] + torch.arange(more)
        follows = targets[:, :-1].clamp_min(0)
        clean, corrupted = (torch.nn.functional.pad(side, (0, more)) for side in (rows.clean, rows.corrupted))
        return replace(
            rows,
            clean=clean.scatter(1, at, follows),
            corrupted=corrupted.scatter(1, at, follows),
            lengths=rows.size + (targets >= 0).sum(1) - 1,
            answer=targets[:, 0],
            # Nothing reads it; it only has to be another token.
            distractor=(targets[:, 0] == 0).long(),
            targets=targets,
        )

    @property
    def reads(self) -> Int[Tensor, "example read"]:
        """Positions where the metric reads, of each pair; past a row's last target its last one again."""
        if self.targets is None:
            return self.at[:, None]
        last = (self.targets >= 0).sum(1, keepdim=True) - 1
        return self.at[:, None] + torch.minimum(torch.arange(self.targets.shape[1]), last)

    @property
    def ends(self) -> Int[Tensor, " example"]:
        """Position after the last one that the metric reads."""
        return self.reads.amax(1) + 1

    def read_at(self, site: Site = LOGITS) -> Int[Tensor, " example"]:
        """Where the metric reads, among the tokens that a site counts: a decoder's last, or `at`."""
        if self.decoder is None or site.of_encoder:
            return self.at
        return torch.full_like(self.at, self.decoder.shape[1] - 1)

    @property
    def real(self) -> Bool[Tensor, "example pos"]:
        if self.raw:
            return torch.ones(len(self), 1, dtype=torch.bool)
        return torch.arange(self.clean.shape[1], device=self.clean.device)[None] < self.size[:, None]

    @property
    def differs(self) -> Bool[Tensor, "example pos"]:
        """Where clean and corrupted tokens differ."""
        differs = self.clean != self.corrupted
        return differs.flatten(1).any(1, keepdim=True) if self.raw else differs

    def inputs(self, which: str) -> Inputs:
        """What the network is given, clean or corrupted: Tokens, or Raw."""
        return Raw(getattr(self, _side(which))) if self.raw else self.tokens(which)

    def tokens(self, which: str) -> Tokens:
        """The clean or the corrupted prompts as Tokens. Raises InputError for pairs that hold floats."""
        which = _side(which)
        if self.raw:
            raise InputError(f"{self!r} holds floats and no prompts; this takes prompts (vs.sweep takes both)")
        real = self.real
        return Tokens(getattr(self, which), None if bool(real.all()) else real, self.decoder, self.named_positions)

    @property
    def clusters(self) -> tuple[str, ...]:
        """Kinds of group that intervals respect: template and names as far as there are any, else the first two.

        A kind of which all pairs share one label is left out: nothing can be said about its spread. A label "Mary|John"
        is in two groups, that of each name (`stats.design`).
        """
        return clusters_of(self.groups)

    @property
    def split_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.splits))

    def sampled_groups(self) -> Pairs:
        """The pairs with only those kinds of group whose labels no two splits share.

        A kind that splits share on purpose (an order, a gender) is a condition and no sample: kept as groups, it would
        make every split overlap with every other.
        """
        kept = {kind: labels for kind, labels in self.groups.items() if not self.shared_labels(kind)}
        return replace(self, groups=kept)

    def shared_labels(self, kind: str) -> set[str]:
        """Labels of a kind of group that occur in more than one split; "a|b" counts as two."""
        seen: dict[str, set[str]] = {}
        for label, split in zip(self.groups[kind], self.splits, strict=True):
            seen.setdefault(split, set()).update(label.split("|"))
        return {
            label for one, labels in seen.items() for o, others in seen.items() if o != one for label in labels & others
        }

    def split(self, name: str) -> Pairs:
        """Pairs of one split. Raises UnknownNameError for a split that is not there."""
        if name not in self.splits:
            raise UnknownNameError("split", name, self.split_names or ["(these pairs have no splits)"])
        return replace(self.subset([row for row, split in enumerate(self.splits) if split == name]), rows_of=None)

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
            named_positions={name: at[index] for name, at in self.named_positions.items()},
            decoder=None if self.decoder is None else self.decoder[index],
            targets=None if self.targets is None else self.targets[index],
            rows_of=self.rows_of or self,
        )

    @cached_property
    def example_hashes(self) -> tuple[str, ...]:
        """One hash per clean prompt: pairs that share the clean prompt share the example, whatever the corruption."""
        if self.raw:
            return Raw(self.clean).hashes
        rows = self.clean.tolist()
        return tuple(
            hashlib.sha256(repr(row[:n]).encode()).hexdigest() for row, n in zip(rows, self.size.tolist(), strict=True)
        )

    @property
    def source_hash(self) -> str:
        """Content hash of what `subset` took these rows from, such as the split that was opened; else their own."""
        return self.content_hash if self.rows_of is None else self.rows_of.content_hash

    @cached_property
    def content_hash(self) -> str:
        fields = {name: getattr(self, name).tolist() for name in ("answer", "distractor", "lengths")}
        for name in ("clean", "corrupted"):
            side = getattr(self, name)
            fields[name] = list(Raw(side).hashes) if self.raw else side.tolist()
        for name in ("decoder", "targets"):
            if getattr(self, name) is not None:
                fields[name] = getattr(self, name).tolist()
        return content_hash(
            {
                **fields,
                "read": self.at.tolist(),
                "groups": {k: list(v) for k, v in self.groups.items()},
                "splits": list(self.splits),
                "corruption": self.corruption,
            }
        )


def clusters_of(groups: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """See `Pairs.clusters`."""
    named = [kind for kind in ("template", "names") if kind in groups] or sorted(groups)[:2]
    return tuple(kind for kind in named if len(set(groups[kind])) > 1)


def _side(which: str) -> str:
    if which not in ("clean", "corrupted"):
        raise UnknownNameError("prompts", which, ["clean", "corrupted"])
    return which


def _check_side(name: str, side: Tensor, raw: bool) -> None:
    if not raw:
        check_ids(name, side)
    elif not bool(torch.isfinite(Raw(side).values).all()):
        raise NotFiniteError(f"{name} holds NaN or infinity")
