"""Contrast: the prompts, clean and corrupted, and the metric that are measured on; and the usual components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from vesalius.errors import PairsError
from vesalius.inputs import Pairs
from vesalius.metric import Metric, logit_diff
from vesalius.model import Model
from vesalius.parts import Part, Unit
from vesalius.site import Site

EMBED = Unit(Site("embed"))


@dataclass(frozen=True, eq=False)
class Contrast:
    """What is measured on: the same clean prompts under one or more corruptions, and the metric.

    corruptions: name -> Pairs, the main one first; all share clean prompts, answers and read positions, row by row.
    Raises PairsError when there are none or they do not match.
    """

    corruptions: Mapping[str, Pairs]
    metric: Metric = logit_diff

    def __post_init__(self) -> None:
        if not self.corruptions:
            raise PairsError("a contrast needs pairs of at least one corruption; got none")
        for name, pairs in self.corruptions.items():
            differs = _difference(self.pairs, pairs)
            if differs:
                raise PairsError(
                    f"corruption {name!r} has other {differs} than {self.main!r}: all corruptions of a task change the "
                    "same clean prompts, row by row, and are scored with the same answers"
                )

    @classmethod
    def of(cls, data: Contrast | Pairs | Mapping[str, Pairs], metric: Metric = logit_diff) -> Contrast:
        """From pairs of one corruption, or of several by name."""
        if isinstance(data, Contrast):
            return data
        return cls({data.corruption: data} if isinstance(data, Pairs) else data, metric)

    @property
    def main(self) -> str:
        """The first corruption: the one claims are made under."""
        return next(iter(self.corruptions))

    @property
    def pairs(self) -> Pairs:
        """The pairs of the main corruption."""
        return self.corruptions[self.main]

    def subset(self, rows: Sequence[int]) -> Contrast:
        """The contrast on some of the prompts."""
        return replace(self, corruptions={name: pairs.subset(rows) for name, pairs in self.corruptions.items()})


def heads_and_mlps(model: Model) -> tuple[Part, ...]:
    """The embeddings, every head and every MLP, in forward order: what a circuit is made of unless told otherwise."""
    _, layout = model.architecture
    found: list[Part] = [EMBED]
    for layer in range(layout.n_layers):
        found += [Unit(Site("z", layer, head)) for head in range(layout.n_heads)]
        found.append(Unit(Site("mlp_out", layer)))
    return tuple(found)


def _difference(first: Pairs, other: Pairs) -> str:
    """What two corruptions must share but do not; empty when they fit."""
    if other.example_hashes != first.example_hashes:
        return "clean prompts"
    for name, what in (("answer", "answers"), ("distractor", "distractors"), ("at", "read positions")):
        if not torch.equal(getattr(other, name), getattr(first, name)):
            return what
    return ""
