"""Modular addition by hand: a network of one hidden layer of squares, whose frequencies are known (Gromov 2023).

Neurons read cos(w a + f) + cos(w b + g) for a few frequencies w = 2 pi k / p and three phases f and g each, are
squared, and write cos(w c + f + g). Over the nine pairs of phases everything cancels but half the sum over keys k
of cos(2 pi k (a + b - c) / p), which is largest at c = a + b.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vesalius.errors import InputError

KEYS = (14, 35, 41, 42, 52)
"""Those of the network of Nanda et al. 2023."""
PHASES = tuple(2 * math.pi * n / 3 for n in range(3))


class ModularAddition(nn.Module):
    """(a, b) [example, 2] -> logits [example, p]; 9 neurons for each key, in double precision.

    first: [2, p, neuron] what each input adds to the neurons; second: [neuron, p] what squared neurons write.
    """

    def __init__(self, p: int = 113, keys: Sequence[int] = KEYS) -> None:
        super().__init__()
        if p < 3 or not keys or any(not 0 < key <= p // 2 for key in keys) or len(set(keys)) < len(keys):
            raise InputError(f"keys are different numbers from 1 to {p // 2}; got {list(keys)} for p={p}")
        number = torch.arange(p, dtype=torch.float64)
        waves = [(2 * math.pi * key / p, one, two) for key in keys for one in PHASES for two in PHASES]
        left, right = (torch.stack([torch.cos(w * number + phase[side]) for w, *phase in waves], 1) for side in (0, 1))
        out = torch.stack([torch.cos(w * number + one + two) for w, one, two in waves]) / 9
        self.p = p
        self.first = nn.Parameter(torch.stack([left, right]))
        self.second = nn.Parameter(out)

    def neurons(self, inputs: Int[Tensor, "example 2"]) -> Float[Tensor, "example neuron"]:
        """Squared."""
        return (self.first[0, inputs[:, 0]] + self.first[1, inputs[:, 1]]).square()

    def forward(self, inputs: Int[Tensor, "example 2"]) -> Float[Tensor, "example p"]:
        logits: Tensor = self.neurons(inputs) @ self.second
        return logits


def every_pair(p: int) -> Int[Tensor, "example 2"]:
    """All p * p inputs."""
    number = torch.arange(p)
    return torch.cartesian_prod(number, number)


def frequencies(weights: Float[Tensor, "p neuron"], share: float = 0.01) -> tuple[int, ...]:
    """Frequencies that carry at least a share of the power of some weights over 0 .. p - 1, the constant left out.

    A frequency k and p - k are the same.
    """
    spectrum = torch.fft.rfft(weights.double(), dim=0).abs().square().sum(1)[1:]
    found = (spectrum >= share * spectrum.sum()).nonzero()[:, 0] + 1
    return tuple(found.tolist())


def explained_by(logits: Float[Tensor, "example p"], p: int, keys: Sequence[int]) -> float:
    """Fraction of the variance of the logits of `every_pair` that cosines of a + b - c at some keys explain."""
    inputs, number = every_pair(p), torch.arange(p)
    distance = (inputs.sum(1, keepdim=True) - number[None]).double()
    waves = torch.stack([torch.cos(2 * math.pi * key / p * distance).flatten() for key in keys], 1)
    target = logits.double().flatten()
    target = target - target.mean()
    fit = torch.linalg.lstsq(waves.T @ waves, waves.T @ target).solution
    return float(1 - (target - waves @ fit).square().sum() / target.square().sum())
