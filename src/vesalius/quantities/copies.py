"""Copies: what a head would write onto a token if it attended to that token alone."""

from __future__ import annotations

from types import MappingProxyType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vesalius.errors import PairsError
from vesalius.model.direct import frozen_norm
from vesalius.parts import Part
from vesalius.quantities.base import Parameters, PerExample, Quantity, head, not_a_head
from vesalius.quantities.places import in_words, positions
from vesalius.quantities.runs import Runs


class Copies(Quantity):
    """Logits that a head adds to the token at place `key` if it attends to that place alone, minus what it adds, on
    average, to the answers and distractors of the other prompts. The final norm is frozen at the clean run.

    `key` is "answer" or a place of the distractor (Wang et al. 2022, section 3.1, "copy score", as a difference of
    logits). Raises PairsError when other prompts have no other tokens.
    """

    name = "copies"
    kind = "predictive"
    condition = MappingProxyType({"prompts": "clean"})

    def unit(self, runs: Runs) -> str:
        return "logits"

    def phrase(self, parameters: Parameters) -> str:
        return f"copies the token at {in_words(str(parameters['key']))}"

    def refuses(self, runs: Runs, part: Part) -> str:
        if runs.pairs.several:
            return "answers of several tokens are not written at one position"
        return not_a_head(part) or runs.run("clean").reason

    def measure(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample:
        site, key = head(part), str(parameters["key"])
        assert site.layer is not None and site.index is not None
        value = runs.run("clean").values[site.layer][torch.arange(runs.n), :, positions(runs, key)]
        # As if every head attended there; one head's write does not depend on the others, short of a norm after them.
        heads = runs.model.architecture[1].n_heads
        spread = value.repeat_interleave(heads // value.shape[1], 1)
        write = runs.model.head_writes(site.layer, spread)[:, site.index]
        direction = runs.once((self.name, key), lambda: _direction(runs, key))
        return torch.einsum("ed,ed->e", write, direction.to(write)).cpu()


def _direction(runs: Runs, key: str) -> Float[Tensor, "example d_model"]:
    """Towards the token at `key`, away from the mean of the other prompts' tokens."""
    pairs = runs.pairs
    own = pairs.answer if key == "answer" else pairs.distractor
    final = runs.run("clean").resid[-1][torch.arange(runs.n), pairs.at]
    vocabulary, counted = _other_tokens(pairs.answer, pairs.distractor)
    counted, total = counted.to(final.device), torch.zeros_like(final)
    for token, here in zip(vocabulary, counted.T, strict=True):
        total += here[:, None] * frozen_norm(runs.model, final, own, token.expand_as(own)).direction
    return total / counted.sum(1)[:, None]


def _other_tokens(
    answer: Int[Tensor, " example"], distractor: Int[Tensor, " example"]
) -> tuple[Int[Tensor, " token"], Bool[Tensor, "example token"]]:
    """All answers and distractors of the data, and which of them are not the example's own."""
    vocabulary = torch.cat([answer, distractor]).unique()
    counted = (vocabulary[None] != answer[:, None]) & (vocabulary[None] != distractor[:, None])
    if not bool(counted.any(1).all()):
        raise PairsError("copying is measured against the other prompts' answers and distractors, but there are none")
    return vocabulary, counted
