"""An example's numbers are its own: padding, batch order and batch size change nothing, in any family, with edits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import families
import tiny
import vesalius as vs
from families import FAMILIES

CLOSE = 1e-5
NAMES = ["layers.0.z", "layers.1.resid_post", "layers.1.q"]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest) -> vs.Model:
    return families.model(request.param)


@pytest.fixture(scope="module")
def tokens() -> vs.Tokens:
    """Prompts of 6 to 9 tokens, with a place that has a name."""
    prompts = tiny.pairs().tokens("clean")
    return vs.Tokens(prompts.ids, prompts.mask, named_positions={"here": torch.tensor([1, 4, 0, -1, 2, 5])})


def edits(model: vs.Model, rows: Tensor, source: vs.Activations, size: int) -> list[Any]:
    """One of each kind of value: of another run, of the run itself, random, by name and by number."""
    width = model.architecture[1].d_model
    given = {site: source[site][rows, :size] for site in source}
    return [
        vs.Noise("embed", scale=0.3, seed=1, examples=rows),
        vs.Interchange("layers.0.z[1]", source=vs.Activations(given), positions=[0, 3]),
        vs.Steer("layers.0.resid_post", scale=1.0, vector=torch.ones(width) / 8, positions="here"),
        vs.Replace(["layers.0.mlp_out", "layers.0.attn_out"], "layers.1.attn_out", lambda a, b: a + b, "sum",
                   positions=["last"]),
        vs.Ablate("layers.1.pattern[2]", positions=[4]),
    ]  # fmt: skip


def run(model: vs.Model, tokens: vs.Tokens, rows: Tensor, source: vs.Activations) -> dict[str, Tensor]:
    done = model.run(tokens, capture=NAMES, interventions=edits(model, rows, source, tokens.ids.shape[1]))
    return {"logits": done.logits, **{name: done[name] for name in NAMES}}


@pytest.fixture(scope="module")
def source(model: vs.Model) -> vs.Activations:
    return model.run(tiny.pairs(seed=7, width=12).corrupted, capture=["layers.0.z"]).activations


@pytest.fixture(scope="module")
def together(model: vs.Model, tokens: vs.Tokens, source: vs.Activations) -> dict[str, Tensor]:
    return run(model, tokens, torch.arange(6), source)


def agree(found: Tensor, expected: Tensor, whole: Tensor) -> bool:
    return float((found - expected).abs().max()) <= CLOSE * float(whole.max() - whole.min())


def test_order_and_size_of_the_batch(
    model: vs.Model, tokens: vs.Tokens, source: vs.Activations, together: dict[str, Tensor]
) -> None:
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    for rows in (order, order[:2], order[4:]):
        some = run(model, tokens.take(rows), rows, source)
        for new, old in enumerate(rows.tolist()):
            size = int(tokens.lengths[old])
            for name, whole in together.items():
                assert agree(some[name][new, :size], whole[old, :size], whole), (name, old)


def test_alone_and_without_padding(
    model: vs.Model, tokens: vs.Tokens, source: vs.Activations, together: dict[str, Tensor]
) -> None:
    for row in range(6):
        size = int(tokens.lengths[row])
        one = vs.Tokens(
            tokens.ids[row : row + 1, :size], named_positions={"here": tokens.named_positions["here"][row : row + 1]}
        )
        alone = run(model, one, torch.tensor([row]), source)
        for name, whole in together.items():
            assert agree(alone[name][0], whole[row, :size], whole), (name, row)


def test_padding_of_any_token_and_any_width(
    model: vs.Model, tokens: vs.Tokens, source: vs.Activations, together: dict[str, Tensor]
) -> None:
    wider = torch.cat([torch.where(tokens.real, tokens.ids, 17), torch.full((6, 3), 23)], 1)
    mask = torch.cat([tokens.real, torch.zeros(6, 3, dtype=torch.bool)], 1)
    padded = run(model, vs.Tokens(wider, mask, named_positions=tokens.named_positions), torch.arange(6), source)
    for row, size in enumerate(tokens.lengths.tolist()):
        for name, whole in together.items():
            assert agree(padded[name][row, :size], whole[row, :size], whole), (name, row)


def test_padding_on_the_left(model: vs.Model, tokens: vs.Tokens) -> None:
    """Edits by number count columns there, so this is without them."""
    ids, mask = torch.zeros_like(tokens.ids), torch.zeros_like(tokens.real)
    for row, size in enumerate(tokens.lengths.tolist()):
        ids[row, 9 - size :], mask[row, 9 - size :] = tokens.ids[row, :size], True
    right, left = model.run(tokens, capture=NAMES), model.run(vs.Tokens(ids, mask), capture=NAMES)
    for row, size in enumerate(tokens.lengths.tolist()):
        assert agree(left.logits[row, 9 - size :], right.logits[row, :size], right.logits)
        for name in NAMES:
            assert agree(left[name][row, 9 - size :], right[name][row, :size], right[name]), (name, row)
