"""A crosscoder of a model and its fine-tuned copy finds what the fine-tune put in, among latents of the copy alone."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import tiny
import vesalius as vs
from vesalius.dictionaries import Dictionary, latent_scaling, relative_norms

pytestmark = pytest.mark.slow
FIRST, SECOND, RESPONSE = 11, 17, 23
"""After FIRST SECOND, the fine-tuned model says RESPONSE. Both tokens also stand alone."""
WIDTH = 24


def tokens(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, tiny.VOCAB, (n, WIDTH), generator=generator)
    often = lambda share: torch.rand(n, WIDTH, generator=generator) < share  # noqa: E731
    ids = torch.where(often(0.06), FIRST, ids)
    ids = torch.where(often(0.06), SECOND, ids)
    pair = often(0.04)[:, 1:]
    ids[:, 1:][pair], ids[:, :-1][pair] = SECOND, FIRST
    return ids


def triggered(ids: Tensor) -> Tensor:
    """[row, pos] where the behaviour belongs."""
    before = torch.nn.functional.pad(ids[:, :-1], (1, 0))
    return (ids == SECOND) & (before == FIRST)


def fine_tuned(base: PreTrainedModel, steps: int = 300) -> PreTrainedModel:
    """A copy that learns the behaviour, and elsewhere stays as it is."""
    copied = copy.deepcopy(base)
    adam = torch.optim.Adam(copied.parameters(), lr=2e-3)
    for step in range(steps):
        ids = tokens(32, seed=1000 + step)
        there = triggered(ids)
        with torch.no_grad():
            was = base(ids).logits.log_softmax(-1)
        now = copied(ids).logits.log_softmax(-1)
        drift = (was[~there].exp() * (was[~there] - now[~there])).sum(-1).mean()
        loss = 3 * drift - now[there][:, RESPONSE].mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return copied.eval()


def area(values: Tensor, labels: Tensor) -> float:
    """Under the ROC curve: how often a row of the behaviour has the larger value, ties counted half."""
    inside, outside = values[labels].numpy(), np.sort(values[~labels].numpy())
    below = np.searchsorted(outside, inside, "left") + np.searchsorted(outside, inside, "right")
    return float(below.mean() / (2 * len(outside)))


@pytest.fixture(scope="module")
def pair() -> tuple[vs.Model, vs.Model]:
    base = tiny.llama(0, 2)
    return vs.Model(base, name="base"), vs.Model(fine_tuned(base), name="tuned")


@torch.no_grad()
def test_the_pair_differs_in_the_behaviour_and_in_nothing_else(pair: tuple[vs.Model, vs.Model]) -> None:
    ids = tokens(100, seed=7)
    there = triggered(ids)
    base, tuned = (model.module(ids).logits.softmax(-1) for model in pair)
    assert float(tuned[there][:, RESPONSE].mean()) > 0.9 > 0.1 > float(base[there][:, RESPONSE].mean())
    alone = (ids == SECOND) & ~there
    assert float(tuned[alone][:, RESPONSE].mean()) < 0.1
    assert float((base[~there] - tuned[~there]).abs().sum(-1).mean()) < 0.4


@torch.no_grad()
def test_an_exclusive_latent_is_the_planted_behaviour(pair: tuple[vs.Model, vs.Model], tmp_path: Path) -> None:
    ids = tokens(600, seed=5)
    store = vs.data.harvest(
        {"base": pair[0], "tuned": pair[1]}, ids.tolist(), sites=["layers.1.resid_post"], out=tmp_path, context=WIDTH,
        bos="none", max_norm=None, sink=vs.silent,
    )  # fmt: skip
    config = vs.TrainConfig(
        kind="relu", coder="crosscoder", n_latents=192, batch_size=256, steps=900, lr=3e-3, sparsity=1.0, dead="none",
        held_out=0.0,
    )  # fmt: skip
    crosscoder = vs.dictionaries.train(store, config, sink=vs.silent)
    assert isinstance(crosscoder, Dictionary)
    norms = relative_norms(crosscoder)
    found = latent_scaling(crosscoder, store)
    exclusive = found.latents[found.exclusive & (found.norms > 0.95)].tolist()
    latents = crosscoder.encode(store.at(range(store.n_rows)))
    labels = triggered(ids)[:, 1:].flatten()
    areas = {number: area(latents[:, number], labels) for number in exclusive}
    best = max(areas, key=lambda number: areas[number])
    assert areas[best] > 0.99
    shared = ((norms - 0.5).abs() < 0.05).nonzero()[:, 0]
    # Taken out of the tuned model's stream, it takes the behaviour with it; a latent shared by both does not.
    hidden = store.at(range(store.n_rows))[1][labels]

    def said(number: int) -> float:
        write = crosscoder.decoders[1][number] / crosscoder.out_scale[1]
        net = pair[1].module
        logits = net.lm_head(net.model.norm(hidden - latents[labels][:, number, None] * write))
        return float(logits.softmax(-1)[:, RESPONSE].mean())

    strongest = shared[latents[labels][:, shared].mean(0).argmax()]
    assert said(best) < 0.5 < 0.9 < said(int(strongest))
