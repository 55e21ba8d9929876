"""Descriptions, studies, harvests, dictionaries and their evaluation on a device that is not the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pretend_device
import solvable
import tiny
import vesalius as vs
from planted_features import draw
from pretend_device import onto
from vesalius.data import TensorSource
from vesalius.dictionaries import Dictionary, TrainConfig, quality, train
from vesalius.dictionaries.evaluation.superposition import superposition
from vesalius.errors import InputError, PairsError
from vesalius.quantities import QUANTITIES, Runs
from vesalius.site import Site

SITE = "layers.1.resid_post"


@pytest.fixture(scope="module", autouse=True)
def a_second_device() -> Iterator[None]:
    pretend_device.device()
    yield


def quiet(_event: Any) -> None:
    """Nobody listens."""


def models(family: str = "llama") -> list[vs.Model]:
    """The same model on the CPU and on the pretend device."""
    return [tiny.model(family), vs.Model(onto(tiny.FAMILIES[family]()))]


def same(found: Any, expected: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=1e-3, atol=atol)


def documents() -> list[list[int]]:
    return [torch.randint(2, tiny.VOCAB, (size,), generator=draw(size)).tolist() for size in range(12, 42)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_quantities_circuits_and_descriptions(family: str) -> None:
    found = []
    for model in models(family):
        runs = Runs(model, solvable.random_pairs(), sink=quiet)
        parts = runs.components[:6]
        values = {way: runs.effects(parts, "corrupted", way) for way in ("noising", "denoising")}
        values["shuffled"] = runs.shuffled_effects(parts, "corrupted", "noising")
        values["total"] = runs.total("corrupted")
        values["pattern"] = runs.pattern(vs.head(1, 2))
        for name, quantity in QUANTITIES.items():
            part = vs.head(1, 2)
            for parameters in ({}, {"query": "end", "key": "first"}, {"key": "answer"}, {"movers": ["layers.2.z[1]"]}):
                try:
                    values[f"{name} {sorted(parameters)}"] = quantity.measure(runs, part, parameters)
                except (KeyError, InputError, PairsError):
                    continue
        found.append(values)
    on_cpu, moved = found
    assert on_cpu.keys() == moved.keys()
    assert len(on_cpu) > 9
    for name, value in moved.items():
        assert value.device.type == "cpu", name
        same(value, on_cpu[name])


@pytest.mark.slow
def test_a_study_says_the_same(tmp_path: Path) -> None:
    question, model = solvable.planted()
    summaries = []
    for name, one in (("cpu", model), ("moved", vs.Model(onto(solvable.planted()[1].module)))):
        study = solvable.run_study(question, one, out=tmp_path / name, options=solvable.OPTIONS, sink=quiet)
        summaries.append(solvable.timeless(solvable.summary_of(study)))
    assert summaries[0]["claims"][0].keys() == summaries[1]["claims"][0].keys()


def test_harvest_train_and_quality(tmp_path: Path) -> None:
    stores = [
        vs.data.harvest(model, documents(), sites=[SITE, "layers.1.mlp_in", "layers.1.mlp_out"], out=tmp_path / str(n),
                        context=30, sink=quiet)
        for n, model in enumerate(models())
    ]  # fmt: skip
    config = TrainConfig(kind="topk", n_latents=64, k=4, steps=12, batch_size=64, in_sites=(SITE,), out_sites=(SITE,))
    trained = [
        train(stores[0], config, sink=quiet),
        train(stores[1], config, device=pretend_device.device(), sink=quiet),
    ]
    same(trained[1].decoders[0], trained[0].decoders[0], atol=1e-3)
    for model, store, coder in zip(models(), stores, trained, strict=True):
        where = model.device
        found = quality(coder.to(where), store, model=model, n=200, others=[coder], sink=quiet)
        assert found.figures["fvu"].value > 0
        superposition(coder.to(where), store, n=200)


@pytest.mark.parametrize("kind", ["relu", "gated", "jumprelu", "topk", "batchtopk", "matryoshka"])
def test_every_kind_of_dictionary_trains_to_the_cpus_weights(kind: str) -> None:
    rows = torch.randn(512, 16, generator=draw(3))
    config = TrainConfig(kind=kind, n_latents=32, k=4, steps=20, batch_size=64, dead_after=64)
    on_cpu = train(rows, config, sink=quiet)
    moved = train(rows, config, device=pretend_device.device(), sink=quiet)
    same(moved.decoders[0], on_cpu.decoders[0], atol=2e-3)
    there = moved.to(pretend_device.device())
    same(there.encode(rows[:8].to(pretend_device.device())), on_cpu.encode(rows[:8]), atol=2e-2)
    assert isinstance(there, Dictionary)


def test_latents_are_parts_wherever_the_dictionary_is() -> None:
    rows = torch.randn(256, 48, generator=draw(5))
    source = TensorSource(rows, sites=[Site.parse(SITE)])
    sae = train(source, TrainConfig(kind="topk", n_latents=64, k=4, steps=5, batch_size=64), sink=quiet)
    cpu, moved = models()
    expected = vs.sweep(cpu, tiny.pairs(), sites=sae, each="latent", group=16, sink=quiet).values
    for where in (torch.device("cpu"), moved.device):
        found = vs.sweep(moved, tiny.pairs(), sites=sae.to(where), each="latent", group=16, sink=quiet).values
        same(found, expected)


def test_a_stream_of_activations_trains(tmp_path: Path) -> None:
    for model in models():
        source = vs.data.stream(model, documents(), sites=[SITE], context=30)
        train(
            source, TrainConfig(kind="topk", n_latents=32, k=4, steps=4, batch_size=32), device=model.device, sink=quiet
        )
