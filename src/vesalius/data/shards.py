"""Shards: files of an activation store, written whole or not at all, and checked block by block when they are read.

A shard is a safetensors file: one tensor [row, width] per site, under the site's name; for every row its token, the
context it stood in and its position there; the contexts themselves, as the model saw them; and a CRC-32 of every block
of rows, so that a reader who needs a few blocks need not hash the file. The manifest holds a hash of the checksums.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from vesalius.data.manifest import Manifest, ShardRecord, shard_name
from vesalius.data.packing import Context, Group
from vesalius.errors import FileFormatError
from vesalius.jobs import write_atomic
from vesalius.jobs.cache import file_sha256
from vesalius.jobs.untrusted import opened_safetensors

TOKEN, CONTEXT, POSITION = "rows.token", "rows.context", "rows.position"
IDS, START, DOCUMENT, OFFSET = "contexts.ids", "contexts.start", "contexts.document", "contexts.offset"
OF_ROWS, OF_CONTEXTS = (TOKEN, CONTEXT, POSITION), (IDS, START, DOCUMENT, OFFSET)
BLOCKS_CRC, CONTEXTS_CRC = "blocks.crc32", "contexts.crc32"
_AGAIN = "run the same harvest again, which writes it again, or restore it from a copy"


def write_shard(
    folder: Path, number: int, group: Group, rows: Mapping[str, Tensor], kept: Bool[Tensor, " row"], block_rows: int
) -> ShardRecord:
    """Write one shard. rows: site -> [row, width], of the group, without those that are not `kept`.

    Raises InputError when the disk is full.
    """
    sites = tuple(rows)
    named = {**rows, **_origins(group.only(kept.numpy()))}
    # CRC-32 and not SHA: fast enough to be compared while training reads, and enough against damage.
    blocks = [[_crc(block) for block in named[name].split(block_rows)] for name in (*sites, *OF_ROWS)]
    contexts = [_crc(named[name]) for name in OF_CONTEXTS]
    checks = {BLOCKS_CRC: torch.tensor(blocks), CONTEXTS_CRC: torch.tensor(contexts)}
    content = save({**named, **checks}, metadata={"format": "pt"})
    write_atomic(folder / shard_name(number), content)
    digest = hashlib.sha256(content).hexdigest()
    n = int(kept.sum())
    return ShardRecord(
        n, group.rows - n, len(group.contexts), len(content), digest, group.content_hash, _hash_of(checks)
    )


def _origins(group: Group) -> dict[str, Tensor]:
    """Where every row comes from."""
    contexts = group.contexts
    kept = [context.kept.nonzero()[0] for context in contexts]
    lengths = [len(context.ids) for context in contexts]
    made = {
        TOKEN: np.concatenate([c.ids[at] for c, at in zip(contexts, kept, strict=True)]).astype(np.int32),
        CONTEXT: np.repeat(np.arange(len(contexts), dtype=np.int32), [len(at) for at in kept]),
        POSITION: np.concatenate(kept).astype(np.int32),
        IDS: np.concatenate([context.ids for context in contexts]).astype(np.int32),
        START: np.cumsum([0, *lengths], dtype=np.int64),
        DOCUMENT: np.array([context.document for context in contexts], np.int64),
        OFFSET: np.array([context.offset for context in contexts], np.int64),
    }
    return {name: torch.from_numpy(array) for name, array in made.items()}


def _crc(tensor: Tensor) -> int:
    return zlib.crc32(tensor.view(torch.uint8).numpy().data)


def _hash_of(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of a shard's checksums, which is in the manifest."""
    return hashlib.sha256(tensors[BLOCKS_CRC].numpy().tobytes() + tensors[CONTEXTS_CRC].numpy().tobytes()).hexdigest()


def flaw(folder: Path, number: int, record: ShardRecord) -> str:
    """What is wrong with a shard, from every byte of it; empty when it is as it was written."""
    path = folder / shard_name(number)
    sized = _wrong_size(path, record)
    if sized:
        return sized
    return "" if file_sha256(path) == record.sha256 else f"{path} was changed after it was written (its sha256 differs)"


def _wrong_size(path: Path, record: ShardRecord) -> str:
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    return "" if size == record.bytes else f"{path} has {size:,} bytes and was written with {record.bytes:,}"


def check_promise(folder: Path, manifest: Manifest, rows: int) -> None:
    """Raises FileFormatError when all files together cannot hold so many rows, naming the first that is not whole.

    To be called before memory is taken for them: what a manifest says of sizes is as easily written as any text.
    """
    paths = [folder / shard_name(number) for number in range(len(manifest.shards))]
    there = sum(path.stat().st_size for path in paths if path.is_file())
    if rows * sum(manifest.widths) * manifest.dtype.itemsize > there:
        for number in range(len(paths)):
            open_shard(folder, number, manifest)
        raise FileFormatError(f"{folder} holds too few bytes for its rows; {_AGAIN}")


@dataclass(frozen=True, eq=False)
class Shard:
    """An open shard, mapped into memory: a block is read, and its checksum compared, when it is first used."""

    path: Path
    tensors: Mapping[str, Tensor]
    names: tuple[str, ...]
    """Of the tensors with rows, in the order of their checksums."""
    block_rows: int
    _checked: set[tuple[str, int]] = field(default_factory=set)

    def block(self, name: str, number: int) -> Tensor:
        """Rows of one block. Raises FileFormatError naming shard and rows when they are not as they were written."""
        rows = self.tensors[name][number * self.block_rows : (number + 1) * self.block_rows]
        if (name, number) not in self._checked:
            if _crc(rows) != int(self.tensors[BLOCKS_CRC][self.names.index(name), number]):
                first = number * self.block_rows
                raise FileFormatError(
                    f"{self.path} is damaged: {name}, rows {first} to {first + len(rows) - 1}, does not match its "
                    f"checksum; {_AGAIN}"
                )
            # Once per process: what was read well stays mapped, and is not read from disk again.
            self._checked.add((name, number))
        return rows

    @cached_property
    def contexts(self) -> Mapping[str, Tensor]:
        """The contexts' tensors, checked. Raises FileFormatError when they are not as they were written."""
        for number, name in enumerate(OF_CONTEXTS):
            if _crc(self.tensors[name]) != int(self.tensors[CONTEXTS_CRC][number]):
                raise FileFormatError(f"{self.path} is damaged: {name} does not match its checksum; {_AGAIN}")
        return {name: self.tensors[name] for name in OF_CONTEXTS}


def open_shard(folder: Path, number: int, manifest: Manifest) -> Shard:
    """A shard of a store. Raises FileFormatError for a file that is missing, cut, no safetensors or of other shapes."""
    path, record = folder / shard_name(number), manifest.shards[number]
    _refuse_pickle(path)
    wrong = _wrong_size(path, record)
    if wrong:
        raise FileFormatError(f"{wrong}; {_AGAIN}")
    names = (*map(str, manifest.sites), *OF_ROWS)
    try:
        with opened_safetensors(path) as file:
            tensors = {name: file.get_tensor(name) for name in (*names, *OF_CONTEXTS, BLOCKS_CRC, CONTEXTS_CRC)}
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} is damaged: {error}; {_AGAIN}") from error
    shard = Shard(path, tensors, names, manifest.block_rows)
    if not _fits(shard, record, manifest):
        raise FileFormatError(f"{path} is damaged: its tensors are not what the manifest says; {_AGAIN}")
    if _hash_of(tensors) != record.checks:
        raise FileFormatError(f"{path} is damaged: its checksums are not those of the manifest; {_AGAIN}")
    return shard


@dataclass(frozen=True)
class Origin:
    """Where a row comes from.

    document: number of the text, from 0, empty ones counted. token: number of the row's token in its document; -1 for
    the bos token. ids: the context as the model saw it, the bos token included. at: the row's position in
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


def contexts_of(shard: Shard, of: NDArray[np.int32], at: NDArray[np.int32]) -> Iterator[tuple[int, Context]]:
    """The contexts of successive rows, each with the number of its first row among them.

    of, at: [row], the number of each row's context in the shard, and its position there. A context's `kept` says which
    tokens have a row among these.
    """
    contexts = {name: shard.contexts[name].numpy() for name in OF_CONTEXTS}
    begins = np.flatnonzero(np.diff(of, prepend=-1)).tolist()
    for begin, end in zip(begins, [*begins[1:], len(of)], strict=True):
        number = int(of[begin])
        ids = contexts[IDS][contexts[START][number] : contexts[START][number + 1]].astype(np.int64)
        kept = np.zeros(len(ids), dtype=bool)
        kept[at[begin:end]] = True
        yield begin, Context(int(contexts[DOCUMENT][number]), int(contexts[OFFSET][number]), ids, kept)


def _fits(shard: Shard, record: ShardRecord, manifest: Manifest) -> bool:
    n_blocks = -(-record.rows // manifest.block_rows)
    wanted = {name: ((record.rows,), torch.int32) for name in OF_ROWS}
    sites = {
        str(site): ((record.rows, width), manifest.dtype)
        for site, width in zip(manifest.sites, manifest.widths, strict=True)
    }
    contexts = {name: ((record.contexts,), torch.int64) for name in (DOCUMENT, OFFSET)}
    checks = {
        START: ((record.contexts + 1,), torch.int64),
        BLOCKS_CRC: ((len(shard.names), n_blocks), torch.int64),
        CONTEXTS_CRC: ((len(OF_CONTEXTS),), torch.int64),
    }
    tensors = shard.tensors
    return tensors[IDS].ndim == 1 and all(
        (tuple(tensors[name].shape), tensors[name].dtype) == expected
        for name, expected in {**wanted, **sites, **contexts, **checks}.items()
    )


def _refuse_pickle(path: Path) -> None:
    """Raises FileFormatError for a pickle, or a zip archive as of torch.save, under the name of a safetensors file."""
    try:
        with path.open("rb") as stream:
            start = stream.read(9)
    except OSError:
        return  # a file that is missing is found out by its size
    # A safetensors file begins with 8 bytes of length, which can be anything, and then a brace.
    if start[8:] != b"{" and start.startswith((b"\x80", b"PK\x03\x04")):
        raise FileFormatError(
            f"{path} is a pickle, not a safetensors file; pickles can run code when they are opened and are refused"
        )
