"""Harvest: run models over text up to the last site wanted, and store the activations there, with their origin.

A shard is a group of contexts. Groups are decided by the text and the arguments alone, so a harvest that was killed
goes on with the first group that has no shard: those before it are packed again, which is cheap, but not run. The
finished store has the same bytes, however often it was killed.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vesalius.data.manifest import NAME as MANIFEST
from vesalius.data.manifest import Manifest, differences, read_manifest, shard_name
from vesalius.data.outliers import MAX_NORM
from vesalius.data.packing import Group, Tally
from vesalius.data.reader import ActivationReader, Request, dtype_name, expected_cost, times_first
from vesalius.data.shards import flaw, write_shard
from vesalius.data.store import ActivationStore
from vesalius.errors import InputError, NotFiniteError
from vesalius.jobs import Event, Sink
from vesalius.jobs.cache import alone
from vesalius.jobs.progress import shown
from vesalius.model import Model
from vesalius.site import Site

TASK = "harvest"
SHARD_BYTES = 2**27


def harvest(
    model: Model | Sequence[Model] | Mapping[str, Model],
    texts: Any,
    *,
    sites: Sequence[Site | str],
    out: str | Path,
    tokens: int | None = None,
    context: int = 256,
    dtype: torch.dtype = torch.float32,
    compute: torch.dtype | None = None,
    bos: str = "auto",
    keep_bos: bool = False,
    max_norm: float | None = MAX_NORM,
    column: str = "text",
    batch_tokens: int = 2048,
    shard_bytes: int = SHARD_BYTES,
    sink: Sink | None = None,
) -> ActivationStore:
    """Run a model over texts, no further than the last site, and write the activations at the sites to a folder.

    model: one, or several that share a tokenizer, in a list (tags a, b, c ...) or by tag; a site without tag is read
    in each. texts: "stdlib", a path, or an iterable, as in `texts_from`, with `column` the one that holds text. Sites
    are names, globs, or with an index, as in layers.5.z[3]; heads and so on are joined into one row.

    tokens: rows at most, before outliers are dropped; default all. context: tokens run together at most, the bos
    token included. bos: the token before every context, see `bos_token`; rows at the first position
    of each context, a norm outlier, are dropped unless keep_bos; rows at special tokens are always dropped.
    max_norm: rows at other positions whose norm is above this many medians of their shard, at any site, are dropped
    too and counted (see `outliers`); None keeps them. dtype: of the stored rows (float32, bfloat16, float16). compute:
    bfloat16 runs a float32 model with weights cast to it beside the model, which is faster and takes half its memory
    more; the relative error is measured on the first batch and stored. batch_tokens: tokens in a forward pass, with
    padding; on the CPU two passes go side by side. shard_bytes: size of a file, about; memory in use is about three
    times as much. sink: hears the cost before the first pass, then progress; None shows both on standard error.

    Killed at any time, the same call goes on where it was; on a finished store it checks every file, writes damaged
    ones again, and returns it. Raises InputError for arguments that don't fit, a folder that holds something else, or
    a full disk; FileFormatError for texts that cannot be read; NotFiniteError for NaN or infinity at a site.
    """
    request = Request(sites, tokens, context, dtype, compute, bos, keep_bos, max_norm, column, batch_tokens)
    if shard_bytes < 1:
        raise InputError(f"shard_bytes must be at least 1; got {shard_bytes}")
    reader = request.reader(model, texts, group_bytes=shard_bytes)
    with shown(sink) as progress:
        return _harvested(reader, Path(out).expanduser(), request, progress)


def _harvested(reader: ActivationReader, folder: Path, request: Request, sink: Sink) -> ActivationStore:
    """The store, from what is there and what is missing."""
    dtype = request.dtype
    plan = {**reader.to_json(), "dtype": dtype_name(dtype), "block_rows": request.block_rows(reader)}
    kept = _kept(folder, plan)
    # Counts are written last, when every shard is there.
    finished = kept is not None and kept.counts is not None
    if kept is not None and finished and "sha256" in reader.texts.description and not _damaged(folder, kept):
        return ActivationStore.open(folder)
    tally = Tally()
    found = reader.groups(tally)
    # One group is packed before anything is written: texts that give no rows leave no folder behind.
    first = next(found, None)
    if first is None:
        raise InputError(
            f"no activations: {tally.texts} texts, {tally.empty + tally.nulls} of them empty, give no rows"
        )
    harvesting = _Harvest(folder, reader, dtype, sink, kept or Manifest(plan, {}))
    if not finished:
        harvesting.begin(first, tally)
    _make_folder(folder)
    with alone(folder / ".lock", lambda: harvesting.note("waiting for another process that writes here")):
        # Another process may have written more in the meantime.
        harvesting.manifest = _kept(folder, plan) or harvesting.manifest
        harvesting.run(itertools.chain([first], found), tally)
    return ActivationStore.open(folder)


def _kept(folder: Path, plan: Mapping[str, Any]) -> Manifest | None:
    """The manifest that is there, if it is of the same plan. Raises InputError when the folder holds anything else."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; activations are written to a folder")
    if (folder / MANIFEST).exists():
        found = read_manifest(folder)
        unlike = differences(found.plan, plan)
        if unlike:
            raise InputError(
                f"{folder} holds another harvest ({unlike}); use another folder, or delete this one to start afresh"
            )
        return found
    # Killed after its first shard and before its manifest, a harvest has left that one file.
    entries = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    others = [name for name in entries if name != shard_name(0)]
    if others:
        raise InputError(f"{folder} is not empty and no activation store (it holds {others[0]}); use another folder")
    return None


def _damaged(folder: Path, manifest: Manifest) -> bool:
    return any(flaw(folder, number, record) for number, record in enumerate(manifest.shards))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}; give another folder") from error


@dataclass(eq=False)
class _Harvest:
    """A harvest at work."""

    folder: Path
    reader: ActivationReader
    dtype: torch.dtype
    sink: Sink
    manifest: Manifest
    expected_rows: int | None = None
    done: int = 0

    def begin(self, first: Group, tally: Tally) -> None:
        """Run a first batch, and say what all of them will cost."""
        trial = self.reader.forward.trial(first)
        if not self.manifest.shards:
            self.manifest = replace(self.manifest, errors=trial.errors)
        self.note(f"{self.reader.packing.bos.describe()}; special tokens in the text give no rows")
        left_out = self.reader.texts.left_out
        if left_out:
            self.note(f"{len(left_out)} files are not texts and are left out: {', '.join(left_out[:3])}")
        for site, error in self.manifest.errors.items():
            self.note(f"{site}: {self.manifest.plan['compute']}, relative error {error:.2g} on the first batch")
        times = times_first(self.reader, first, tally)
        cost = expected_cost(self.reader, first, trial, times or 1.0, self.dtype)
        if times is None:
            self.note(f"expected cost of every {first.rows:,} rows: {cost.describe()}")
        else:
            self.note(f"expected cost: {cost.describe()}")
            self.expected_rows = round(first.rows * times)
            self._check_space(cost.disk_bytes)

    def _check_space(self, needed: int) -> None:
        place = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(place).free
        left = needed - sum(record.bytes for record in self.manifest.shards)
        if left > free:
            raise InputError(
                f"no space: about {left / 1e9:.2f} GB are to be written to {self.folder}, where {free / 1e9:.2f} GB "
                "are free; make room, choose another folder, or give fewer tokens"
            )

    def run(self, found: Iterator[Group], tally: Tally) -> None:
        """Write the shards that are missing, and finish the manifest. No other process may be writing to the folder."""
        # What a killed process was writing; nobody reads it, and it would stay for ever.
        for left in self.folder.glob(".*.part"):
            left.unlink(missing_ok=True)
        self._event("start")
        try:
            counts = self._shards(found)
        finally:
            self._event("end")
        nulls = {"null_texts": tally.nulls} if tally.nulls else {}
        counts = {**counts, "texts": tally.texts, "empty_texts": tally.empty, **nulls}
        self.manifest = replace(self.manifest, counts=counts)
        self.manifest.write(self.folder)
        if counts["outliers"]:
            self.note(
                f"{counts['outliers']:,} of {self.done:,} rows are norm outliers, over {self.reader.max_norm:g} times "
                "the median, and were left out"
            )
        if tally.nulls:
            self.note(f"{tally.nulls:,} of {tally.texts:,} texts are null and were left out")
        if tally.empty:
            self.note(f"{tally.empty:,} of {tally.texts:,} texts are empty and give no activations")

    def _shards(self, found: Iterator[Group]) -> dict[str, int]:
        shards = contexts = tokens_run = 0
        for group in found:
            if self._is_there(shards, group):
                self._advance(group.rows)
            else:
                self._make(shards, group)
            shards += 1
            contexts += len(group.contexts)
            tokens_run += sum(len(context.ids) for context in group.contexts)
        # Fewer groups than shards: the texts were cut short since the store was begun.
        if shards != len(self.manifest.shards):
            raise self._other_texts(shards)
        return {
            "rows": self.manifest.rows,
            "outliers": self.done - self.manifest.rows,
            "contexts": contexts,
            "tokens_run": tokens_run,
        }

    def _is_there(self, number: int, group: Group) -> bool:
        if number >= len(self.manifest.shards):
            return False
        record = self.manifest.shards[number]
        if record.group != group.content_hash:
            raise self._other_texts(number)
        wrong = flaw(self.folder, number, record)
        if wrong:
            self.note(f"{wrong}; writing it again")
        return not wrong

    def _make(self, number: int, group: Group) -> None:
        try:
            rows, bad = self.reader.rows(group, self.dtype, self._advance)
        except NotFiniteError as error:
            raise NotFiniteError(f"{shard_name(number)}, which is not written: {error}") from error
        # Dropped after the whole shard is there, since an outlier is so beside the median of its shard.
        if bool(bad.any()):
            rows = tuple(tensor[~bad] for tensor in rows)
        named = {str(site): tensor for site, tensor in zip(self.reader.forward.sites, rows, strict=True)}
        record = write_shard(self.folder, number, group, named, ~bad, self.manifest.block_rows)
        self.manifest = replace(self.manifest.with_shard(number, record), counts=None)
        self.manifest.write(self.folder)

    def _other_texts(self, number: int) -> InputError:
        return InputError(
            f"{self.folder / shard_name(number)} was made from other texts than those given now; give the same texts "
            "in the same order, or use another folder"
        )

    def _advance(self, rows: int) -> None:
        self.done += rows
        self._event("advance")

    def _event(self, kind: str) -> None:
        self.sink(Event(kind, TASK, self.done, self.expected_rows))

    def note(self, message: str) -> None:
        """Send a message to the sink."""
        self.sink(Event("note", TASK, message=message))
