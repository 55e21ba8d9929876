"""Packing: every token of every document, once, in contexts of its own document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vesalius as vs
from tiny_folder import tiny_folder
from vesalius.data.packing import (
    Bos,
    Group,
    Packing,
    Tally,
    batches,
    bos_for,
    groups,
    special_ids,
    tokenized,
    tokenizer_hash,
)
from vesalius.errors import InputError, TokenizerError

BOS, SPECIAL = 1, (0, 1, 2)
DOCUMENTS = st.lists(st.lists(st.integers(0, 9), max_size=30), max_size=12)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return vs.load(tiny_folder(tmp_path_factory.mktemp("model"))).tokenizer


def packing(
    context: int = 6, head: int | None = BOS, kept: bool = False, rows: int = 10, limit: int | None = None
) -> Packing:
    return Packing(context, Bos("none" if head is None else "<bos>", head, kept), SPECIAL, rows, limit)


def arrays(documents: list[list[int]]) -> list[Any]:
    return [np.array(ids, np.int64) for ids in documents]


def rows_of(found: list[Group]) -> list[tuple[int, int, int]]:
    """Document, number in the document, and token, of every row; the bos token has number -1."""
    return [
        (context.document, context.offset + at - (context.ids[0] == BOS and len(context.ids) > 0), int(context.ids[at]))
        for group in found
        for context in group.contexts
        for at in context.kept.nonzero()[0].tolist()
    ]


@given(DOCUMENTS, st.integers(3, 8), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_every_token_that_is_not_special_gives_one_row_in_order(
    documents: list[list[int]], context: int, rows: int
) -> None:
    found = list(groups(arrays(documents), packing(context, rows=rows)))
    wanted = [
        (number, at, token)
        for number, ids in enumerate(documents)
        for at, token in enumerate(ids)
        if token not in SPECIAL
    ]
    assert rows_of(found) == wanted
    assert all(len(c.ids) <= context and c.ids[0] == BOS and c.rows > 0 for group in found for c in group.contexts)
    assert all(group.rows <= rows or len(group.contexts) == 1 for group in found)
    assert sum(group.rows for group in found) == len(wanted)


@given(DOCUMENTS, st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_a_limit_is_met_exactly_and_leaves_the_rows_before_it_as_they_are(
    documents: list[list[int]], limit: int
) -> None:
    everything = rows_of(list(groups(arrays(documents), packing())))
    assert rows_of(list(groups(arrays(documents), packing(limit=limit)))) == everything[:limit]


def test_without_a_bos_token_the_first_position_is_dropped_all_the_same() -> None:
    documents = arrays([[5, 6, 7, 8, 9, 5, 6, 7]])
    (group,) = groups(documents, packing(4, None))
    assert [c.kept.tolist() for c in group.contexts] == [[False, True, True, True]] * 2
    (group,) = groups(documents, packing(4, None, kept=True))
    assert group.rows == 8
    (group,) = groups(documents, packing(5, kept=True))
    assert [c.ids.tolist() for c in group.contexts] == [[1, 5, 6, 7, 8], [1, 9, 5, 6, 7]]
    assert group.rows == 10
    special_first = arrays([[2, 5, 6]])
    (group,) = groups(special_first, packing(4, None, kept=True))
    assert group.rows == 2


@given(DOCUMENTS, st.integers(1, 40), st.booleans())
@settings(max_examples=60, deadline=None)
def test_batches_hold_every_context_once_within_their_bound(
    documents: list[list[int]], tokens: int, ragged: bool
) -> None:
    for group in groups(arrays(documents), packing(rows=40)):
        wanted = [(c.ids[at], c.ids.tolist()) for c in group.contexts for at in c.kept.nonzero()[0]]
        found: dict[int, tuple[int, list[int]]] = {}
        for batch in batches(group, tokens, ragged):
            assert batch.ids.shape[0] == 1 or batch.ids.numel() <= tokens
            assert ragged or bool(batch.real.all())
            where = batch.kept.nonzero().tolist()
            for row, (example, at) in zip(batch.rows.tolist(), where, strict=True):
                found[row] = (int(batch.ids[example, at]), batch.ids[example][batch.real[example]].tolist())
            lengths = batch.real.sum(1)
            assert torch.equal(batch.real, torch.arange(batch.ids.shape[1])[None] < lengths[:, None])
        assert [found[row] for row in range(group.rows)] == wanted
        assert len(found) == group.rows


@given(DOCUMENTS, st.integers(0, 2**20))
@settings(max_examples=40, deadline=None)
def test_some_rows_of_a_group(documents: list[list[int]], bits: int) -> None:
    for group in groups(arrays(documents), packing(kept=True, rows=40)):
        wanted = np.array([bool(bits >> (row % 20) & 1) for row in range(group.rows)])
        assert rows_of([group.only(wanted)]) == [row for row, use in zip(rows_of([group]), wanted, strict=True) if use]
        assert group.first.tolist() == [at == 0 for c in group.contexts for at, kept in enumerate(c.kept) if kept]


def test_a_group_is_known_by_its_tokens_documents_and_rows() -> None:
    hashes = {
        next(groups(arrays(documents), chosen)).content_hash
        for documents, chosen in [
            ([[5, 6, 7]], packing()), ([[5, 6, 8]], packing()), ([[], [5, 6, 7]], packing()),
            ([[5, 6, 7]], packing(kept=True)), ([[5, 6, 7]], packing(head=None)),
            ([[5], [6, 7]], packing()), ([[5, 6, 7]], packing(limit=2)),
        ]
    }  # fmt: skip
    assert len(hashes) == 7


def test_texts_become_ids_one_by_one_and_are_counted(tokenizer: Any) -> None:
    texts = ["the 12", "", "a <|end|> b", [5, 6], " the"]
    tally = Tally()
    found = [ids.tolist() for ids in tokenized(texts, tokenizer, tally)]
    assert found == [tokenizer.encode(t, add_special_tokens=False) if isinstance(t, str) else t for t in texts]
    assert (tally.texts, tally.empty) == (5, 1)
    many = [f"{number} the" for number in range(600)]
    assert [tokenizer.decode(ids) for ids in tokenized(many, tokenizer, Tally())] == many


def test_counts_stop_where_reading_stops(tokenizer: Any) -> None:
    tally = Tally()
    list(groups(tokenized(["abc", "", "def", "ghi", ""], tokenizer, tally), packing(limit=5)))
    assert (tally.texts, tally.empty) == (3, 1)


def test_documents_that_are_none_are_named(tokenizer: Any) -> None:
    for document in ([[1]], [0.5], [-1]):
        with pytest.raises(InputError, match="document 1 is neither text nor a list of token ids"):
            list(tokenized(["a", document], tokenizer, Tally()))  # type: ignore[list-item]
    with pytest.raises(InputError, match="text 2 holds half a surrogate pair"):
        list(tokenized(["a", "b", "c\ud800"], tokenizer, Tally()))
    with pytest.raises(InputError, match="this model has no tokenizer"):
        list(tokenized(["a"], None, Tally()))
    assert [ids.tolist() for ids in tokenized([[3]], None, Tally())] == [[3]]


def test_the_bos_is_as_in_tasks_and_says_what_it_does(tokenizer: Any) -> None:
    found = bos_for(tokenizer, "auto", False)
    assert (found.token, found.id) == ("<|start|>", 1)
    assert found.describe() == "bos token <|start|>, its activations dropped"
    assert bos_for(tokenizer, "none", True).describe() == "no bos token, activations of the first position kept"
    assert bos_for(None, "auto", False) == Bos("none", None, False)
    with pytest.raises(TokenizerError, match="'the' is not a special token"):
        bos_for(tokenizer, "the", False)
    with pytest.raises(InputError, match="no tokenizer, so it can only be 'none'"):
        bos_for(None, "<|start|>", False)
    assert special_ids(tokenizer) == (0, 1, 2)


def test_a_tokenizer_is_known_by_what_it_does_not_by_how_it_was_last_called(tokenizer: Any, tmp_path: Path) -> None:
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(tokenizer) == before
    other = vs.load(tiny_folder(tmp_path)).tokenizer
    assert tokenizer_hash(other) == before
    other.add_tokens(["<new>"])
    assert tokenizer_hash(other) != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"context": 2}, "context must be at least 3 tokens; got 2"), ({"limit": 0}, "tokens must be at least 1; got 0"),
     ({"context": 1, "head": None}, "context must be at least 2"), ({"rows": 0}, "room for 1 row at least; got 0")],
)  # fmt: skip
def test_packings_that_hold_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        packing(**changes)
