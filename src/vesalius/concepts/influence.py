"""How much the output leans on a concept's direction: gradients along it (TCAV, and gradient times direction).

TCAV (Kim et al. 2018, arXiv:1711.11279): share of a class's examples whose log-odds rise along the direction. As the
paper asks, it is compared with directions fitted to labels dealt out anew. The sign says nothing of size; gradient
times the distance between the classes does, in the output's own units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.concepts.classifier import mean_difference
from vesalius.concepts.effect import Behaviour, check_site
from vesalius.concepts.readings import random_order
from vesalius.directions import Direction
from vesalius.errors import InputError
from vesalius.patching.tail import Tail, in_batches
from vesalius.stats import Measurement, measure, measure_share, rank_p
from vesalius.stats.arrays import Floats


@dataclass(frozen=True, eq=False, repr=False)
class Influence:
    """Derivatives [example] of the answers' log-odds along a direction, and along random concepts' [draw, example].

    size: distance between the classes along the direction, so that derivative times size is in nats.
    """

    direction: Direction
    derivatives: Floats
    random: Floats
    size: float
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def tcav(self) -> Measurement:
        """Share of examples whose derivative is positive, with the exact interval."""
        return measure_share("TCAV", self.derivatives > 0)

    @property
    def p(self) -> float:
        """Rank of the mean derivative's size among those of the random concepts.

        Of the share of positive ones it would say little: where the output is nearly linear, every direction has all
        derivatives on one side.
        """
        return rank_p(abs(float(self.derivatives.mean())), np.abs(self.random.mean(1)))

    @property
    def effect(self) -> Measurement:
        """Gradient times the distance between the classes: the change in nats that a straight line predicts."""
        name = f"gradient along {self.direction} times the distance between the classes"
        return measure(name, self.derivatives * self.size, groups=self.groups, clusters=tuple(self.groups), unit="nats")

    def __repr__(self) -> str:
        share = self.tcav
        return (
            f"Influence(TCAV {share.estimate:.2f} [{share.low:.2f}, {share.high:.2f}], p {self.p:.2g}; {self.effect!r})"
        )


def influence(
    tail: Tail,
    direction: Direction,
    behaviour: Behaviour,
    labels: np.ndarray[tuple[int], np.dtype[np.bool_]],
    *,
    random: int = 19,
    seed: int = 0,
    groups: Mapping[str, tuple[str, ...]] | None = None,
    where: Callable[[int], bool] | None = None,
) -> Influence:
    """Derivatives at each example of a tail along a direction, against differences of means of labels dealt out anew.

    labels: [example] whether each is of the class. where: of which examples, by number; default all. Raises InputError
    for a behaviour without answers, and for a direction of another site.
    """
    check_site(tail, direction)
    if behaviour.answers is None:
        raise InputError("derivatives are of the log-odds of two answers: Behaviour(answers=...)")
    values = tail.values.float().cpu().numpy()
    vectors = [direction.vector.cpu().numpy()]
    for number in range(random):
        plane = mean_difference(values, labels[random_order(len(labels), "tcav", seed, number)])
        vectors.append(plane.weights / np.linalg.norm(plane.weights))
    each = gradients(tail, behaviour).double().cpu().numpy() @ np.stack(vectors).T
    kept = [number for number in range(len(tail)) if where is None or where(number)]
    along = values @ vectors[0]
    size = float(along[labels].mean() - along[~labels].mean())
    picked = {kind: tuple(of[number] for number in kept) for kind, of in (groups or {}).items()}
    return Influence(direction, each[kept, 0], each[kept, 1:].T, size, picked)


def gradients(tail: Tail, behaviour: Behaviour) -> Float[Tensor, "example width"]:
    """Of the answers' log-odds at each example, by its values at the tail's place."""
    found = []
    for rows in in_batches(len(tail)):
        values = tail.values[rows].detach().requires_grad_()
        with torch.enable_grad():
            level = behaviour.level(tail.logits(values, rows, grad=True)).sum()
        found.append(torch.autograd.grad(level, values)[0])
    return torch.cat(found)
