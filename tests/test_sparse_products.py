"""The sparse products and the choosing of entries, against dense ones; the screen chooses what float32 does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vesalius.dictionaries import TrainConfig
from vesalius.dictionaries.kinds import TRAINABLE
from vesalius.dictionaries.training import sparse
from vesalius.dictionaries.training.encode import DenseChunk, Encoder, codes_of, encode
from vesalius.dictionaries.training.run import Processes
from vesalius.dictionaries.training.screen import Screen
from vesalius.dictionaries.training.sparse import SparseChunk
from vesalius.jobs.workers import Workers

ROWS, M, D, OUT = 37, 2048, 24, 9


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense_of(piece: SparseChunk, values: Tensor) -> Tensor:
    dense = torch.zeros(len(piece.offsets) - 1, piece.n_latents)
    dense[piece.bags, piece.columns] = values
    return dense


@pytest.fixture
def piece() -> SparseChunk:
    """Some rows with many entries, some with none."""
    pre = normal(ROWS, M)
    pre[5] = pre[11] = -9.0
    pre[12, :300] += 9.0
    return sparse.entries_from(pre, torch.tensor(1.5))


def test_sparse_products_are_the_dense_ones(piece: SparseChunk) -> None:
    decoder, table, weights = normal(M, OUT, seed=3), normal(ROWS, OUT, seed=4), normal(len(piece.pre), seed=5)
    dense = dense_of(piece, weights)
    torch.testing.assert_close(piece.decode(weights, decoder), dense @ decoder)
    torch.testing.assert_close(piece.dots(table, decoder), (table @ decoder.T)[piece.bags, piece.columns])
    torch.testing.assert_close(piece.sum_per_latent(weights).float(), dense.sum(0))
    torch.testing.assert_close(piece.per_entry(normal(M, seed=6)), normal(M, seed=6)[piece.columns])


def test_dots_without_the_fast_operator_are_the_same(piece: SparseChunk, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, table = normal(M, OUT, seed=3), normal(ROWS, OUT, seed=4)
    fast = piece.dots(table, decoder)
    monkeypatch.setattr(sparse, "_DOTS", None)
    torch.testing.assert_close(piece.dots(table, decoder), fast)


def test_outer_products_of_both_codes_are_the_dense_one(piece: SparseChunk) -> None:
    table, weights, dpre = normal(ROWS, OUT, seed=4), normal(len(piece.pre), seed=5), normal(len(piece.pre), seed=6)
    whole = DenseChunk(torch.zeros(ROWS, M))
    whole.keep(dense_of(piece, weights), dense_of(piece, dpre))
    piece.keep(weights, dpre)
    for codes in (codes_of([piece], 1), codes_of([whole], 1)):
        for which, values in (("values", weights), ("dpre", dpre)):
            expected = (dense_of(piece, values).T @ table)[100:300]
            torch.testing.assert_close(codes.outer(which, table, 100, 300), expected)


def test_entries_are_sorted_by_column_alike_everywhere(piece: SparseChunk) -> None:
    order, rows, begins = sparse.by_column(piece.columns, piece.offsets, M)
    assert torch.equal(order, piece.columns.argsort(stable=True))
    assert torch.equal(rows, piece.bags[order])
    assert torch.equal(begins.diff(), torch.bincount(piece.columns, minlength=M))


@pytest.mark.parametrize("k", [1, 7, 32, 60])
@pytest.mark.parametrize("width", [M, M + 13, 300])
def test_the_largest_of_rows_are_those_of_topk(k: int, width: int) -> None:
    pre = normal(ROWS, width)
    found = sparse.top_of_rows(pre, k)
    expected = torch.zeros_like(pre).scatter(1, pre.topk(k, 1).indices, 1.0)
    assert torch.equal(dense_of(found, torch.ones(len(found.pre))), expected)
    assert torch.equal(found.pre, pre[found.bags, found.columns])


def test_equal_entries_do_not_make_more_than_k() -> None:
    pre = normal(ROWS, M).round()
    found = sparse.top_of_rows(pre, 32)
    assert found.offsets.diff().tolist() == [32] * ROWS
    sums = dense_of(found, found.pre).sum(1)
    torch.testing.assert_close(sums, pre.topk(32, 1).values.sum(1))
    assert sparse.top_of_rows(torch.zeros(ROWS, M), 32).offsets.diff().tolist() == [32] * ROWS


def test_groups_get_bags_of_their_own(piece: SparseChunk) -> None:
    ends = (100, 700, M)
    grouped = piece.grouped(ends)
    decoder = normal(M, OUT, seed=3)
    reconstruction = grouped.decode(piece.pre, decoder).view(ROWS, 3, OUT)
    dense = dense_of(piece, piece.pre)
    for number, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
        expected = dense[:, start:end] @ decoder[start:end]
        torch.testing.assert_close(reconstruction[:, number], expected, rtol=1e-4, atol=1e-4)


# The screen


def spread_out(n: int, width: int, seed: int) -> Tensor:
    """Rows of very different norms, with a few strong directions, as residual streams have."""
    rows = normal(n, width, seed=seed) * torch.logspace(-1, 1.5, width)
    return rows * torch.logspace(-2, 2, n)[:, None]


@pytest.mark.parametrize("bias", [0.0, 1.0])
@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_rough_values_stay_within_the_margin(bias: float, scale: float) -> None:
    x, weight = spread_out(200, 64, 0), scale * spread_out(M, 64, 1)
    offsets = bias * normal(M, seed=2)
    with Workers(1) as workers:
        screen = Screen.of(weight, offsets, workers)
    exact = x.double() @ weight.double().T + offsets
    rough = screen.rough(x).double()
    margin = screen.margin(screen.spread(x)[:, None], rough)
    assert bool(((exact - rough).abs() <= margin).all())
    assert float(((exact - rough).abs() / margin).max()) > 0.05  # not so wide as to be empty


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "relu", "jumprelu"])
def test_the_screen_chooses_the_latents_of_float32(kind: str) -> None:
    config = TrainConfig(kind=kind, n_latents=M, k=32)
    x = spread_out(300, 64, 0) / 10
    weight = torch.nn.functional.normalize(normal(M, 64, seed=1), dim=1)
    bias = 0.1 * normal(M, seed=2) - (1.0 if kind == "relu" else 0.0)
    vectors = {"b_enc": bias, "log_threshold": torch.full((M,), 2.0).log()}
    found = {}
    with Workers(1) as workers:
        for precision in ("fp32", "bf16-screen"):
            encoder = Encoder.of(weight, bias, precision, workers)
            pieces, _ = encode(encoder, x.split(100), TRAINABLE[kind], vectors, config, workers, Processes())
            found[precision] = torch.cat([dense_of(p, p.pre) for p in pieces if isinstance(p, SparseChunk)])
        assert encoder.screen is not None
        screened = (
            encoder.screen.top_of_rows(x[:100], 32)
            if kind == "topk"
            else encoder.screen.above(x[:100], torch.tensor(2.0))
        )
    assert screened is not None
    assert torch.equal(found["fp32"] != 0, found["bf16-screen"] != 0)
    torch.testing.assert_close(found["fp32"], found["bf16-screen"], rtol=1e-4, atol=1e-4)


def test_a_screen_that_lets_much_through_steps_aside() -> None:
    weight = torch.ones(M, 64)
    with Workers(1) as workers:
        screen = Screen.of(weight, torch.zeros(M), workers)
        assert screen.top_of_rows(normal(10, 64), 32) is None
        assert screen.above(normal(10, 64), torch.tensor(-1e9)) is None
        encoder = Encoder.of(weight, torch.zeros(M), "bf16-screen", workers)
    assert encoder.top_of_rows(normal(10, 64), 32).offsets.diff().tolist() == [32] * 10


def test_a_level_that_was_guessed_too_high_is_lowered() -> None:
    weight, x = torch.nn.functional.normalize(normal(M, 64, seed=1), dim=1), normal(600, 64)
    x[::9] *= 50  # the rows from which the level is guessed
    config = TrainConfig(kind="batchtopk", n_latents=M, k=32)
    with Workers(1) as workers:
        encoder = Encoder.of(weight, torch.zeros(M), "fp32", workers)
        pieces, least = encode(encoder, x.split(600), TRAINABLE["batchtopk"], {}, config, workers, Processes())
    pre = x @ weight.T
    expected = pre.flatten().topk(32 * 600).values[-1]
    assert least is not None
    assert float(least) == pytest.approx(float(expected), rel=1e-5)
    assert sum(len(p.pre) for p in pieces) == 32 * 600


def test_fewer_positive_ones_than_asked_for_are_all_taken() -> None:
    weight, x = torch.nn.functional.normalize(normal(M, 64, seed=1), dim=1), normal(100, 64)
    config = TrainConfig(kind="batchtopk", n_latents=M, k=2000)
    with Workers(1) as workers:
        encoder = Encoder.of(weight, torch.full((M,), -1.5), "fp32", workers)
        pieces, least = encode(encoder, x.split(100), TRAINABLE["batchtopk"], {}, config, workers, Processes())
    pre = x @ weight.T - 1.5
    assert sum(len(p.pre) for p in pieces) == int((pre > 0).sum())
    assert least is not None
    assert float(least) >= 0


def test_workers_keep_the_order_and_raise_what_was_raised() -> None:
    with Workers(3) as workers:
        assert workers.map(lambda n: n * n, range(20)) == [n * n for n in range(20)]
        assert workers.map(lambda _: torch.get_num_threads(), range(6)) == [1] * 6
        with pytest.raises(ZeroDivisionError):
            workers.map(lambda n: 1 / n, [1, 0, 2])
    assert torch.get_num_threads() == 1
