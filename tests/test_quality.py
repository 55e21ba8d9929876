"""Quality of dictionaries: closed forms, loops over rows, planted features; what shrinks or is random is seen."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vesalius as vs
from planted_features import draw, sparse_sums, unit
from vesalius.data import TensorSource
from vesalius.dictionaries import Dictionary, TrainConfig, geometry, quality, shared, train
from vesalius.dictionaries.evaluation.baselines import reduced_rank, untrained
from vesalius.dictionaries.evaluation.figures import WORDS, row_figures
from vesalius.dictionaries.evaluation.geometry import matching, nearest_cosines, random_unit
from vesalius.dictionaries.evaluation.sample import Sample
from vesalius.dictionaries.evaluation.totals import CoderReconstructor, Reconstructed, Totals, totals_of
from vesalius.errors import InputError
from vesalius.site import Site

SITE = Site("module", module="tensor0")
SETTINGS = settings(max_examples=30, deadline=None)


class Fixed:
    """A reconstructor that gives rows that were decided on before."""

    name = "fixed"

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def reconstruct(self, inputs: Any) -> Reconstructed:
        return Reconstructed((self.rows,), torch.ones(len(self.rows), dtype=torch.long))


def sample_of(x: Tensor, y: Tensor | None = None, groups: int = 4) -> Sample:
    return Sample((x,), (x if y is None else y,), np.arange(len(x)) * min(groups, len(x)) // len(x), "groups of rows")


def figures_of(x: Tensor, reconstruction: Tensor) -> dict[str, float]:
    found = row_figures(totals_of(Fixed(reconstruction), sample_of(x)))
    return {name: figure.value for name, figure in found.items()}


def made(d: int = 6, n: int = 20, seed: int = 0, **changes: Any) -> Dictionary:
    fields: dict[str, Any] = {
        "activation": "relu", "in_sites": (SITE,), "out_sites": (SITE,), "encoders": (unit(n, d, seed).T.contiguous(),),
        "decoders": (unit(n, d, seed + 1),), "b_enc": torch.randn(n, generator=draw(seed)) * 0.3,
        "b_dec": (torch.randn(d, generator=draw(seed + 2)) * 0.1,),
    }  # fmt: skip
    return Dictionary(**{**fields, **changes})


def identity(d: int, site: Site = SITE) -> Dictionary:
    """relu(x) - relu(-x) is x to the last bit."""
    eye = torch.eye(d)
    both = torch.cat([eye, -eye])
    return Dictionary("relu", (site,), (site,), (both.T.contiguous(),), (both,), torch.zeros(2 * d), (torch.zeros(d),))


# The fraction of variance unexplained


def test_the_closed_forms_of_the_fvu() -> None:
    x, reconstruction = torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    assert figures_of(x, reconstruction)["fvu"] == pytest.approx(0.2, abs=1e-12)
    assert figures_of(x, x.mean(0).expand(2, -1))["fvu"] == pytest.approx(1.0, abs=1e-12)
    assert figures_of(x, x)["fvu"] == 0


@SETTINGS
@given(st.integers(0, 10_000), st.floats(1e-3, 1e3), st.floats(-50, 50))
def test_the_fvu_is_the_same_in_other_units_from_another_origin_and_turned(
    seed: int, scale: float, shift: float
) -> None:
    x, reconstruction = torch.randn(2, 12, 5, generator=draw(seed), dtype=torch.float64)
    wanted = figures_of(x, reconstruction)["fvu"]
    turn = torch.linalg.qr(torch.randn(5, 5, generator=draw(seed + 1), dtype=torch.float64)).Q
    for change in (lambda t: t * scale, lambda t: t + shift, lambda t: t @ turn):
        assert figures_of(change(x), change(reconstruction))["fvu"] == pytest.approx(wanted, rel=1e-8)


def by_loops(dictionary: Dictionary, x: Tensor) -> dict[str, float]:
    """Every figure by its definition, row after row."""
    rows, guesses = x.double().tolist(), dictionary.reconstruct(x).double().tolist()  # type: ignore[union-attr]
    latents = dictionary.encode(x).tolist()
    n, mean = len(rows), [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    dot = lambda a, b: sum(p * q for p, q in zip(a, b, strict=True))  # noqa: E731
    away = lambda a, b: sum((p - q) ** 2 for p, q in zip(a, b, strict=True))  # noqa: E731
    norm = lambda a: math.sqrt(dot(a, a))  # noqa: E731
    pairs = list(zip(rows, guesses, strict=True))
    density = [sum(row[latent] > 0 for row in latents) / n for latent in range(dictionary.n_latents)]
    return {
        "fvu": sum(away(y, g) for y, g in pairs) / sum(away(y, mean) for y in rows),
        "l0": sum(value > 0 for row in latents for value in row) / n,
        "cosine": sum(dot(y, g) / norm(y) / norm(g) for y, g in pairs) / n,
        "l2_ratio": sum(norm(g) / norm(y) for y, g in pairs) / n,
        "reconstruction_bias": sum(dot(g, g) for _, g in pairs) / sum(dot(y, g) for y, g in pairs),
        "dead": sum(share == 0 for share in density) / len(density),
        "dense_1pct": sum(share > 0.01 for share in density) / len(density),
        "dense_10pct": sum(share > 0.1 for share in density) / len(density),
    }


def test_every_figure_of_rows_is_what_its_definition_gives_row_by_row() -> None:
    dictionary = made(b_enc=torch.linspace(-4.5, 0.5, 20))
    x = torch.randn(1500, 6, generator=draw(3))
    wanted = by_loops(dictionary, x)
    assert 0 < wanted["dead"] < 0.5
    assert 0 < wanted["dense_10pct"] < wanted["dense_1pct"] < 1
    found = row_figures(totals_of(CoderReconstructor(dictionary), sample_of(x)))
    assert set(found) == set(wanted)
    assert {name: figure.value for name, figure in found.items()} == pytest.approx(wanted, rel=1e-5)


def test_intervals_hold_what_they_are_of_and_narrow_with_more_groups() -> None:
    dictionary = made()
    few, many = (
        row_figures(
            totals_of(CoderReconstructor(dictionary), sample_of(torch.randn(n, 6, generator=draw(5)), groups=g))
        )
        for n, g in ((400, 20), (6400, 320))
    )
    for name in ("fvu", "l0", "cosine", "dense_10pct"):
        for found in (few[name], many[name]):
            assert found.low is not None and found.high is not None
            assert found.low <= found.value <= found.high
    width = lambda figure: figure.high - figure.low  # noqa: E731
    assert width(many["fvu"]) < 0.5 * width(few["fvu"])
    assert few["dead"].low is None


def test_a_figure_is_a_measurement_with_one_value_per_group() -> None:
    dictionary, x = made(), torch.randn(400, 6, generator=draw(5))
    found = row_figures(totals_of(CoderReconstructor(dictionary), sample_of(x, groups=20)))
    active = (dictionary.encode(x) > 0).sum(1).double().view(20, 20).mean(1)
    assert found["l0"].measurement.values == pytest.approx(tuple(active.tolist()))
    assert (found["l0"].measurement.unit, found["l0"].measurement.cost) == ("latents", {"rows": 400})
    for figure in found.values():
        measured = figure.measurement
        assert (figure.value, figure.low, figure.high) == (measured.estimate, measured.low, measured.high)
        assert measured.n == measured.n_groups == 20
    assert repr(found["dead"]) == f"Figure({found['dead'].value:.4g})"
    assert str(found["l0"]).endswith("]")


def test_rows_that_do_not_vary_are_refused() -> None:
    with pytest.raises(InputError, match="all rows are equal"):
        figures_of(torch.ones(10, 3), torch.ones(10, 3))


def test_of_several_sites_each_counts_the_same_however_large_it_is() -> None:
    x = torch.randn(50, 8, generator=draw(0))
    parts = (x[:, :4], 1000 * x[:, 4:])
    first = totals_of(Fixed(parts[0] * 0.5), Sample(parts[:1], parts[:1], np.zeros(50, dtype=int), ""))
    other = totals_of(Fixed(parts[1] * 0.9), Sample(parts[1:], parts[1:], np.zeros(50, dtype=int), ""))
    both = Totals(np.concatenate([first.sites, other.sites]), first.rows, first.active, None)
    each = [row_figures(one)["fvu"].value for one in (first, other)]
    assert row_figures(both)["fvu"].value == pytest.approx(sum(each) / 2)


# Planted features


FEATURES = unit(128, 64)
RATE = 3 / 128
CONFIG = {"n_latents": 128, "batch_size": 256, "steps": 900, "lr": 4e-3}


@pytest.fixture(scope="module")
def trained() -> dict[str, Dictionary]:
    x = sparse_sums(FEATURES, 20_000, RATE, seed=1)
    configs = {
        "topk": TrainConfig(kind="topk", k=5, **CONFIG),  # type: ignore[arg-type]
        "again": TrainConfig(kind="topk", k=5, seed=1, **CONFIG),  # type: ignore[arg-type]
        "relu": TrainConfig(kind="relu", sparsity=2.0, **CONFIG),  # type: ignore[arg-type]
    }
    found = {name: train(x, config) for name, config in configs.items()}
    assert all(isinstance(dictionary, Dictionary) for dictionary in found.values())
    return found  # type: ignore[return-value]


FRESH = sparse_sums(FEATURES, 8000, RATE, seed=2)


@pytest.mark.slow
def test_planted_features_are_recovered_and_random_directions_are_not_mistaken_for_that(
    trained: dict[str, Dictionary],
) -> None:
    learned = torch.nn.functional.normalize(trained["topk"].W_dec, dim=1)
    best = lambda rows: float((FEATURES @ rows.T).amax(1).mean())  # noqa: E731
    assert best(learned) >= 0.95
    assert best(random_unit(128, 64, 0)) == pytest.approx(0.317, abs=0.02)
    assert matching(FEATURES, learned)[0].mean() > 0.9
    assert matching(FEATURES, random_unit(128, 64, 0))[0].mean() < 0.35


@pytest.mark.slow
def test_the_shrinkage_of_an_l1_penalty_is_seen_and_topk_has_none(trained: dict[str, Dictionary]) -> None:
    bias = {name: quality(trained[name], FRESH, n=4000).figures["reconstruction_bias"] for name in ("topk", "relu")}
    assert bias["relu"].high is not None and bias["relu"].high < 0.9
    assert bias["topk"].value == pytest.approx(1.0, abs=0.02)


@pytest.mark.slow
def test_a_trained_dictionary_beats_every_baseline_on_features_that_are_there(trained: dict[str, Dictionary]) -> None:
    found = quality(trained["topk"], FRESH, n=4000)
    assert [one.name for one in found.baselines] == ["pca", "random", "untrained", "neurons"]
    assert all(one.figures["fvu"].value > 3 * found.fvu for one in found.baselines)
    assert all(one.figures["l0"].value == pytest.approx(found.l0, abs=0.6) for one in found.baselines)


@pytest.mark.slow
def test_two_seeds_share_planted_features_and_not_random_directions(trained: dict[str, Dictionary]) -> None:
    found = quality(trained["topk"], FRESH, n=4000, others=[trained["again"]])
    (seed,) = found.seeds
    assert seed.compared.figures["fvu"].value == pytest.approx(found.fvu, abs=0.05)
    assert seed.shared.share > 0.8
    assert seed.shared.null_share == 0
    assert seed.shared.null.mean() < 0.35


# Baselines


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_linear_baseline_is_pca_and_no_projection_of_its_rank_does_better(rank: int) -> None:
    x = torch.randn(300, 6, generator=draw(0)) * torch.linspace(0.2, 3.0, 6) + 2
    found = reduced_rank(x.double(), x.double(), rank).reconstruct([x]).outputs[0]
    centred = x - x.mean(0)
    left, sizes, right = torch.linalg.svd(centred, full_matrices=False)
    assert torch.allclose(found, left[:, :rank] * sizes[:rank] @ right[:rank] + x.mean(0), atol=1e-4)
    error = (found - x).square().sum()
    for seed in range(20):
        basis = torch.linalg.qr(torch.randn(6, rank, generator=draw(seed))).Q
        assert (centred - centred @ basis @ basis.T).square().sum() >= error - 1e-3


def test_between_two_sites_the_linear_baseline_is_the_best_map_of_its_rank() -> None:
    x = torch.randn(400, 5, generator=draw(0))
    y = x @ torch.randn(5, 4, generator=draw(1)) + 0.1 * torch.randn(400, 4, generator=draw(2)) + 1
    full = reduced_rank(x.double(), y.double(), 4).reconstruct([x]).outputs[0]
    design = torch.cat([x, torch.ones(400, 1)], 1)
    assert torch.allclose(full, design @ torch.linalg.lstsq(design, y).solution, atol=1e-3)
    errors = [
        (reduced_rank(x.double(), y.double(), k).reconstruct([x]).outputs[0] - y).square().sum() for k in (1, 2, 3, 4)
    ]
    assert errors == sorted(errors, reverse=True)


def test_the_untrained_baseline_is_what_training_begins_with() -> None:
    x = torch.randn(500, 8, generator=draw(0)) + 1
    config = TrainConfig(n_latents=16, k=3, batch_size=64, steps=4, seed=7)
    dictionary = train(x, config)
    assert isinstance(dictionary, Dictionary)
    start = untrained(dictionary, config, ((x,), (x,)))
    barely = train(x, replace(config, steps=1, lr=1e-9))
    assert isinstance(start, Dictionary) and isinstance(barely, Dictionary)
    assert torch.allclose(start.W_dec, barely.W_dec, atol=1e-6)
    assert torch.allclose(start.reconstruct(x), barely.reconstruct(x), atol=1e-4)  # type: ignore[arg-type]


def test_a_transcoder_has_the_baselines_that_apply() -> None:
    x = torch.randn(600, 6, generator=draw(0))
    dictionary = train((x, x @ torch.randn(6, 4, generator=draw(1))), TrainConfig(n_latents=12, k=3, steps=5))
    found = quality(dictionary, (x, x @ torch.randn(6, 4, generator=draw(1))), n=200)
    assert [one.name for one in found.baselines] == ["linear", "untrained"]


# Geometry, and what two dictionaries share


def test_nearest_cosines_are_those_of_a_loop() -> None:
    rows = unit(9, 4)
    wanted = [max(float(a @ b) for j, b in enumerate(rows) if j != i) for i, a in enumerate(rows)]
    assert nearest_cosines(rows) == pytest.approx(wanted, abs=1e-6)


def test_the_null_of_the_geometry_is_that_of_random_directions() -> None:
    random = made(64, 128, decoders=(3 * unit(128, 64, seed=5),))
    found = geometry(random)
    assert found.null.mean() == pytest.approx(found.nearest.mean(), abs=0.02)
    doubled = made(64, 128, decoders=(unit(64, 64, seed=5).repeat(2, 1),))
    assert geometry(doubled).nearest.min() == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(InputError, match="so none has a neighbour"):
        geometry(random, [True] + [False] * 127)


@SETTINGS
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(0, 2))
def test_the_matching_is_the_best_of_all_one_to_one_ones(seed: int, n: int, more: int) -> None:
    rows, others = unit(n, 3, seed), unit(n + more, 3, seed + 1)
    best = max(
        sum(float(rows[i] @ others[j]) for i, j in enumerate(mates))
        for mates in itertools.permutations(range(n + more), n)
    )
    cosines, mates = matching(rows, others)
    assert cosines.sum() == pytest.approx(best, abs=1e-5)
    assert len(set(mates.tolist())) == n


def test_a_dictionary_shares_everything_with_itself_in_another_order_and_scale() -> None:
    one = made(16, 24)
    order = torch.randperm(24, generator=draw(1))
    other = replace(one, encoders=(2 * one.W_enc[:, order],), decoders=(3 * one.W_dec[order],), b_enc=one.b_enc[order])
    found = shared(one, other)
    assert (found.share, found.null_share) == (1.0, 0.0)
    assert found.latents[:, 1].tolist() == torch.argsort(order).tolist()
    turned = replace(other, encoders=(-other.W_enc,))
    assert shared(one, turned).share == 0.0  # decoders alone are not enough


def test_many_latents_near_one_of_the_other_count_once() -> None:
    """The nearest neighbour would call all three shared."""
    three = torch.nn.functional.normalize(torch.tensor([[1.0, 0.05, 0], [1.0, -0.05, 0], [1.0, 0, 0.05]]), dim=1)
    one = made(3, 3, encoders=(three.T.contiguous(),), decoders=(three,), b_enc=torch.zeros(3))
    axes = torch.eye(3)
    other = made(3, 3, encoders=(axes,), decoders=(axes,), b_enc=torch.zeros(3))
    assert shared(one, other).share == pytest.approx(1 / 3)


def test_dictionaries_that_cannot_be_matched_are_refused() -> None:
    with pytest.raises(InputError, match="differ in width"):
        shared(made(6), made(5))
    with pytest.raises(InputError, match="20 latents cannot be matched one to one to 10; exchange the two"):
        shared(made(6, 20), made(6, 10))
    with pytest.raises(InputError, match="of other sites"):
        quality(made(6), FRESH[:100, :6], others=[made(6, in_sites=(Site("embed"),), out_sites=(Site("embed"),))])


# The result


def test_quality_prints_shows_and_writes_itself() -> None:
    found = quality(made(6), torch.randn(300, 6, generator=draw(0)), others=[made(6, seed=9)])
    stored = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert stored["figures"]["fvu"]["value"] == found.fvu
    assert sum(stored["density"]["counts"]) + stored["density"]["silent"] == 20
    assert set(found.figures) <= set(WORDS)
    assert "fvu" in repr(found)
    page = found._repr_html_()
    assert "<table>" in page and "pca" in page
    assert found.loss_recovered is None


def test_an_identity_has_no_error_and_a_zero_dictionary_has_all() -> None:
    x = torch.randn(300, 6, generator=draw(0))
    assert quality(identity(6), x).fvu == 0
    nothing = replace(identity(6), decoders=(torch.zeros(12, 6),), b_dec=(torch.zeros(6),))
    found = quality(nothing, x)
    assert found.fvu >= 1
    assert "reconstruction_bias" not in found.figures  # 0 / 0
    assert found.figures["cosine"].value == found.figures["l2_ratio"].value == 0


def test_the_same_seed_gives_the_same_figures() -> None:
    x = torch.randn(300, 6, generator=draw(0))
    one, other, third = (quality(made(6), x, n=50, seed=seed).to_json() for seed in (3, 3, 4))
    assert one == other
    assert one["figures"] != third["figures"]


def test_what_cannot_be_measured_is_refused() -> None:
    x = torch.randn(300, 6, generator=draw(0))
    with pytest.raises(InputError, match="must be positive; got 0, 32 and 1024"):
        quality(made(6), x, n=0)
    with pytest.raises(InputError, match="too few to measure"):
        quality(made(6), x[:3])
    site = Site("embed")
    with pytest.raises(InputError, match="the activations have no embed, which the dictionary reads or reconstructs"):
        quality(made(6, in_sites=(site,), out_sites=(site,)), TensorSource(x, sites=["layers.0.mlp_out"]))
    with pytest.raises(InputError, match="on contexts of a store"):
        quality(made(6), x, model=vs.Model(torch.nn.Linear(2, 2), adapter=None))
