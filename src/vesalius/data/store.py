"""Activation store: a folder of shards with a manifest, read as a Source, in order, or row by row with its origin.

Batches are shuffled without reading single rows: blocks of successive rows are drawn at random from all shards into a
pool in memory, whose rows then come in random order. The order of an epoch is a function of seed, epoch and pool size
alone, so a run can begin at any batch at the cost of one pool.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from vesalius.data.manifest import Manifest, read_manifest
from vesalius.data.packing import Context
from vesalius.data.shards import (
    CONTEXT,
    DOCUMENT,
    IDS,
    OFFSET,
    POSITION,
    START,
    TOKEN,
    Origin,
    Shard,
    check_promise,
    contexts_of,
    flaw,
    open_shard,
)
from vesalius.data.source import Rows, check_batches, check_sample, rebatched
from vesalius.errors import FileFormatError, InputError, UnknownNameError
from vesalius.protocol import content_hash
from vesalius.seeds import generator_for
from vesalius.site import Site

POOL_BYTES = 2**28


class ActivationStore:
    """Activations on disk, one row per token. Written by `harvest`, opened by `ActivationStore.open`; is a Source.

    rows: numbers of the rows that are read; default all. A part of a store (`documents`, `split`) reads some, which
    keep their numbers.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        sites: tuple[Site, ...],
        dtype: torch.dtype,
        pool_rows: int,
        rows: range | None = None,
    ) -> None:
        self.folder, self.manifest, self.dtype, self.pool_rows = folder, manifest, dtype, pool_rows
        self._sites = sites
        self.rows = range(manifest.rows) if rows is None else rows
        self._open: dict[int, Shard] = {}

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        sites: Sequence[Site | str] = (),
        bos: str | None = None,
        keep_bos: bool | None = None,
        dtype: torch.dtype = torch.float32,
        pool_rows: int | None = None,
    ) -> ActivationStore:
        """A finished store.

        sites: those to read, names or globs, in this order; default all. bos, keep_bos: what the reader
        expects (the text of the token that contexts begin with, or "none"; whether rows at the first position are
        there); default whatever is stored. dtype: of the batches. pool_rows: rows that are shuffled together; default
        as many as make 268 MB on disk.

        Raises FileFormatError for what is no finished store as it was written; InputError when it was made with
        another bos token than asked for; UnknownNameError for a site that is not there. Files are checked when
        they are first read: then FileFormatError names a shard that is missing, cut or changed.
        """
        folder = Path(folder).expanduser()
        manifest = read_manifest(folder)
        if manifest.counts is None:
            raise FileFormatError(
                f"{folder} is unfinished: {manifest.rows:,} rows were written when its harvest was stopped; run the "
                "same harvest again, and it goes on from there"
            )
        _check_bos(folder, manifest.plan["bos"], bos, keep_bos)
        chosen = tuple(dict.fromkeys(site for name in sites for site in _chosen(name, manifest.sites)))
        kept = chosen or manifest.sites
        width = sum(width for site, width in zip(manifest.sites, manifest.widths, strict=True) if site in kept)
        rows = pool_rows or max(1, POOL_BYTES // (width * manifest.dtype.itemsize))
        if rows < 1:
            raise InputError(f"pool_rows must be at least 1; got {pool_rows}")
        return cls(folder, manifest, kept, dtype, rows)

    def __repr__(self) -> str:
        sites = ", ".join(f"{site} [{width}]" for site, width in zip(self.sites, self.widths, strict=True))
        of_all = "" if self.whole else f" of {self.manifest.rows:,}, from row {self.rows.start:,} on,"
        return f"ActivationStore({self.folder}: {self.n_rows:,} rows{of_all} of {sites})"

    @property
    def sites(self) -> tuple[Site, ...]:
        return self._sites

    @property
    def widths(self) -> tuple[int, ...]:
        known = dict(zip(self.manifest.sites, self.manifest.widths, strict=True))
        return tuple(known[site] for site in self._sites)

    @property
    def n_rows(self) -> int:
        return len(self.rows)

    @property
    def whole(self) -> bool:
        """Whether all rows of the store are read."""
        return len(self.rows) == self.manifest.rows

    @property
    def bos(self) -> Mapping[str, Any]:
        """token: what every context begins with, its text or "none". kept: whether its rows are here."""
        return self.manifest.plan["bos"]

    @cached_property
    def content_hash(self) -> str:
        """Of the manifest, and through it of every file; of sites and rows read, their dtype, the size of the pool."""
        known = {
            "manifest": self.manifest.content_hash,
            "sites": [str(site) for site in self._sites],
            "dtype": str(self.dtype),
            "pool_rows": self.pool_rows,
        }
        return content_hash(known if self.whole else {**known, "rows": [self.rows.start, self.rows.stop]})

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Rows]:
        """As `Source.batches`. Raises FileFormatError, when it is reached, for a shard that is not as it was."""
        check_batches(batch_size, seed, start)
        return rebatched(self._pools(("batches", seed), start * batch_size), batch_size, self.dtype)

    def sample(self, n: int, *, seed: int) -> Rows:
        """As `Source.sample`; from blocks of successive rows, drawn at random from all shards."""
        check_sample(n, seed)
        return next(rebatched(self._pools(("sample", seed), 0), min(n, self.n_rows), self.dtype))

    def in_order(self, batch_size: int) -> Iterator[tuple[int, Rows]]:
        """All rows once, in the order of the texts: number of the first row, and rows [batch, width] at each site.

        Batches end with their shard, so some are smaller.
        """
        check_batches(batch_size, 0, 0)
        for number, here in self._here():
            whole = [self._whole(number, str(site))[here.start : here.stop] for site in self._sites]
            first = int(self._starts[number]) + here.start
            for at in range(0, len(here), batch_size):
                yield first + at, tuple(tensor[at : at + batch_size].to(self.dtype) for tensor in whole)

    def at(self, rows: range) -> Rows:
        """These rows, [len(rows), width] at each site. Raises InputError for rows that are not read here."""
        if rows.step != 1 or not len(rows) or rows[0] not in self.rows or rows[-1] not in self.rows:
            raise InputError(f"{rows} are no rows of this store, which has {self.rows.start} to {self.rows.stop - 1}")
        _, _, sizes, _ = self._blocks
        ends = np.cumsum(sizes) + self.rows.start
        blocks = np.arange(np.searchsorted(ends, rows.start, "right"), np.searchsorted(ends, rows.stop, "left") + 1)
        first = int(ends[blocks[0]] - sizes[blocks[0]])
        into = tuple(torch.empty(int(sizes[blocks].sum()), width, dtype=self.manifest.dtype) for width in self.widths)
        self._read(blocks, into)
        return tuple(tensor[rows.start - first : rows.stop - first].to(self.dtype) for tensor in into)

    def contexts(self) -> Iterator[tuple[int, Context]]:
        """The contexts of the rows, in order: number of a context's first row, and the context.

        `kept` says which of its tokens have a row here, so that its rows are those from that number on.
        """
        for number, here in self._here():
            of, at = (self._whole(number, name)[here.start : here.stop].numpy() for name in (CONTEXT, POSITION))
            for begin, context in contexts_of(self._shard(number), of, at):
                yield int(self._starts[number]) + here.start + begin, context

    def documents(self, first: int = 0, stop: int | None = None) -> ActivationStore:
        """The part of this store whose rows are of documents number first to stop - 1 (default: all from first on).

        Raises InputError when there is none.
        """
        rows = self.rows[bisect.bisect_left(self.rows, first, key=self._document) :]
        if stop is not None:
            rows = rows[: bisect.bisect_left(rows, stop, key=self._document)]
        if not rows:
            raise InputError(f"no row of this store is of documents {first} to {'the last' if stop is None else stop}")
        return self._part(rows)

    def split(self, held_out: float = 0.1) -> tuple[ActivationStore, ActivationStore]:
        """Two parts without a document in common: the first documents, and the last, with about this share of the rows.

        The cut is at the end of a document that is nearest. Raises InputError for a share outside 0 to 1, and when all
        rows are of one document.
        """
        if not 0 < held_out < 1:
            raise InputError(f"held_out is a share of the rows, between 0 and 1; got {held_out}")
        # Never all or none of the rows, whatever the share is rounded to.
        wanted = min(max(round((1 - held_out) * len(self.rows)), 1), len(self.rows) - 1)
        document = self._document(self.rows[wanted])
        cuts = [bisect.bisect_left(self.rows, number, key=self._document) for number in (document, document + 1)]
        inside = [cut for cut in cuts if 0 < cut < len(self.rows)]
        if not inside:
            raise InputError(f"all {len(self.rows):,} rows are of one document, so none can be held out; harvest more")
        cut = min(inside, key=lambda place: abs(place - wanted))
        return self._part(self.rows[:cut]), self._part(self.rows[cut:])

    def _part(self, rows: range) -> ActivationStore:
        return ActivationStore(self.folder, self.manifest, self._sites, self.dtype, self.pool_rows, rows)

    def _document(self, row: int) -> int:
        number, at = self._find(row)
        shard = self._shard(number)
        block, inside = divmod(at, self.manifest.block_rows)
        return int(shard.contexts[DOCUMENT][int(shard.block(CONTEXT, block)[inside])])

    def _here(self) -> Iterator[tuple[int, range]]:
        """Of every shard with rows that are read: its number, and which of its rows."""
        for number, (first, end) in enumerate(itertools.pairwise(self._starts.tolist())):
            here = range(max(self.rows.start - first, 0), min(self.rows.stop, end) - first)
            if here:
                yield number, here

    def trace(self, row: int) -> Origin:
        """Where a row comes from. Raises InputError when there is no such row."""
        number, at = self._find(row)
        shard = self._shard(number)
        block, inside = divmod(at, self.manifest.block_rows)
        context, position = (int(shard.block(name, block)[inside]) for name in (CONTEXT, POSITION))
        contexts = shard.contexts
        start, end = contexts[START][context : context + 2].tolist()
        before = 0 if self.bos["id"] is None else 1
        return Origin(
            int(contexts[DOCUMENT][context]),
            int(contexts[OFFSET][context]) + position - before,
            tuple(contexts[IDS][start:end].tolist()),
            position,
        )

    @cached_property
    def tokens(self) -> Int[Tensor, " row"]:
        """Token id of every row, int32."""
        return torch.cat([self._whole(number, TOKEN)[here.start : here.stop] for number, here in self._here()])

    def verify(self) -> None:
        """Check every byte. Raises FileFormatError naming the first shard that is not as it was written."""
        for number, record in enumerate(self.manifest.shards):
            wrong = flaw(self.folder, number, record)
            if wrong:
                raise FileFormatError(f"{wrong}; run the same harvest again, which writes it again")

    def _whole(self, number: int, name: str) -> Tensor:
        shard = self._shard(number)
        blocks = -(-self.manifest.shards[number].rows // self.manifest.block_rows)
        return torch.cat([shard.block(name, block) for block in range(blocks)])

    def _shard(self, number: int) -> Shard:
        if number not in self._open:
            self._open[number] = open_shard(self.folder, number, self.manifest)
        return self._open[number]

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """Number of each shard's first row, and of all rows at the end."""
        return np.cumsum([0, *(record.rows for record in self.manifest.shards)])

    def _find(self, row: int) -> tuple[int, int]:
        if row not in self.rows:
            raise InputError(f"row {row} does not exist: this store has rows {self.rows.start} to {self.rows.stop - 1}")
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return number, row - int(self._starts[number])

    @cached_property
    def _blocks(self) -> tuple[NDArray[np.int64], ...]:
        """Of every block with rows that are read: its shard, its number there, their number and first."""
        size = self.manifest.block_rows
        counts = [-(-record.rows // size) for record in self.manifest.shards]
        shard = np.repeat(np.arange(len(counts)), counts)
        number = np.concatenate([np.arange(n) for n in counts])
        begin = self._starts[shard] + number * size
        end = np.minimum(begin + size, self._starts[shard + 1])
        first, stop = np.maximum(begin, self.rows.start), np.minimum(end, self.rows.stop)
        read = stop > first
        return shard[read], number[read], (stop - first)[read], (first - begin)[read]

    def _pools(self, key: tuple[str, int], skip: int) -> Iterator[tuple[Rows, Tensor]]:
        """Pools of rows, and the order in which their rows come, less the first `skip` rows; endless."""
        sizes = self._blocks[2]
        per_pool = max(1, self.pool_rows // self.manifest.block_rows)
        most = min(per_pool * self.manifest.block_rows, self.n_rows)
        check_promise(self.folder, self.manifest, most)
        memory = [torch.empty(most, width, dtype=self.manifest.dtype) for width in self.widths]
        first, skip = divmod(skip, self.n_rows)
        for epoch in itertools.count(first):
            # A function of seed and epoch, so that any batch can be reached without drawing those before it.
            order = torch.randperm(len(sizes), generator=generator_for(*key, epoch)).numpy()
            for number, at in enumerate(range(0, len(order), per_pool)):
                # In the order on disk, which is read faster; the rows are shuffled in memory after.
                blocks = np.sort(order[at : at + per_pool])
                rows = int(sizes[blocks].sum())
                if skip >= rows:
                    skip -= rows
                    continue
                # Batches are copies, so one pool's memory serves the next.
                pool = tuple(tensor[:rows] for tensor in memory)
                self._read(blocks, pool)
                yield pool, torch.randperm(rows, generator=generator_for(*key, epoch, number))[skip:]
                skip = 0

    def _read(self, blocks: NDArray[np.int64], into: Rows) -> None:
        """Rows of these blocks, at the sites that are read; blocks in the order in which they lie on disk."""
        chosen = zip(*(column[blocks].tolist() for column in self._blocks), strict=True)
        where = [(self._shard(shard), number, slice(first, first + rows)) for shard, number, rows, first in chosen]
        for site, tensor in zip(self._sites, into, strict=True):
            torch.cat([opened.block(str(site), at)[inside] for opened, at, inside in where], out=tensor)


def _chosen(name: Site | str, known: Sequence[Site]) -> list[Site]:
    pattern = str(name).replace("[", "[[]")  # brackets hold an index here, and no choice of letters
    found = [site for site in known if any(fnmatchcase(own, pattern) for own in (str(site), site.hook_name))]
    if not found:
        raise UnknownNameError("site of this store", str(name), map(str, known))
    return found


def _check_bos(folder: Path, stored: Mapping[str, Any], asked: str | None, kept: bool | None) -> None:
    if asked is not None and asked != stored["token"]:
        raise InputError(
            f"{folder} was made with bos token {stored['token']!r}, and {asked!r} is asked for: after another "
            "bos a model has other activations; harvest again, or open it with what it has"
        )
    if kept is not None and kept != stored["kept"]:
        raise InputError(
            f"{folder} was made with rows at the first position {'kept' if stored['kept'] else 'dropped'}, and they "
            f"are asked to be {'kept' if kept else 'dropped'}; harvest again with keep_bos={kept}"
        )
