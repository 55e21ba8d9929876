"""Training: by hand and sparse, it takes the same steps as autograd on the dense losses; and it resumes bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from plain_training import PlainTraining
from vesalius.data import TensorSource
from vesalius.dictionaries import TrainConfig
from vesalius.dictionaries.training import encode
from vesalius.dictionaries.training.fitter import Fitter, make_fitter
from vesalius.dictionaries.training.layout import layout_of
from vesalius.dictionaries.training.run import Processes
from vesalius.jobs.workers import Workers

D, N = 12, 1500
KINDS = ["relu", "gated", "jumprelu", "topk", "batchtopk", "matryoshka"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def skewed(width: int, seed: int, n: int = N) -> Tensor:
    """Rows with a mean and directions of different strength."""
    return normal(n, width, seed=seed) * torch.linspace(0.3, 2.0, width) @ normal(width, width, seed=seed + 1) + 0.5


SOURCES = {
    "sae": TensorSource(skewed(D, 1)),
    "transcoder": TensorSource(skewed(D, 1), skewed(7, 3)),
    "crosscoder": TensorSource(skewed(D, 1), skewed(7, 3)),
    "cross_layer": TensorSource(*(skewed(width, seed) for seed, width in enumerate([8, 6, 5, 7, 9, 4]))),
}


def config_of(kind: str, coder: str = "sae", **changes: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "kind": kind, "coder": coder, "n_latents": 40, "k": 4, "batch_size": 600, "steps": 10, "lr": 1e-2, "warmup": 2,
        "sparsity": 0.05, "sparsity_warmup": 3, "bandwidth": 0.5,
    }  # fmt: skip
    return TrainConfig(**{**base, **changes})


def fitter_of(source: TensorSource, config: TrainConfig, workers: Workers) -> Fitter:
    return make_fitter(source, config, layout_of(source, config), workers, Processes(), torch.device("cpu"))


def far_apart(fitter: Fitter, plain: PlainTraining) -> dict[str, float]:
    return {
        name: float((value - plain.values[name].detach()).abs().max())
        for name, value in fitter.parameters.values.items()
    }


def trained_both_ways(
    source: TensorSource, config: TrainConfig, steps: int = 6, prepare: Callable[[Fitter], None] = lambda fitter: None
) -> tuple[Fitter, PlainTraining]:
    with Workers(1) as workers:
        fitter = fitter_of(source, config, workers)
        prepare(fitter)
        plain = PlainTraining(fitter)
        for batch in islice(source.batches(config.batch_size, seed=0), steps):
            fitter.step(batch)
            loss = plain.step(batch)
            assert fitter.history[-1][0] == pytest.approx(loss, rel=1e-4)
    return fitter, plain


@pytest.mark.parametrize("coder", list(SOURCES))
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_autograd_on_the_dense_loss(kind: str, coder: str) -> None:
    fitter, plain = trained_both_ways(SOURCES[coder], config_of(kind, coder))
    assert max(far_apart(fitter, plain).values()) < 1e-5
    first = fitter_of(SOURCES[coder], fitter.run.config, Workers(1)).parameters.values
    moved = [float((value - first[name]).abs().max()) for name, value in fitter.parameters.values.items()]
    assert min(moved) > 1e-3


@pytest.mark.parametrize(
    ("kind", "coder", "changes"),
    [
        ("jumprelu", "sae", {"penalty": "tanh"}),
        ("jumprelu", "crosscoder", {"penalty": "tanh", "decoder_norm": "free"}),
        ("relu", "crosscoder", {"decoder_norm": "unit"}),
        ("gated", "crosscoder", {"decoder_norm": "free"}),
        ("topk", "sae", {"decoder_norm": "free", "clip_norm": None, "normalise": False, "lr": 1e-3}),
        ("topk", "transcoder", {"skip": True}),
        ("topk", "sae", {"apply_b_dec_to_input": False}),
        ("topk", "sae", {"accumulate": 4}),
        ("relu", "sae", {"accumulate": 3}),
        ("matryoshka", "sae", {"groups": (3, 20, 40)}),
        ("batchtopk", "sae", {"k": 40}),
        ("topk", "sae", {"k": 40}),
    ],
)
def test_so_they_are_with_other_choices(kind: str, coder: str, changes: dict[str, Any]) -> None:
    fitter, plain = trained_both_ways(SOURCES[coder], config_of(kind, coder, **changes))
    assert max(far_apart(fitter, plain).values()) < 1e-5


def put_to_sleep(fitter: Fitter) -> None:
    """Half the latents of each block hardly ever get active."""
    for number in range(len(fitter.run.layout.blocks)):
        block = fitter.parameters.block(number)
        block["b_enc"][:20] = -2.0
        if "log_threshold" in block:
            block["log_threshold"][:20] = 3.0


@pytest.mark.parametrize("coder", ["sae", "cross_layer"])
@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka", "jumprelu"])
def test_dead_latents_learn_the_error(kind: str, coder: str) -> None:
    fields: dict[str, Any] = {"k": 3, "dead_after": 600, "aux_k": 5, "lr": 3e-3}
    config = config_of(kind, coder, dead="auxk", **fields)
    fitter, plain = trained_both_ways(SOURCES[coder], config, prepare=put_to_sleep)
    assert int((fitter.rows_since_fired >= 600).sum()) > 5
    assert max(far_apart(fitter, plain).values()) < 1e-5
    config = config_of(kind, coder, dead="none", **fields)
    without, _ = trained_both_ways(SOURCES[coder], config, prepare=put_to_sleep)
    assert max(far_apart(without, plain).values()) > 1e-3


@pytest.mark.parametrize("kind", ["relu", "gated", "jumprelu"])
def test_sparse_and_dense_products_take_the_same_steps(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {}
    for share in (0.0, 1.0):
        monkeypatch.setattr(encode, "DENSE_SHARE", share)
        fitter, plain = trained_both_ways(SOURCES["sae"], config_of(kind, bandwidth=0.15))
        assert max(far_apart(fitter, plain).values()) < 1e-5
        values[share] = fitter.parameters.values
    assert all(torch.allclose(values[0.0][name], values[1.0][name], atol=1e-5) for name in values[0.0])


@pytest.mark.parametrize("coder", ["sae", "cross_layer"])
@pytest.mark.parametrize("kind", ["relu", "gated"])
def test_dense_codes_are_made_for_some_rows_at_a_time(kind: str, coder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vesalius.dictionaries.training.fitter.DENSE_ROWS", 150)
    with Workers(1) as workers:
        fitter = fitter_of(SOURCES[coder], config_of(kind, coder), workers)
        assert fitter._micro_batches(600) == 4
    fitter, plain = trained_both_ways(SOURCES[coder], config_of(kind, coder))
    assert max(far_apart(fitter, plain).values()) < 1e-5


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_the_screened_run_is_the_run_in_float32(kind: str) -> None:
    fields: dict[str, Any] = {"n_latents": 1100, "k": 8, "lr": 3e-3}
    plain = trained_both_ways(SOURCES["sae"], config_of(kind, **fields), steps=4)[0].parameters.values
    screened, oracle = trained_both_ways(SOURCES["sae"], config_of(kind, precision="bf16-screen", **fields), steps=4)
    assert max(far_apart(screened, oracle).values()) < 1e-5
    assert all(torch.allclose(plain[name], value, atol=1e-5) for name, value in screened.parameters.values.items())


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision_ends_near_float32(kind: str) -> None:
    source, ends = SOURCES["sae"], []
    for precision in ("fp32", "bf16"):
        config = config_of(kind, precision=precision, steps=60, batch_size=300, lr=3e-3)
        with Workers(1) as workers:
            fitter = fitter_of(source, config, workers)
            for batch in islice(source.batches(300, seed=0), 60):
                fitter.step(batch)
        ends.append(fitter.history[-1][1])
    assert ends[0] < 0.5 * fitter.history[0][1]
    assert ends[1] == pytest.approx(ends[0], rel=0.05)
