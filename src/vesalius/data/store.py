"""Activation store: a folder of shards with a manifest, read as a Source, in order, or row by row with its origin.

Batches are shuffled without reading single rows: blocks of successive rows are drawn at random from all shards into a
pool in memory, whose rows then come in random order. The order of an epoch is a function of seed, epoch and pool size
alone, so a run can begin at any batch at the cost of one pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.data.manifest import Manifest, read_manifest
from vesalius.data.shards import CONTEXT, DOCUMENT, IDS, OFFSET, POSITION, START, TOKEN, Shard, flaw, open_shard
from vesalius.data.source import Rows, check_batches, check_sample, rebatched
from vesalius.data.tasks.base import stream
from vesalius.errors import FileFormatError, InputError, UnknownNameError
from vesalius.records import content_hash
from vesalius.site import Site

POOL_BYTES = 2**28


@dataclass(frozen=True)
class Origin:
    """Where a row comes from.

    document: number of the text, from 0, empty ones counted. token: number of the row's token in its document; -1 for
    the beginning token. ids: the context as the model saw it, the beginning token included. at: the row's position in
    it: no later token had any influence on a causal model's activation.
    """

    document: int
    token: int
    ids: tuple[int, ...]
    at: int

    def text(self, tokenizer: Any) -> tuple[str, str, str]:
        """What stands before the token, the token, and what comes after it, in this context."""
        pieces = (self.ids[: self.at], self.ids[self.at : self.at + 1], self.ids[self.at + 1 :])
        before, token, after = (str(tokenizer.decode(list(piece))) for piece in pieces)
        return before, token, after


class ActivationStore:
    """Activations on disk, one row per token. Made by `harvest`, opened by `ActivationStore.open`; is a Source."""

    def __init__(
        self, folder: Path, manifest: Manifest, sites: tuple[Site, ...], dtype: torch.dtype, pool_rows: int
    ) -> None:
        self.folder, self.manifest, self.dtype, self.pool_rows = folder, manifest, dtype, pool_rows
        self._sites = sites
        self._open: dict[int, Shard] = {}

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        sites: Sequence[Site | str] = (),
        beginning: str | None = None,
        keep_beginning: bool | None = None,
        dtype: torch.dtype = torch.float32,
        pool_rows: int | None = None,
    ) -> ActivationStore:
        """A finished store.

        sites: those to read, names or globs, in this order; default all. beginning, keep_beginning: what the reader
        counts on (the text of the token that contexts begin with, or "none"; whether rows at the first position are
        there); default whatever is stored. dtype: of the batches. pool_rows: rows that are shuffled together; default
        as many as make 268 MB on disk.

        Raises FileFormatError for what is no finished store as it was written; InputError when it was made with
        another beginning than asked for; UnknownNameError for a site that is not there. Files are looked into when
        they are first read: then FileFormatError names a shard that is missing, cut or changed.
        """
        folder = Path(folder).expanduser()
        manifest = read_manifest(folder)
        if manifest.counts is None:
            raise FileFormatError(
                f"{folder} is unfinished: {manifest.rows:,} rows were written when its harvest was stopped; run the "
                "same harvest again, and it goes on from there"
            )
        _check_beginning(folder, manifest.plan["beginning"], beginning, keep_beginning)
        chosen = tuple(dict.fromkeys(site for name in sites for site in _chosen(name, manifest.sites)))
        kept = chosen or manifest.sites
        width = sum(width for site, width in zip(manifest.sites, manifest.widths, strict=True) if site in kept)
        rows = pool_rows or max(1, POOL_BYTES // (width * manifest.dtype.itemsize))
        if rows < 1:
            raise InputError(f"pool_rows must be at least 1; got {pool_rows}")
        return cls(folder, manifest, kept, dtype, rows)

    def __repr__(self) -> str:
        sites = ", ".join(f"{site} [{width}]" for site, width in zip(self.sites, self.widths, strict=True))
        return f"ActivationStore({self.folder}: {self.n_rows:,} rows of {sites})"

    @property
    def sites(self) -> tuple[Site, ...]:
        return self._sites

    @property
    def widths(self) -> tuple[int, ...]:
        known = dict(zip(self.manifest.sites, self.manifest.widths, strict=True))
        return tuple(known[site] for site in self._sites)

    @property
    def n_rows(self) -> int:
        return self.manifest.rows

    @property
    def beginning(self) -> Mapping[str, Any]:
        """token: what every context begins with, its text or "none". kept: whether its rows are here."""
        return self.manifest.plan["beginning"]

    @cached_property
    def content_hash(self) -> str:
        """Of the manifest, and through it of every file; of the sites read, their dtype, and the size of the pool."""
        return content_hash(
            {"manifest": self.manifest.content_hash, "sites": [str(site) for site in self._sites],
             "dtype": str(self.dtype), "pool_rows": self.pool_rows}
        )  # fmt: skip

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
        for number, first in enumerate(self._starts[:-1].tolist()):
            whole = [self._whole(number, str(site)) for site in self._sites]
            for at in range(0, len(whole[0]), batch_size):
                yield first + at, tuple(tensor[at : at + batch_size].to(self.dtype) for tensor in whole)

    def trace(self, row: int) -> Origin:
        """Where a row comes from. Raises InputError when there is no such row."""
        number, at = self._find(row)
        shard = self._shard(number)
        block, inside = divmod(at, self.manifest.block_rows)
        context, position = (int(shard.block(name, block)[inside]) for name in (CONTEXT, POSITION))
        contexts = shard.contexts
        start, end = contexts[START][context : context + 2].tolist()
        before = 0 if self.beginning["id"] is None else 1
        return Origin(
            int(contexts[DOCUMENT][context]),
            int(contexts[OFFSET][context]) + position - before,
            tuple(contexts[IDS][start:end].tolist()),
            position,
        )

    @cached_property
    def tokens(self) -> Tensor:
        """Token id of every row, [n_rows] int32."""
        return torch.cat([self._whole(number, TOKEN) for number in range(len(self.manifest.shards))])

    def verify(self) -> None:
        """Look at every byte. Raises FileFormatError naming the first shard that is not as it was written."""
        for number, note in enumerate(self.manifest.shards):
            wrong = flaw(self.folder, number, note)
            if wrong:
                raise FileFormatError(f"{wrong}; run the same harvest again to make it anew")

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
        return np.cumsum([0, *(note.rows for note in self.manifest.shards)])

    def _find(self, row: int) -> tuple[int, int]:
        if not 0 <= row < self.n_rows:
            raise InputError(f"row {row} does not exist: this store has rows 0 to {self.n_rows - 1}")
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return number, row - int(self._starts[number])

    @cached_property
    def _blocks(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of every block: its shard, its number there, and its rows."""
        size = self.manifest.block_rows
        counts = [-(-note.rows // size) for note in self.manifest.shards]
        shard = np.repeat(np.arange(len(counts)), counts)
        number = np.concatenate([np.arange(n) for n in counts])
        rows = np.array([note.rows for note in self.manifest.shards])[shard]
        return shard, number, np.minimum(size, rows - number * size)

    def _pools(self, key: tuple[str, int], skip: int) -> Iterator[tuple[Rows, Tensor]]:
        """Pools of rows, and the order in which their rows come, less the first `skip` rows; endless."""
        sizes = self._blocks[2]
        per_pool = max(1, self.pool_rows // self.manifest.block_rows)
        most = min(per_pool * self.manifest.block_rows, self.n_rows)
        memory = [torch.empty(most, width, dtype=self.manifest.dtype) for width in self.widths]
        first, skip = divmod(skip, self.n_rows)
        for epoch in count(first):
            order = torch.randperm(len(sizes), generator=stream(*key, epoch)).numpy()
            for number, at in enumerate(range(0, len(order), per_pool)):
                blocks = np.sort(order[at : at + per_pool])
                rows = int(sizes[blocks].sum())
                if skip >= rows:
                    skip -= rows
                    continue
                # Batches are copies, so one pool's memory serves the next.
                pool = tuple(tensor[:rows] for tensor in memory)
                self._read(blocks, pool)
                yield pool, torch.randperm(rows, generator=stream(*key, epoch, number))[skip:]
                skip = 0

    def _read(self, blocks: NDArray[np.int64], into: Rows) -> None:
        """Rows of these blocks, at the sites that are read; blocks in the order in which they lie on disk."""
        shard, number, _ = self._blocks
        where = [(self._shard(int(shard[block])), int(number[block])) for block in blocks]
        for site, tensor in zip(self._sites, into, strict=True):
            torch.cat([opened.block(str(site), at) for opened, at in where], out=tensor)


def _chosen(name: Site | str, known: Sequence[Site]) -> list[Site]:
    exact = [site for site in known if str(site) == str(name)]
    found = exact or [site for site in known if fnmatchcase(str(site), str(name))]
    if not found:
        raise UnknownNameError("site of this store", str(name), map(str, known))
    return found


def _check_beginning(folder: Path, stored: Mapping[str, Any], asked: str | None, kept: bool | None) -> None:
    if asked is not None and asked != stored["token"]:
        raise InputError(
            f"{folder} was made with beginning token {stored['token']!r}, and {asked!r} is asked for: after another "
            "beginning a model has other activations; harvest again, or open it with what it has"
        )
    if kept is not None and kept != stored["kept"]:
        raise InputError(
            f"{folder} was made with rows at the first position {'kept' if stored['kept'] else 'dropped'}, and they "
            f"are asked to be {'kept' if kept else 'dropped'}; harvest again with keep_beginning={kept}"
        )
