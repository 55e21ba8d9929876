"""Examples of what makes parts fire, for thousands of parts in one pass over text.

The strongest examples of a part are the ones most easily misread (Bolukbasi et al. 2021): they show one end of its
activations, on one corpus. So each part also gets a random sample of all tokens that it fires on, from which its
quantiles are shown, and tokens like those it fires on where it does not fire.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.data.packing import Tally
from vesalius.describe.collecting import NOTHING, Collector, Kept, Sizes
from vesalius.describe.example import Example, PartExamples
from vesalius.describe.read_parts import InputReading, Reading, TextReading, tokenizer_for
from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Raw
from vesalius.inputs.beginning import speller
from vesalius.jobs import Blocks, Event, Sink, write_atomic
from vesalius.jobs.frames import data_frame
from vesalius.jobs.progress import shown
from vesalius.jobs.untrusted import read_npz
from vesalius.model import Model
from vesalius.parts import Part
from vesalius.protocol import content_hash
from vesalius.quantities.values import PartValues

if TYPE_CHECKING:
    import pandas

TASK = "examples"
STATE = "examples.npz"
_OF_EXAMPLE = ("value", "document", "offset", "ids", "values")
# Groups between two copies of everything on disk.
GROUPS_BETWEEN = 16


@dataclass(frozen=True, eq=False, repr=False)
class ActivatingExamples(Sequence[PartExamples]):
    """What many parts were seen to do on some texts; `examples[part]` or `examples[3]` is one of them."""

    parts: tuple[Part, ...]
    model_hash: str
    texts: dict[str, Any]
    collector: Collector
    tokenizer: Any
    shard: tuple[int, int] = (0, 1)
    """Which of how many shards of the text was read; see `merge_examples`."""

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, slice):
            return [self._of(number) for number in range(len(self))[which]]
        if isinstance(which, int):
            return self._of(range(len(self))[which])
        return self._of(self.number(which))

    def __iter__(self) -> Iterator[PartExamples]:
        return map(self._of, range(len(self)))

    def __repr__(self) -> str:
        dead = int((self.collector.active == 0).sum())
        never = f"; {dead} never fired" if dead else ""
        return f"ActivatingExamples({len(self)} parts on {self.tokens:,} tokens{never})"

    @property
    def tokens(self) -> int:
        """How many tokens were read."""
        return self.collector.tokens

    @property
    def contexts(self) -> int:
        """How many contexts were read."""
        return self.collector.contexts

    def number(self, part: Part | str) -> int:
        """Where a part, or the part of a name, is among `parts`. Raises UnknownNameError."""
        if part not in self._numbers:
            raise UnknownNameError("part", str(part), list(map(str, self.parts[:20])))
        return self._numbers[part]

    @cached_property
    def _numbers(self) -> dict[Part | str, int]:
        by_name: dict[Part | str, int] = {str(part): number for number, part in enumerate(self.parts)}
        return by_name | {part: number for number, part in enumerate(self.parts)}

    @property
    def density(self) -> Float[Tensor, " part"]:
        """Share of tokens that each part fires on."""
        return self.collector.active.double() / max(self.tokens, 1)

    def to_frame(self) -> pandas.DataFrame:
        """One row per example: part, kind (top, sample, near), rank, value, token, tokens, values, document, offset.

        `save_examples` stores everything as Parquet. Raises InputError where pandas is not installed.
        """
        rows = []
        for one in self:
            for kind in ("top", "sample", "near"):
                for rank, example in enumerate(getattr(one, kind)):
                    own = {name: getattr(example, name) for name in ("value", "token", "document", "offset", "at")}
                    around = {"tokens": list(example.tokens), "values": list(example.values)}
                    rows.append({"part": str(one.part), "kind": kind, "rank": rank, **own, **around})
        return data_frame(rows)

    def _of(self, number: int) -> PartExamples:
        state = self.collector
        active = int(state.active[number])
        top = self._kept(state.top, number)
        known = {token for example in top for token in example.ids}
        near = sorted(self._kept(state.near, number), key=lambda example: -_shared(known, example))
        return PartExamples(
            part=self.parts[number],
            density=float(self.density[number]),
            threshold=float(state.threshold[number]),
            mean=float(state.total[number]) / active if active else 0.0,
            top=top,
            sample=tuple(sorted(self._kept(state.sample, number), key=lambda example: -example.value)),
            near=tuple(near),
            background=self._background(number),
            histogram=state.histogram[number],
        )

    def _background(self, number: int) -> tuple[Example, ...]:
        values = self.collector.background_values[:, number].tolist()
        return tuple(replace(one, value=values[place], values=()) for place, one in enumerate(self._usual))

    @cached_property
    def _usual(self) -> tuple[Example, ...]:
        """The background, with no part's values."""
        return self._kept(self.collector.background, 0)

    def _kept(self, kept: Kept, number: int) -> tuple[Example, ...]:
        count, before = int(kept.key[number].isfinite().sum()), self.collector.sizes.before
        columns = (getattr(kept, name)[number, :count].tolist() for name in _OF_EXAMPLE)
        found = []
        for value, document, offset, ids, values in zip(*columns, strict=True):
            inside = [at for at, token in enumerate(ids) if token != NOTHING]
            listed = tuple(ids[at] for at in inside)
            found.append(
                Example(
                    value=value,
                    tokens=tuple(map(self.spelled, listed)),
                    ids=listed,
                    values=tuple(values[at] for at in inside),
                    at=inside.index(before),
                    document=document,
                    offset=offset,
                )
            )
        return tuple(found)

    @cached_property
    def spelled(self) -> Callable[[int], str]:
        """A token as text, decoded once."""
        return speller(self.tokenizer)


def _shared(known: set[int], example: Example) -> float:
    """Share of the example's tokens that are known."""
    return len(known & set(example.ids)) / len(set(example.ids))


def collect_examples(
    model: Model,
    texts: Any,
    parts: Sequence[Part],
    *,
    tokens: int | None = None,
    context: int = 256,
    bos: str = "auto",
    column: str = "text",
    sizes: Sizes | None = None,
    seed: int = 0,
    batch_tokens: int = 2048,
    shard: tuple[int, int] = (0, 1),
    out: str | Path | None = None,
    sink: Sink | None = None,
) -> ActivatingExamples:
    """What makes each part fire, from one pass over texts; the model is run up to the last site that is read.

    texts: as for `data.harvest`; or images, table rows and other floats, as a tensor [input, ...] or Raw, where every
    position of a site (a ViT's patches) counts as a token, whose id is the number of its input. parts: of one number at
    each position: neurons, dimensions, directions, latents. Latents fire where they are not zero, other parts two
    standard deviations above their mean. tokens: how many are read at most. shard: (number, count) reads every
    count-th group of the texts, for several processes with a folder each, whose results `merge_examples` puts together.
    out: a folder for what was found so far: the same call goes on there after an interruption. Memory depends on the
    number of parts, and not on the length of the texts.

    Raises InputError for parts without one number, for texts without a token to keep, and for a folder that holds
    something else.
    """
    if not 0 <= shard[0] < shard[1]:
        raise InputError(f"shard={shard} is (number, count), the number from 0 to count - 1")
    kept, values = sizes or Sizes(), PartValues(tuple(parts))
    reading: Reading
    if isinstance(texts, Raw | Tensor):
        if tokens is not None:
            raise InputError("tokens= limits texts; give fewer inputs")
        reading = InputReading.of(model, texts if isinstance(texts, Raw) else Raw(texts), values)
    else:
        asked = {"tokens": tokens, "context": context, "bos": bos, "column": column, "batch_tokens": batch_tokens}
        reading = TextReading.of(model, texts, values, **asked)
    collector = Collector(len(values.parts), torch.tensor(values.sparse), kept, seed, reading.head)
    with shown(sink) as screen:
        store = _Store(out, _plan(reading, values, kept, seed, shard), screen)
        store.load(collector)
        _collect(reading, collector, store, shard, screen)
    if collector.tokens == 0:
        whole = "the texts give no tokens" if shard[1] == 1 else f"shard {shard} of the texts has no tokens"
        raise InputError(f"{whole}; give longer ones, or others")
    about = dict(reading.described)
    return ActivatingExamples(values.parts, model.content_hash, about, collector, tokenizer_for(model, about), shard)


def _plan(reading: Reading, values: PartValues, sizes: Sizes, seed: int, shard: tuple[int, int]) -> str:
    refs = [part.ref for part in values.parts]
    what = {"examples": dict(reading.plan), "parts": refs, "sizes": asdict(sizes), "seed": seed}
    return content_hash(what if shard[1] == 1 else {**what, "shard": list(shard)})


@dataclass(frozen=True, eq=False)
class _Store:
    """Where what was found is kept; nowhere without a folder."""

    out: str | Path | None
    plan: str
    sink: Sink

    def load(self, collector: Collector) -> None:
        """Bring back what an interrupted pass has found. Raises InputError when the folder holds something else."""
        if self.out is None:
            return
        Blocks(self.out, self.plan, self.sink)  # refuses the folder of another plan
        path = Path(self.out) / STATE
        if path.exists():
            collector.restore(read_npz(path))

    def save(self, collector: Collector) -> None:
        if self.out is not None:
            write_atomic(Path(self.out) / STATE, _npz(collector))


def _npz(collector: Collector) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **collector.state())
    return stream.getvalue()


def _collect(reading: Reading, collector: Collector, store: _Store, shard: tuple[int, int], sink: Sink) -> None:
    """Every group has its number and its rows theirs, whoever reads it."""
    tally, there, total = Tally(), collector.groups, reading.total
    sink(Event("start", TASK, 0, total))
    done = saved = 0
    try:
        for number, group in enumerate(reading.groups(tally)):
            if number == 0:
                reading.announce(group, tally, sink)
            if number == 0 and shard[0]:
                collector.begin(reading.values(group))
            turn, whose = divmod(number, shard[1])
            if whose == shard[0] and turn >= there:
                collector.add(group, reading.values(group), done)
                saved = turn + 1
                if saved % GROUPS_BETWEEN == 0:
                    store.save(collector)
            done += group.rows
            sink(Event("advance", TASK, done, total))
        if saved % GROUPS_BETWEEN:
            store.save(collector)
    finally:
        sink(Event("end", TASK, done, total))
