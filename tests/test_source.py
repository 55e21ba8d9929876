"""Plain tensors as a source of rows: the same seed, the same batches, wherever a run was broken off."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from vesalius.data.source import Rows, Source, TensorSource, as_source
from vesalius.errors import InputError, NotFiniteError

N = 23
X = torch.arange(N * 3.0).view(N, 3)
Y = -torch.arange(N * 2.0).view(N, 2)


def take(source: Source, count: int, batch_size: int, seed: int = 0, start: int = 0) -> list[Rows]:
    return list(islice(source.batches(batch_size, seed=seed, start=start), count))


def row_numbers(batches: list[Rows]) -> list[int]:
    return [int(value) // 3 for batch in batches for value in batch[0][:, 0]]


def test_tensors_are_a_source() -> None:
    source = TensorSource(X, Y)
    assert isinstance(source, Source)
    assert [str(site) for site in source.sites] == ["module:tensor0|out", "module:tensor1|out"]
    assert (source.widths, source.n_rows) == ((3, 2), N)
    assert [str(site) for site in TensorSource(X, sites=["layers.3.mlp_in"]).sites] == ["layers.3.mlp_in"]


@pytest.mark.parametrize("batch_size", [1, 4, 5, N, 2 * N + 3])
def test_every_epoch_holds_every_row_once_in_an_order_of_its_own(batch_size: int) -> None:
    numbers = row_numbers(take(TensorSource(X), 4 * N // batch_size + 4, batch_size))
    epochs = [numbers[at : at + N] for at in (0, N, 2 * N)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert list(range(N)) not in epochs


@pytest.mark.parametrize("batch_size", [1, 4, 5, N, 2 * N + 3])
def test_a_run_that_was_broken_off_goes_on_with_the_same_batches(batch_size: int) -> None:
    source = TensorSource(X)
    whole = row_numbers(take(source, 30, batch_size, seed=7))
    for start in (1, 5, 6, 29):
        assert row_numbers(take(source, 30 - start, batch_size, seed=7, start=start)) == whole[start * batch_size :]


def test_rows_of_all_tensors_stay_together_and_every_batch_is_full_and_float32() -> None:
    for x, y in take(TensorSource(X.double(), Y.bfloat16()), 20, 4):
        assert x.shape == (4, 3)
        assert (x.dtype, y.dtype) == (torch.float32, torch.float32)
        assert torch.equal(y[:, 0], (-x[:, 0] / 3 * 2).bfloat16().float())
    assert take(TensorSource(X, dtype=torch.bfloat16), 1, 4)[0][0].dtype == torch.bfloat16


def test_the_seed_decides() -> None:
    source = TensorSource(X)
    assert row_numbers(take(source, 9, 4, seed=1)) == row_numbers(take(TensorSource(X.clone()), 9, 4, seed=1))
    assert row_numbers(take(source, 9, 4, seed=1)) != row_numbers(take(source, 9, 4, seed=2))
    assert torch.equal(source.sample(9, seed=1)[0], source.sample(9, seed=1)[0])
    assert not torch.equal(source.sample(9, seed=1)[0], source.sample(9, seed=2)[0])


def test_a_sample_holds_different_rows() -> None:
    sampled = row_numbers([TensorSource(X, Y).sample(9, seed=0)])
    assert len(set(sampled)) == 9
    assert sorted(row_numbers([TensorSource(X).sample(999, seed=0)])) == list(range(N))


def test_the_hash_follows_values_names_and_dtypes() -> None:
    changed = X.clone()
    changed[5, 1] += 1e-4
    others = [
        TensorSource(changed), TensorSource(X.double()), TensorSource(X, Y), TensorSource(X.T.contiguous()),
        TensorSource(X, sites=["layers.0.mlp_in"]), TensorSource(X, dtype=torch.bfloat16),
    ]  # fmt: skip
    hashes = {source.content_hash for source in [TensorSource(X), *others]}
    assert len(hashes) == len(others) + 1
    assert TensorSource(X).content_hash == TensorSource(X.T.contiguous().T).content_hash


def test_what_is_given_becomes_a_source() -> None:
    source = TensorSource(X)
    assert as_source(source) is source
    assert "content_hash" not in vars(source)
    assert as_source(X).widths == (3,)
    assert as_source((X, Y)).widths == as_source([X, Y]).widths == (3, 2)
    for given in (None, "acts/", [], X.numpy(), (X, 1)):
        with pytest.raises(InputError, match=r"a store, a stream, a tensor \[n, width\] or a tuple"):
            as_source(given)


def test_tensors_that_are_no_rows_are_refused() -> None:
    bad = X.clone()
    bad[4, 1] = float("nan")
    with pytest.raises(NotFiniteError, match="tensor 1 holds NaN or infinity, first in row 4"):
        TensorSource(X, bad)
    with pytest.raises(InputError, match="tensor 1 has 22 rows and tensor 0 has 23"):
        TensorSource(X, Y[1:])
    for tensor in (X[0], X.long(), X[:0], "x"):
        with pytest.raises(InputError, match=r"tensor 0 must hold floating-point rows \[n, width\], at least one; got"):
            TensorSource(tensor)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no tensors"):
        TensorSource()
    with pytest.raises(InputError, match="2 sites were given for 1 tensors"):
        TensorSource(X, sites=["layers.0.mlp_in", "layers.0.mlp_out"])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("batch_size", {"batch_size": 0, "seed": 0}), ("batch_size", {"batch_size": 2.0, "seed": 0}),
     ("seed", {"batch_size": 1, "seed": -1}), ("start", {"batch_size": 1, "seed": 0, "start": -1})],
)  # fmt: skip
def test_bad_arguments_are_refused_at_the_call(name: str, arguments: dict[str, int]) -> None:
    with pytest.raises(InputError, match=f"{name} must be a whole number, at least"):
        TensorSource(X).batches(**arguments)
    with pytest.raises(InputError, match="n must be a whole number, at least 1; got 0"):
        TensorSource(X).sample(0, seed=0)
