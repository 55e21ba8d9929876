"""Packing: documents become contexts, contexts groups, and groups batches for a model.

A context holds tokens of one document only, so no activation depends on another document. A document that is too long
is cut into successive contexts, each with the bos token. Everything is decided by the tokens and the arguments,
so that a group can be made again, or passed over, without running a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from vesalius.data.texts import NULL, Document
from vesalius.errors import InputError
from vesalius.inputs.beginning import bos_token, special_tokens
from vesalius.protocol import content_hash

Ids = NDArray[np.int64]
# Texts given to the tokenizer at once: enough for all of its threads, and bounded in memory.
_AT_ONCE, _CHARACTERS = 64, 250_000


@dataclass(frozen=True)
class Bos:
    """What every context begins with, and whether the activations at its first position are kept.

    token: text of the bos token, or "none". The first position is a norm outlier in most language models (about
    100 times the norm of the others in SmolLM2), whatever token stands there; dropped unless `kept`.
    """

    token: str
    id: int | None
    kept: bool

    def describe(self) -> str:
        """Such as "bos token <|endoftext|>, its activations dropped"."""
        first = "no bos token" if self.id is None else f"bos token {self.token}"
        whose = "activations of the first position" if self.id is None else "its activations"
        return f"{first}, {whose} {'kept' if self.kept else 'dropped'}"

    def to_json(self) -> dict[str, Any]:
        return {"token": self.token, "id": self.id, "kept": self.kept}


@dataclass(frozen=True)
class Packing:
    """How documents are packed.

    context: tokens per context, at most. special: ids that are run but give no rows. limit: rows in all, at most.
    group_rows: rows of a group, at most, unless one context has more.
    """

    context: int
    bos: Bos
    special: tuple[int, ...]
    group_rows: int
    limit: int | None = None

    def __post_init__(self) -> None:
        least = 3 if self.bos.id is not None else 2
        if self.context < least:
            raise InputError(f"context must be at least {least} tokens; got {self.context}")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"tokens must be at least 1; got {self.limit}")
        if self.group_rows < 1:
            raise InputError(f"a group must have room for 1 row at least; got {self.group_rows}")


@dataclass(eq=False)
class Tally:
    """Counts of what was read so far."""

    texts: int = 0
    empty: int = 0
    nulls: int = 0
    """Rows that hold null, which are not counted as empty."""
    characters: int = 0


@dataclass(frozen=True, eq=False)
class Context:
    """Tokens that are run together, all of one document.

    ids: with the bos token. kept: which of them give a row. offset: number, in the document, of the first token
    after the bos token.
    """

    document: int
    offset: int
    ids: Ids
    kept: NDArray[np.bool_]

    @cached_property
    def rows(self) -> int:
        return int(self.kept.sum())


@dataclass(frozen=True, eq=False)
class Group:
    """Successive contexts whose rows make one shard, or fill a shuffle buffer once."""

    contexts: tuple[Context, ...]

    @cached_property
    def rows(self) -> int:
        return sum(context.rows for context in self.contexts)

    @cached_property
    def first(self) -> NDArray[np.bool_]:
        """Which rows are at the first position of their context, [row]."""
        return np.concatenate([context.kept.nonzero()[0] == 0 for context in self.contexts])

    def place(self, row: int) -> tuple[Context, int]:
        """The context of a row, and its position there."""
        for context in self.contexts:
            if row < context.rows:
                return context, int(context.kept.nonzero()[0][row])
            row -= context.rows
        raise IndexError(row)

    def head(self, rows: int) -> Group:
        """The first contexts: as few as have so many rows."""
        reached = np.cumsum([context.rows for context in self.contexts])
        return Group(self.contexts[: int(np.searchsorted(reached, rows)) + 1])

    def only(self, rows: NDArray[np.bool_]) -> Group:
        """The same contexts with only these of their rows."""
        kept, at = [], 0
        for context in self.contexts:
            mask = context.kept.copy()
            mask[mask] = rows[at : at + context.rows]
            kept.append(Context(context.document, context.offset, context.ids, mask))
            at += context.rows
        return Group(tuple(kept))

    @cached_property
    def content_hash(self) -> str:
        """sha256 of tokens, documents, offsets, and of which rows are kept."""
        digest = hashlib.sha256()
        for context in self.contexts:
            digest.update(np.array([context.document, context.offset, len(context.ids)], "<i8").tobytes())
            digest.update(context.ids.astype("<i8").tobytes() + context.kept.tobytes())
        return digest.hexdigest()


def bos_for(tokenizer: Any, bos: str, kept: bool) -> Bos:
    """The bos token of every context: see `bos_token`. Raises TokenizerError."""
    if tokenizer is None:
        if bos not in ("auto", "tokenizer", "none"):
            raise InputError(f"bos {bos!r}: this model has no tokenizer, so it can only be 'none'")
        return Bos("none", None, kept)
    name = bos_token(tokenizer, bos)
    return Bos(name, None if name == "none" else int(tokenizer.convert_tokens_to_ids(name)), kept)


def special_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids of special and added tokens, where text gives no rows."""
    return () if tokenizer is None else tuple(tokenizer.convert_tokens_to_ids(list(special_tokens(tokenizer))))


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of all that decides a text's token ids; empty without a tokenizer."""
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return content_hash({"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()})
    # Truncation and padding are set by the last call, and nothing here uses them.
    described = json.dumps({**json.loads(backend.to_str()), "truncation": None, "padding": None}, sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def tokenized(documents: Iterable[Document], tokenizer: Any, tally: Tally) -> Iterator[Ids]:
    """Token ids of every document, in order, with no token added. They are counted in `tally` as they are taken.

    Raises InputError naming the document that cannot be tokenized.
    """
    for few in _chunks(documents):
        texts = [document for document in few if isinstance(document, str)]
        if texts and tokenizer is None:
            raise InputError("this model has no tokenizer: give documents as token ids, or vs.Model(net, tokenizer=)")
        encoded = iter(_encoded(texts, tokenizer, tally.texts) if texts else [])
        for document in few:
            ids = np.array(next(encoded), np.int64) if isinstance(document, str) else _ids(document, tally.texts)
            tally.texts += 1
            tally.nulls += document is NULL
            tally.empty += not len(ids) and document is not NULL
            tally.characters += len(document)
            yield ids


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if len(chunk) == _AT_ONCE or size > _CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encoded(texts: list[str], tokenizer: Any, first: int) -> Any:
    try:
        return tokenizer(texts, add_special_tokens=False, verbose=False, return_attention_mask=False)["input_ids"]
    except (TypeError, UnicodeEncodeError) as error:  # half of a surrogate pair is no text
        for number, text in enumerate(texts, first):
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise InputError(f"text {number} holds half a surrogate pair, which is no Unicode text") from error
        raise


def _ids(document: Sequence[int], number: int) -> Ids:
    ids = np.asarray(document)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)) or (ids.size and ids.min() < 0):
        raise InputError(f"document {number} is neither text nor a list of token ids: {ids.dtype} {list(ids.shape)}")
    return ids.astype(np.int64)


def groups(documents: Iterable[Ids], packing: Packing) -> Iterator[Group]:
    """Groups of contexts, in the order of the documents, until the texts end or the limit is reached."""
    waiting: list[Context] = []
    rows = 0
    for context in _limited(_contexts(documents, packing), packing.limit):
        if waiting and rows + context.rows > packing.group_rows:
            yield Group(tuple(waiting))
            waiting, rows = [], 0
        waiting.append(context)
        rows += context.rows
    if waiting:
        yield Group(tuple(waiting))


def _contexts(documents: Iterable[Ids], packing: Packing) -> Iterator[Context]:
    head = np.array([] if packing.bos.id is None else [packing.bos.id], np.int64)
    room = packing.context - len(head)
    for number, ids in enumerate(documents):
        # A document may begin with the token itself.
        there = len(head) and len(ids) and ids[0] == head[0]
        for offset in range(int(there), len(ids), room):
            piece = np.concatenate([head, ids[offset : offset + room]])
            kept = ~np.isin(piece, packing.special)
            # The bos token is a special token itself: only at the first position does `kept` decide about it.
            kept[0] = packing.bos.kept and (len(head) == 1 or kept[0])
            if kept.any():
                yield Context(number, offset, piece, kept)


def _limited(contexts: Iterator[Context], limit: int | None) -> Iterator[Context]:
    """Contexts with `limit` rows in all; the last one is cut after its last row."""
    left = limit
    for context in contexts:
        if left is not None and context.rows >= left:
            end = int(context.kept.nonzero()[0][left - 1]) + 1
            yield Context(context.document, context.offset, context.ids[:end], context.kept[:end])
            return
        # Tokens after the last row that is wanted would be run for nothing; causal models do not look ahead.
        left = None if left is None else left - context.rows
        yield context


@dataclass(frozen=True, eq=False)
class Batch:
    """Contexts that are run together.

    ids: padded on the right with each context's own last token. real: False on padding. kept: True where there is a
    row. rows: numbers of those rows in the group.
    """

    ids: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    kept: Bool[Tensor, "batch pos"]
    rows: Int[Tensor, " row"]


def batches(group: Group, tokens: int, ragged: bool = True) -> Iterator[Batch]:
    """The group's contexts in batches of about `tokens` tokens with padding, those of like length together.

    ragged: contexts of unequal lengths may be run together. Row numbers are those in the order of the contexts.
    """
    starts = np.cumsum([0, *(context.rows for context in group.contexts)])
    # Long ones first: a batch then has the width of its first context, and memory peaks at once and not at the end.
    order = sorted(range(len(group.contexts)), key=lambda number: -len(group.contexts[number].ids))
    at = 0
    while at < len(order):
        width = len(group.contexts[order[at]].ids)
        chosen = order[at : at + max(1, tokens // width)]
        if not ragged:
            chosen = [number for number in chosen if len(group.contexts[number].ids) == width]
        yield _batch(group, chosen, starts)
        at += len(chosen)


def _batch(group: Group, chosen: Sequence[int], starts: NDArray[np.int64]) -> Batch:
    contexts = [group.contexts[number] for number in chosen]
    width = len(contexts[0].ids)
    # Padded with a real token: an id out of range would stop the embedding, and what it gives is never read.
    ids = np.stack([np.pad(context.ids, (0, width - len(context.ids)), mode="edge") for context in contexts])
    real = np.stack([np.arange(width) < len(context.ids) for context in contexts])
    kept = np.stack([np.pad(context.kept, (0, width - len(context.kept))) for context in contexts])
    rows = np.concatenate([np.arange(starts[number], starts[number + 1]) for number in chosen])
    return Batch(torch.from_numpy(ids), torch.from_numpy(real), torch.from_numpy(kept), torch.from_numpy(rows))
