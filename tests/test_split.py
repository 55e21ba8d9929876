"""Parts of a store: whole documents, rows under their old numbers, nothing in both; training leaves the last out."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
import vesalius as vs
from vesalius.data import ActivationStore
from vesalius.dictionaries import TrainConfig, train
from vesalius.dictionaries.held_out import evaluation_rows
from vesalius.errors import InputError

SITE = "layers.0.resid_post"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """600 rows or so in several shards, of documents of unequal lengths, some cut into several contexts."""
    draw = torch.Generator().manual_seed(0)
    sizes = [7, 31, 90, 2, 40, 0, 25, 66, 12, 50, 80, 19, 33, 44, 90, 21]
    documents = [torch.randint(2, tiny.VOCAB, (size,), generator=draw).tolist() for size in sizes]
    made = vs.data.harvest(
        vs.Model(tiny.llama(layers=1)), documents, sites=[SITE], out=tmp_path_factory.mktemp("store") / "acts",
        context=30, shard_bytes=30_000,
    )  # fmt: skip
    assert len(made.manifest.shards) > 3
    return made


def documents_of(store: ActivationStore) -> list[int]:
    return [store.trace(row).document for row in store.rows]


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.9])
def test_two_parts_hold_every_row_once_and_share_no_document(store: ActivationStore, share: float) -> None:
    first, last = store.split(share)
    assert [*first.rows, *last.rows] == [*store.rows]
    assert set(documents_of(first)) & set(documents_of(last)) == set()
    # Nearer to the share than any other cut between documents would be.
    owners = documents_of(store)
    cuts = [row for row in range(1, len(owners)) if owners[row] != owners[row - 1]]
    wanted = round((1 - share) * len(owners))
    assert abs(len(first.rows) - wanted) == min(abs(cut - wanted) for cut in cuts)


def test_rows_of_a_part_are_those_of_the_store_under_the_same_numbers(store: ActivationStore) -> None:
    _, last = store.split(0.3)
    whole = torch.cat([rows[0] for _, rows in store.in_order(64)])
    firsts, pieces = zip(*last.in_order(64), strict=True)
    assert firsts[0] == last.rows.start
    assert torch.equal(torch.cat([piece[0] for piece in pieces]), whole[last.rows.start :])
    assert torch.equal(last.tokens, store.tokens[last.rows.start :])
    assert last.trace(last.rows.start) == store.trace(last.rows.start)
    with pytest.raises(InputError, match=rf"this store has rows {last.rows.start} to {len(whole) - 1}"):
        last.trace(0)


@pytest.mark.parametrize("pool_rows", [None, 40])
def test_an_epoch_of_a_part_holds_each_of_its_rows_once(store: ActivationStore, pool_rows: int | None) -> None:
    opened = ActivationStore.open(store.folder, pool_rows=pool_rows)
    whole = torch.cat([rows[0] for _, rows in store.in_order(64)])
    for part in opened.split(0.35):
        drawn = torch.cat([batch[0] for batch in islice(part.batches(1, seed=0), part.n_rows)])
        wanted = whole[part.rows.start : part.rows.stop]
        assert sorted(map(tuple, drawn.tolist())) == sorted(map(tuple, wanted.tolist()))
        (sample,) = part.sample(10_000, seed=1)
        assert len(sample) == part.n_rows


def test_contexts_are_those_of_the_rows(store: ActivationStore) -> None:
    for part in (store, store.split(0.3)[1]):
        seen = []
        for first, context in part.contexts():
            for number, at in enumerate(np.flatnonzero(context.kept)):
                origin = store.trace(first + number)
                assert (origin.document, origin.ids, origin.at) == (context.document, tuple(context.ids), at)
                seen.append(first + number)
        assert seen == [*part.rows]


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 40), (63, 65), (100, 401), (200, 201)])
def test_rows_are_read_by_number(store: ActivationStore, start: int, stop: int) -> None:
    whole = torch.cat([rows[0] for _, rows in store.in_order(64)])
    assert torch.equal(store.at(range(start, stop))[0], whole[start:stop])
    last = store.split(0.3)[1]
    rows = range(last.rows.start + start // 3, last.rows.start + stop // 3 + 1)
    assert torch.equal(last.at(rows)[0], whole[rows.start : rows.stop])
    with pytest.raises(InputError, match="are no rows of this store"):
        last.at(range(start, last.rows.start + 1))


def test_documents_are_chosen_by_number(store: ActivationStore) -> None:
    owners = documents_of(store)
    part = store.documents(4, 9)
    assert [*part.rows] == [row for row, owner in enumerate(owners) if 4 <= owner < 9]
    assert store.documents(9).rows.stop == store.n_rows
    with pytest.raises(InputError, match="no row of this store is of documents 16 to the last"):
        store.documents(16)


def test_a_part_has_a_hash_of_its_own_and_the_whole_keeps_its_own(store: ActivationStore) -> None:
    first, last = store.split(0.3)
    assert len({store.content_hash, first.content_hash, last.content_hash}) == 3
    assert store.documents().content_hash == store.content_hash
    assert "rows of" in repr(last) and f"from row {last.rows.start:,} on" in repr(last)


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    one = vs.data.harvest(vs.Model(tiny.llama(layers=1)), [[*range(2, 40)]], sites=[SITE], out=tmp_path, context=50)
    with pytest.raises(InputError, match="all 37 rows are of one document"):
        one.split(0.1)
    with pytest.raises(InputError, match="between 0 and 1; got 1"):
        one.split(1)


CONFIG = TrainConfig(n_latents=16, k=2, batch_size=32, steps=3, held_out=0.2)


def metadata_of(data: object, config: TrainConfig = CONFIG) -> dict[str, object]:
    return dict(train(data, config).metadata)  # type: ignore[attr-defined]


def test_training_leaves_the_last_documents_out_and_says_so(store: ActivationStore) -> None:
    kept, left = store.split(0.2)
    notes: list[str] = []
    metadata = train(store, CONFIG, sink=lambda event: notes.append(event.message)).metadata  # type: ignore[attr-defined]
    assert metadata["data"] == kept.content_hash
    assert f"the last documents, {left.n_rows} rows, are held out, to evaluate on (held_out)" in notes
    found = evaluation_rows(store, metadata)
    assert isinstance(found.source, ActivationStore)
    assert (found.source.rows, found.trained_on) == (left.rows, False)
    # The same texts at other sites: the same documents.
    other = ActivationStore.open(store.folder, pool_rows=64)
    assert evaluation_rows(other, metadata).source.content_hash == other.split(0.2)[1].content_hash


def test_rows_that_were_trained_on_are_called_so(store: ActivationStore) -> None:
    whole = metadata_of(store, TrainConfig(n_latents=16, k=2, batch_size=32, steps=3, held_out=0))
    assert whole["data"] == store.content_hash
    assert evaluation_rows(store, whole).trained_on is True
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    metadata = metadata_of(rows)
    assert evaluation_rows(vs.data.TensorSource(rows), metadata).trained_on is True
    assert evaluation_rows(vs.data.TensorSource(rows + 1), metadata).trained_on is None
    assert evaluation_rows(store, metadata).trained_on is None


def test_whoever_made_a_part_chose_its_rows(store: ActivationStore) -> None:
    first, _ = store.split(0.5)
    assert metadata_of(first)["data"] == first.content_hash


def test_a_store_of_one_document_is_trained_on_whole(tmp_path: Path) -> None:
    one = vs.data.harvest(vs.Model(tiny.llama(layers=1)), [[*range(2, 60)]], sites=[SITE], out=tmp_path, context=60)
    metadata = metadata_of(one)
    assert metadata["data"] == one.content_hash
    assert evaluation_rows(one, metadata).trained_on is True
