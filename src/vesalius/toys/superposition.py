"""Toy models of superposition (Elhage et al. 2022, arXiv:2209.10652): more sparse features than hidden dimensions.

x' = ReLU(W W^T x + b) with W [feature, hidden]; each feature is present with some probability, and then uniform between
0 and 1. What the best W looks like is known: orthogonal where features are dense or few, polytopes where they are
sparse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.errors import InputError

GRID = 40
"""Midpoints between 0 and 1 at which two features are integrated."""
BATCH = 1024
REPRESENTED = 0.5
"""Least norm of the row of a feature that counts as represented."""


@dataclass(frozen=True, eq=False)
class ToyModels:
    """Several trainings of one toy. W: [instance, feature, hidden]. b: [instance, feature]. loss: [instance]."""

    W: Float[Tensor, "instance feature hidden"]
    b: Float[Tensor, "instance feature"]
    loss: Float[Tensor, " instance"]

    @property
    def best(self) -> int:
        """The instance with the smallest loss: others may have stopped at a worse minimum."""
        return int(self.loss.argmin())

    @property
    def represented(self) -> Tensor:
        """[instance] number of features whose row has a norm over one half."""
        return (self.W.norm(dim=-1) > REPRESENTED).sum(-1)


def toy_models(
    n_features: int,
    n_hidden: int,
    probability: float,
    *,
    importance: Sequence[float] | None = None,
    instances: int = 8,
    steps: int = 2000,
    lr: float = 1e-2,
    seed: int = 0,
) -> ToyModels:
    """Train a toy model from several random starts at once, by Adam with a learning rate that falls to zero.

    importance: weight of each feature's squared error; default 1 each. With two features the expected loss is computed
    on a grid; with more, on a new batch at each step. Raises InputError for sizes and probabilities out of range.
    """
    weights = torch.tensor([1.0] * n_features if importance is None else list(importance))
    if min(n_features, n_hidden, instances, steps) < 1 or not 0 < probability <= 1 or len(weights) != n_features:
        raise InputError(
            "toy models need at least one feature, hidden dimension, instance and step, a probability in (0, 1] and "
            f"one importance per feature; got {n_features}, {n_hidden}, {instances}, {steps}, {probability} and "
            f"{len(weights)} importances"
        )
    generator = torch.Generator().manual_seed(seed)
    W = (torch.randn(instances, n_features, n_hidden, generator=generator) * n_hidden**-0.5).requires_grad_()
    b = torch.zeros(instances, n_features, requires_grad=True)
    adam = torch.optim.Adam([W, b], lr=lr)
    fall = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
    batches = _grid(probability) if n_features == 2 else _drawn(n_features, probability, generator)
    loss = torch.zeros(instances)
    for _, (x, share) in zip(range(steps), batches, strict=False):
        reconstructed = torch.relu(torch.einsum("ifh,igh,ng->inf", W, W, x) + b[:, None])
        loss = ((reconstructed - x).square() * weights * share[:, None]).sum((1, 2))
        adam.zero_grad()
        loss.sum().backward()
        adam.step()
        fall.step()
    return ToyModels(W.detach(), b.detach(), loss.detach())


def _grid(p: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Values of two features, [row, 2], and the probability of each row; the same at every step."""
    points = (torch.arange(GRID) + 0.5) / GRID
    zero = torch.zeros(GRID)
    both = torch.cartesian_prod(points, points)
    x = torch.cat([torch.zeros(1, 2), torch.stack([points, zero], 1), torch.stack([zero, points], 1), both])
    # Neither feature present, one of them, both.
    counts = torch.tensor([1, 2 * GRID, GRID**2])
    probabilities = torch.tensor([(1 - p) ** 2, p * (1 - p) / GRID, p**2 / GRID**2])
    share = probabilities.repeat_interleave(counts)
    while True:
        yield x, share


def _drawn(n: int, p: float, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        x = torch.rand(BATCH, n, generator=generator) * (torch.rand(BATCH, n, generator=generator) < p)
        yield x, torch.full((BATCH,), 1 / BATCH)
