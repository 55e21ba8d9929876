"""A stream gives the rows a harvest would store, shuffled in a bounded buffer, and can begin at any batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
import vesalius as vs
from vesalius.data import Source, Stream
from vesalius.data.source import Rows
from vesalius.errors import InputError

DRAW = torch.Generator().manual_seed(0)
DOCUMENTS = [torch.randint(2, tiny.VOCAB, (n % 23,), generator=DRAW).tolist() for n in range(5, 45)]
TOTAL = sum(map(len, DOCUMENTS))
SITE = ["layers.1.mlp_out"]


@pytest.fixture(scope="module")
def model() -> vs.Model:
    return tiny.model("llama")


def stream(model: vs.Model, texts: Any = DOCUMENTS, **options: Any) -> Stream:
    return vs.data.stream(model, texts, **{"sites": SITE, "buffer": 60, "context": 12, "keep_bos": True, **options})


def take(source: Source, count: int, batch_size: int = 16, seed: int = 0, start: int = 0) -> list[Rows]:
    return list(islice(source.batches(batch_size, seed=seed, start=start), count))


def ordered(rows: Tensor) -> Tensor:
    """Rows in the order of their first value: the same for the same set of rows."""
    return rows[rows[:, 0].argsort()]


def test_an_epoch_holds_the_rows_that_a_harvest_stores(model: vs.Model, tmp_path: Path) -> None:
    source = stream(model)
    assert isinstance(source, Source)
    assert (source.n_rows, source.widths, [str(site) for site in source.sites]) == (None, (48,), SITE)
    store = vs.data.harvest(model, DOCUMENTS, sites=SITE, out=tmp_path, context=12, keep_bos=True)
    stored = torch.cat([rows[0] for _, rows in store.in_order(999)])
    found = torch.cat([batch[0] for batch in take(source, 2 * TOTAL // 16 + 1)])
    for epoch in (found[:TOTAL], found[TOTAL : 2 * TOTAL]):
        torch.testing.assert_close(ordered(epoch), ordered(stored), rtol=1e-4, atol=1e-5)
        assert not torch.equal(epoch, stored)
    assert not torch.equal(found[:TOTAL], found[TOTAL : 2 * TOTAL])


def test_the_same_seed_gives_the_same_batches_from_any_batch_on(model: vs.Model) -> None:
    whole = take(stream(model), 80, seed=5)
    assert len(whole) * 16 > 2.5 * TOTAL
    for start in (1, 3, 4, 27, 28, 79):
        for one, other in zip(take(stream(model), 80 - start, seed=5, start=start), whole[start:], strict=True):
            assert torch.equal(one[0], other[0])
    assert not torch.equal(take(stream(model), 1, seed=6)[0][0], whole[0][0])


def test_what_lies_before_the_start_is_not_run(model: vs.Model) -> None:
    source, runs = stream(model), 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    hook = model.module.model.layers[0].register_forward_pre_hook(count)
    try:
        take(source, 1)
        first, runs = runs, 0
        take(source, 1, start=200)
    finally:
        hook.remove()
    assert 0 < runs <= 2 * first


def test_in_the_place_of_an_outlier_comes_another_row() -> None:
    """So the number of rows does not depend on the model, and starting late costs nothing."""
    spiked = tiny.model("llama")
    with torch.no_grad():
        spiked.module.model.embed_tokens.weight[7] *= 100
    options = {"sites": ["embed"], "keep_bos": False}
    whole = take(stream(spiked, **options), 60)
    assert max(float(batch[0].norm(dim=1).max()) for batch in whole) < 10
    plain = take(stream(spiked, **options, max_norm=None), 60)
    assert max(float(batch[0].norm(dim=1).max()) for batch in plain) > 50
    for one, other in zip(take(stream(spiked, **options), 20, start=40), whole[40:], strict=True):
        assert torch.equal(one[0], other[0])
    assert float(stream(spiked, **options).sample(400, seed=0)[0].norm(dim=1).max()) < 10


def test_the_buffer_bounds_what_is_held_and_shuffles_across_documents(model: vs.Model, tmp_path: Path) -> None:
    sizes = [len(rows[0]) for rows, _ in islice(stream(model)._pools(("x", 0), 0), 20)]
    assert max(sizes) <= 60
    store = vs.data.harvest(model, DOCUMENTS, sites=SITE, out=tmp_path, context=12, keep_bos=True)
    stored = torch.cat([rows[0] for _, rows in store.in_order(999)])
    (batch,) = take(stream(model, buffer=300), 1, 32)[0]
    nearest = torch.cdist(batch, stored).argmin(1).tolist()
    assert len({store.trace(row).document for row in nearest}) > 8
    assert max(nearest) < 300


def test_a_sample_is_drawn_from_the_first_rows(model: vs.Model) -> None:
    source = stream(model)
    (rows,) = source.sample(100, seed=0)
    assert rows.shape == (100, 48)
    assert torch.equal(rows, source.sample(100, seed=0)[0])
    assert source.sample(10**6, seed=0)[0].shape == (TOTAL, 48)


def test_a_sample_runs_no_more_contexts_than_it_needs(model: vs.Model) -> None:
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    source = stream(model, buffer=10**6, batch_tokens=1)
    found = []
    for n in (1, 10**6):
        handle = model.module.model.embed_tokens.register_forward_hook(count)
        source.sample(n, seed=0)
        handle.remove()
        found.append(passes)
        passes = 0
    few, all_of_them = found
    assert few < all_of_them / 3


def test_the_hash_follows_model_texts_sites_and_packing(model: vs.Model) -> None:
    hashes = [
        stream(chosen, texts, **options).content_hash
        for chosen, texts, options in [
            (model, DOCUMENTS, {}), (tiny.model("llama", 1), DOCUMENTS, {}), (model, DOCUMENTS[::-1], {}),
            (model, DOCUMENTS, {"context": 11}), (model, DOCUMENTS, {"sites": ["embed"]}),
            (model, DOCUMENTS, {"buffer": 61}),
            (model, DOCUMENTS, {"tokens": 99}), (model, DOCUMENTS, {"keep_bos": False}),
        ]
    ]  # fmt: skip
    assert len(set(hashes)) == len(hashes)
    assert stream(model).content_hash == hashes[0]


def test_two_models_a_limit_and_another_dtype(model: vs.Model) -> None:
    source = vs.data.stream([model, tiny.model("llama", 1)], DOCUMENTS, sites=["embed"], tokens=50, context=12,
                            dtype=torch.bfloat16)  # fmt: skip
    a, b = take(source, 1, 50)[0]
    assert a.dtype == torch.bfloat16
    assert not torch.equal(a, b)
    again = take(source, 2, 50)[1][0]
    assert torch.equal(ordered(again.float()), ordered(a.float()))


def test_texts_that_can_be_read_only_once_or_hold_nothing_are_refused(model: vs.Model) -> None:
    with pytest.raises(InputError, match="a list_iterator can be read only once, and a stream starts again"):
        stream(model, iter(DOCUMENTS))
    with pytest.raises(InputError, match="the texts give no rows"):
        take(stream(model, [[], [3]], keep_bos=False), 1)
    with pytest.raises(InputError, match="room for 1 row at least; got 0"):
        stream(model, buffer=0)
    with pytest.raises(InputError, match="the texts give no rows"):
        stream(model, [[]]).sample(3, seed=0)

    class Endless:
        def __iter__(self) -> Iterator[list[int]]:
            while True:
                yield [4, 5, 6]

    assert len(take(stream(model, Endless()), 3)) == 3
