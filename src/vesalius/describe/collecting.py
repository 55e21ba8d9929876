"""What is kept of a part while text streams by: its strongest, a random sample of, and its missed tokens.

Everything has a fixed size per part, whatever the length of the text. A sample is kept by the smallest of random keys,
one for each token and part, so that it does not depend on how the text is cut into groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from vesalius.data.packing import Group

BINS, PER_OCTAVE, LOWEST = 128, 4, -16
"""Bins of activations: four an octave, from 2^-16 on; the first and the last take what lies outside."""
TOKENS_OF_PART = 4
"""Tokens that a part fires on most often, where it is looked for when it does not fire."""
ROWS_OF_TOKEN = 4
"""Rows of each of these tokens that are looked at in a group."""
NOTHING = -1
_TENSORS = ("threshold", "active", "histogram", "total", "background_values")
COUNTS = ("groups", "tokens", "contexts")
KEPT = ("top", "sample", "near", "background")


@dataclass(frozen=True)
class Sizes:
    """How much is kept for each part. before, after: tokens shown on both sides of one that is kept.

    background: random tokens, the same for all parts, to know what is usual.
    """

    top: int = 24
    sample: int = 64
    near: int = 16
    background: int = 512
    before: int = 24
    after: int = 7

    @property
    def window(self) -> int:
        return self.before + 1 + self.after


@dataclass(eq=False)
class Kept:
    """Tokens kept for each part, the best first: those with the smallest key.

    key, value: [part, kept], infinity and 0 where there is none. document, offset: where in the texts. ids, values:
    [part, kept, window] tokens around, and the part's value there; -1 and NaN past the ends.
    """

    key: Float[Tensor, "part kept"]
    value: Float[Tensor, "part kept"]
    document: Int[Tensor, "part kept"]
    offset: Int[Tensor, "part kept"]
    ids: Int[Tensor, "part kept window"]
    values: Float[Tensor, "part kept window"]

    @classmethod
    def empty(cls, parts: int, kept: int, window: int) -> Kept:
        at = torch.full((parts, kept), NOTHING)
        return cls(
            key=torch.full((parts, kept), float("inf"), dtype=torch.float64),
            value=torch.zeros(parts, kept),
            document=at,
            offset=at.clone(),
            ids=torch.full((parts, kept, window), NOTHING, dtype=torch.int32),
            values=torch.full((parts, kept, window), float("nan"), dtype=torch.float16),
        )

    def filled(self) -> tuple[Int[Tensor, " n"], dict[str, Tensor]]:
        """What is there: parts, and columns."""
        part, place = self.key.isfinite().nonzero(as_tuple=True)
        return part, {name: column[part, place] for name, column in vars(self).items()}

    def better(self, part: Int[Tensor, " n"], key: Float[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Which keys are smaller than the largest that is kept for their part."""
        return key < self.key[part, -1]

    def add(self, part: Int[Tensor, " n"], new: Mapping[str, Tensor], distinct: bool = False) -> None:
        """Take in what is better than what is there. distinct: of equal windows only the best."""
        touched, number = part.unique(return_inverse=True)
        columns = {name: torch.cat([getattr(self, name)[touched].flatten(0, 1), new[name]]) for name in vars(self)}
        kept = self.key.shape[1]
        owner = torch.cat([torch.arange(len(touched)).repeat_interleave(kept), number])
        order = _by(owner, columns["key"])
        if distinct:
            order = order[_first_of_each(owner[order], columns["ids"][order], columns["key"][order])]
        owner = owner[order]
        starts = torch.searchsorted(owner, torch.arange(len(touched)))
        rank = torch.arange(len(owner)) - starts[owner]
        inside = rank < kept
        whole = Kept.empty(len(touched), kept, self.ids.shape[2])
        for name, column in columns.items():
            filled = getattr(whole, name)
            filled[owner[inside], rank[inside]] = column[order[inside]]
            getattr(self, name)[touched] = filled


def _by(owner: Tensor, key: Tensor) -> Tensor:
    """Order by owner, then by key."""
    order = key.argsort(stable=True)
    return order[owner[order].argsort(stable=True)]


def _few_of_each(tokens: Int[Tensor, " row"], key: Tensor) -> Int[Tensor, " some"]:
    """A few rows of each token, at random: of "the" there are more than are worth a look."""
    order = _by(tokens, key)
    ranked = tokens[order]
    rank = torch.arange(len(order)) - torch.searchsorted(ranked, ranked)
    return order[rank < ROWS_OF_TOKEN]


def _first_of_each(owner: Tensor, windows: Tensor, key: Tensor) -> Tensor:
    """Mask of the first of equal windows of an owner; rows without a key are let through."""
    digest = torch.zeros(len(windows), dtype=torch.int64)
    for column in windows.to(torch.int64).unbind(1):
        digest = _mixed(digest + column)
    # Sorted by digest within owners, a repeated window follows its better copy.
    order = _by(owner, digest)
    again = torch.zeros(len(owner), dtype=torch.bool)
    same = (owner[order][1:] == owner[order][:-1]) & (digest[order][1:] == digest[order][:-1])
    again[order[1:][same]] = True
    return ~again | ~key.isfinite()


def _mixed(x: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """64 bits that look random (splitmix64; Steele et al. 2014, figure 12), in two's complement."""
    x = x + -7046029254386353131
    x = (x ^ _shifted(x, 30)) * -4658895280553007687
    x = (x ^ _shifted(x, 27)) * -7723592293110705685
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def random_keys(token: Int[Tensor, " n"], part: Int[Tensor, " n"], seed: int) -> Float[Tensor, " n"]:
    """One number in [0, 1) for each token and part, the same in every run."""
    mixed = _mixed(_mixed(token + seed * 1_000_003) + part)
    return _shifted(mixed, 11).double() / 2.0**53


class Collector:
    """Takes in groups of text with the values of all parts there.

    sparse: parts that are zero where inactive. head: tokens that were put before each piece of text, 0 or 1.

    A part that is not sparse counts as active where its value is two standard deviations above its mean, both of the
    first group, and above zero.
    """

    def __init__(self, parts: int, sparse: Bool[Tensor, " part"], sizes: Sizes, seed: int, head: int = 0) -> None:
        self.sizes, self.seed, self._sparse, self._head = sizes, seed, sparse, head
        self.groups = self.tokens = self.contexts = 0
        self.threshold = torch.zeros(parts)
        self.active = torch.zeros(parts, dtype=torch.int64)
        self.histogram = torch.zeros(parts, BINS, dtype=torch.int64)
        self.total = torch.zeros(parts, dtype=torch.float64)
        self.top = Kept.empty(parts, sizes.top, sizes.window)
        self.sample = Kept.empty(parts, sizes.sample, sizes.window)
        self.near = Kept.empty(parts, sizes.near, sizes.window)
        self.background = Kept.empty(1, sizes.background, sizes.window)
        self.background_values = torch.zeros(sizes.background, parts, dtype=torch.float16)

    def begin(self, values: Float[Tensor, "row part"]) -> None:
        """What counts as active, from the values of the first group of all."""
        self.threshold = torch.where(self._sparse, 0.0, (values.mean(0) + 2 * values.std(0)).clamp_min(0.0))

    def add(self, group: Group, values: Float[Tensor, "row part"], first: int | None = None) -> None:
        """values: of the group's rows, on the CPU. first: number of its first row; default the rows added before."""
        where = Where.of(group, self.tokens if first is None else first, self._head)
        if not (self.tokens if first is None else first):
            self.begin(values)
        row, part = (values > self.threshold).nonzero(as_tuple=True)
        found = values[row, part]
        self._count(part, found)
        self._sampled(self.sample, where, values, row, part)
        self._strongest(where, values)
        row, part = self._missed(where, values)
        self._sampled(self.near, where, values, row, part)
        self._usual(where, values)
        self.groups += 1
        self.tokens += len(values)
        self.contexts += len(group.contexts)

    def _count(self, part: Tensor, found: Tensor) -> None:
        n = len(self.active)
        self.active += torch.bincount(part, minlength=n)
        self.total += torch.zeros(n, dtype=torch.float64).index_add_(0, part, found.double())
        bins = ((found.log2() - LOWEST) * PER_OCTAVE).floor().long().clamp(0, BINS - 1)
        self.histogram += torch.bincount(part * BINS + bins, minlength=n * BINS).view(n, BINS)

    def _sampled(self, kept: Kept, where: Where, values: Tensor, row: Tensor, part: Tensor) -> None:
        key = random_keys(where.token[row], part, self.seed)
        better = kept.better(part, key)
        row, part = row[better], part[better]
        kept.add(part, {"key": key[better], **where.around(values, row, part, self.sizes)})

    def _usual(self, where: Where, values: Tensor) -> None:
        """Random tokens, with every part's value there."""
        one = torch.zeros_like(where.token)
        key = random_keys(where.token, one - 1, self.seed)
        row = self.background.better(one, key).nonzero()[:, 0]
        self._kept_usual({"key": key[row], **where.around(values, row, one[row], self.sizes)}, values[row].half())

    def _kept_usual(self, new: Mapping[str, Tensor], values: Float[Tensor, "row part"]) -> None:
        before = self.background.key[0].clone()
        self.background.add(torch.zeros(len(values), dtype=torch.long), new)
        # Where each of those that are kept now comes from: from among those before, or from these rows.
        order = torch.cat([before, new["key"]]).argsort(stable=True)[: len(before)]
        self.background_values = torch.cat([self.background_values, values])[order]

    def absorb(self, other: Collector) -> None:
        """Take in what was found on other parts of the same text; as one pass, but for which near misses are kept."""
        for name in (*COUNTS, "active", "histogram", "total"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("top", "sample", "near"):
            part, new = getattr(other, name).filled()
            getattr(self, name).add(part, new, distinct=name == "top")
        self._kept_usual(other.background.filled()[1], other.background_values[other.background.key[0].isfinite()])

    def _strongest(self, where: Where, values: Tensor) -> None:
        """The strongest token of each context, if it is among the part's strongest so far."""
        most = torch.segment_reduce(values, "max", lengths=where.lengths, axis=0)
        context, part = ((most > self.threshold) & (-most.double() < self.top.key[:, -1])).nonzero(as_tuple=True)
        inside = where.starts[context, None] + torch.arange(int(where.lengths.max()))
        past = inside >= (where.starts + where.lengths)[context, None]
        at = values[inside.clamp_max(len(values) - 1), part[:, None]].masked_fill(past, -torch.inf).argmax(1)
        row = where.starts[context] + at
        new = {"key": -values[row, part].double(), **where.around(values, row, part, self.sizes)}
        self.top.add(part, new, distinct=True)

    def _missed(self, where: Where, values: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens that a part has fired on often, where it does not fire now."""
        starts, parts = self._parts_of_tokens()
        few = _few_of_each(where.ids, random_keys(where.token, torch.zeros_like(where.token), self.seed))
        count = (starts[1:] - starts[:-1])[where.ids[few]]
        row = few.repeat_interleave(count)
        nth = torch.arange(len(row)) - (count.cumsum(0) - count).repeat_interleave(count)
        part = parts[starts[where.ids[row]] + nth]
        silent = values[row, part] <= self.threshold[part]
        return row[silent], part[silent]

    def _parts_of_tokens(self) -> tuple[Tensor, Tensor]:
        """By token the parts that fire on it most often, by their sample: starts [vocab + 1] and parts."""
        kept, at = torch.cat([self.sample.ids, self.top.ids], 1)[..., self.sizes.before].long(), len(self.active)
        pair = (torch.arange(at)[:, None] * (1 << 32) + kept)[kept >= 0]
        pair, times = pair.unique(return_counts=True)
        order = _by(pair >> 32, -times.double())
        part = (pair >> 32)[order]
        rank = torch.arange(len(part)) - torch.searchsorted(part, torch.arange(at))[part]
        often = rank < TOKENS_OF_PART
        part, token = part[often], (pair[order] & 0xFFFFFFFF)[often]
        by_token = token.argsort(stable=True)
        vocab = max(int(token.max()) + 1 if len(token) else 0, 1 << 18)
        starts = torch.searchsorted(token[by_token], torch.arange(vocab + 1))
        return starts, part[by_token]

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything, to be stored."""
        counts = {name: getattr(self, name) for name in COUNTS}
        found = {name: getattr(self, name) for name in _TENSORS}
        for name in KEPT:
            found |= {f"{name}.{column}": tensor for column, tensor in vars(getattr(self, name)).items()}
        return {name: np.array(n) for name, n in counts.items()} | {name: t.numpy() for name, t in found.items()}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `state` gave."""
        for name in COUNTS:
            setattr(self, name, int(state[name]))
        for name in _TENSORS:
            setattr(self, name, torch.from_numpy(state[name].copy()))
        for name in KEPT:
            kept = getattr(self, name)
            for column in vars(kept):
                setattr(kept, column, torch.from_numpy(state[f"{name}.{column}"].copy()))


@dataclass(frozen=True, eq=False)
class Where:
    """Where the rows of a group are.

    ids, document, offset: of each row. token: its number since the beginning. starts, lengths: rows of each context.
    row_at: [context, position] the row there, -1 for none; context, position: of each row. all_ids: [context, position]
    tokens, -1 past the end.
    """

    ids: Int[Tensor, " row"]
    document: Int[Tensor, " row"]
    offset: Int[Tensor, " row"]
    token: Int[Tensor, " row"]
    starts: Int[Tensor, " context"]
    lengths: Int[Tensor, " context"]
    context: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    row_at: Int[Tensor, "context pos"]
    all_ids: Int[Tensor, "context pos"]

    @classmethod
    def of(cls, group: Group, before: int, head: int) -> Where:
        """before: rows of the groups before. head: tokens that were put before each piece of text."""
        contexts = group.contexts
        width = max(len(context.ids) for context in contexts)
        pad = lambda array, fill: np.pad(array, (0, width - len(array)), constant_values=fill)  # noqa: E731
        ids = torch.from_numpy(np.stack([pad(one.ids, NOTHING) for one in contexts]))
        kept = torch.from_numpy(np.stack([pad(one.kept, False) for one in contexts]))
        context, position = kept.nonzero(as_tuple=True)
        row_at = torch.full_like(ids, NOTHING)
        row_at[context, position] = torch.arange(len(context))
        lengths = kept.sum(1)
        document, offset = (torch.tensor([getattr(one, name) for one in contexts]) for name in ("document", "offset"))
        return cls(
            ids=ids[context, position],
            document=document[context],
            offset=offset[context] + position - head,
            token=torch.arange(before, before + len(context)),
            starts=lengths.cumsum(0) - lengths,
            lengths=lengths,
            context=context,
            position=position,
            row_at=row_at,
            all_ids=ids,
        )

    def around(self, values: Tensor, row: Tensor, part: Tensor, sizes: Sizes) -> dict[str, Tensor]:
        """What `Kept` keeps of some rows, but for the key."""
        context, at = self.context[row, None], self.position[row, None] + torch.arange(-sizes.before, sizes.after + 1)
        width = self.all_ids.shape[1]
        outside = (at < 0) | (at >= width)
        at = at.clamp(0, width - 1)
        rows = self.row_at[context, at].masked_fill(outside, NOTHING)
        near = values[rows.clamp_min(0), part[:, None]].masked_fill(rows < 0, torch.nan)
        return {
            "value": values[row, part],
            "document": self.document[row],
            "offset": self.offset[row],
            "ids": self.all_ids[context, at].masked_fill(outside, NOTHING).int(),
            "values": near.half(),
        }
