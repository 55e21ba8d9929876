"""Directions without labels, from contrast pairs: a statement and its negation, answered yes and answered no.

Contrast-consistent search (CCS) and the top principal component of the pairs' differences (CRC-TPC): Burns et al. 2022
(arXiv:2212.03827, sections 2.2 and 2.3, appendix). Neither knows which side is true: the sign comes from labels of
training pairs, or is left open, and never from those that are tested on. And neither need find truth: whatever is
louder and consistent will do (Farquhar et al. 2023, arXiv:2312.10029), which `distractor_test` shows by planting it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vesalius.concepts.readings import random_order
from vesalius.errors import InputError, UnknownNameError
from vesalius.seeds import generator_for
from vesalius.stats import Measurement, measure_share

Matrix = NDArray[np.float64]
Flags = NDArray[np.bool_]
RESTARTS, STEPS = 10, 200
SIDES = ("positive", "negative")


@dataclass(frozen=True, eq=False)
class ContrastProbe:
    """Scores pairs: above 0 the positive side is taken for the true one, up to the sign where none is known.

    weights: [width]; bias; means: of the positive and negative sides [2, width], which are taken off first; scale:
    [2, width]. signed: whether the sign came from labels. loss: CCS's, of the best restart.
    """

    method: str
    weights: Matrix
    bias: float
    means: Matrix
    scale: Matrix
    signed: bool = False
    loss: float | None = None

    def scores(self, positive: Matrix, negative: Matrix) -> Matrix:
        """[pair]."""
        sides = [
            (np.asarray(side, float) - self.means[n]) / self.scale[n] for n, side in enumerate((positive, negative))
        ]
        each = [side @ self.weights + self.bias for side in sides]
        if self.method == "ccs":
            first, second = (1 / (1 + np.exp(-one)) for one in each)
            found: Matrix = (first + 1 - second) / 2 - 0.5
            return found
        return (each[0] - each[1]) / 2

    def accuracy(self, positive: Matrix, negative: Matrix, truth: Flags) -> Measurement:
        """Share of pairs whose true side is found, with the exact interval. Where the sign is open, whichever of the
        two is right more often: then one half is the least that it can be."""
        right = (self.scores(positive, negative) > 0) == truth
        if not self.signed and right.mean() < 0.5:
            right = ~right
        return measure_share(f"{self.method}{'' if self.signed else ', up to sign'}", right)


def fit_contrast(
    positive: Matrix, negative: Matrix, method: str = "ccs", *, truth: Flags | None = None, seed: int = 0
) -> ContrastProbe:
    """A probe from activations of both sides [pair, width], each brought to mean 0 (and for CCS spread 1) by itself, so
    that what the sides' wording adds is gone.

    method: "ccs" (the best of ten restarts, by its loss), "crc_tpc", or "mean_difference", which takes the pairs'
    labels. truth: [pair] whether the positive side is true, of these training pairs, for the sign. Raises
    UnknownNameError, and InputError for sides that don't match up or labels that are missing.
    """
    sides = np.stack([np.asarray(positive, float), np.asarray(negative, float)])
    if sides.ndim != 3 or sides.shape[1] < 4:
        raise InputError(f"contrast pairs are rows [pair, width] of both sides, at least 4; got {sides.shape[1:]}")
    if method not in _METHODS:
        raise UnknownNameError("unsupervised method", method, _METHODS)
    means = sides.mean(1)
    scale = np.maximum(sides.std(1), 1e-12) if method == "ccs" else np.ones_like(means)
    scaled = (sides - means[:, None]) / scale[:, None]
    weights, bias, loss = _METHODS[method](scaled, truth, seed)
    probe = ContrastProbe(method, weights, bias, means, scale, loss=loss)
    if truth is None:
        return probe
    flip = ((probe.scores(positive, negative) > 0) == truth).mean() < 0.5
    sign = -1.0 if flip else 1.0
    return ContrastProbe(method, sign * weights, sign * bias, means, scale, True, loss)


def _ccs(sides: Matrix, truth: Flags | None, seed: int) -> tuple[Matrix, float, float]:
    """The best of several restarts by the loss, never by accuracy."""
    del truth
    x = torch.from_numpy(sides)
    best: tuple[Matrix, float, float] | None = None
    for restart in range(RESTARTS):
        generator = generator_for("ccs", seed, restart)
        weights = torch.randn(x.shape[2], generator=generator, dtype=torch.float64) / x.shape[2] ** 0.5
        bias = torch.zeros((), dtype=torch.float64)
        free = [weights.requires_grad_(), bias.requires_grad_()]
        optimiser = torch.optim.AdamW(free, lr=0.02, weight_decay=0.01)
        with torch.enable_grad():
            for _ in range(STEPS):
                optimiser.zero_grad()
                _ccs_loss(x, *free).backward()
                optimiser.step()
        loss = float(_ccs_loss(x, *free).detach())
        if best is None or loss < best[2]:
            best = (weights.detach().numpy(), float(bias.detach()), loss)
    assert best is not None
    return best


def _ccs_loss(x: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    first, second = torch.sigmoid(x @ weights + bias)
    return ((first + second - 1) ** 2 + torch.minimum(first, second) ** 2).mean()


def _top_component(sides: Matrix, truth: Flags | None, seed: int) -> tuple[Matrix, float, None]:
    del truth, seed
    return np.linalg.svd(sides[0] - sides[1], full_matrices=False)[2][0], 0.0, None


def _mean_difference(sides: Matrix, truth: Flags | None, seed: int) -> tuple[Matrix, float, None]:
    del seed
    if truth is None:
        raise InputError("the mean difference of pairs needs to know which side is true: truth=")
    return (np.where(truth[:, None], 1.0, -1.0) * (sides[0] - sides[1])).mean(0), 0.0, None


_METHODS: Mapping[str, Callable[[Matrix, Flags | None, int], tuple[Matrix, float, float | None]]] = {
    "ccs": _ccs,
    "crc_tpc": _top_component,
    "mean_difference": _mean_difference,
}


@dataclass(frozen=True)
class DistractorTest:
    """What an unsupervised method finds when something louder than truth is planted: accuracies on truth and on what
    was planted. fooled: it finds the planted thing in nearly all pairs, and truth no better than a guess."""

    truth: Measurement
    distractor: Measurement

    @property
    def fooled(self) -> bool:
        """Whether what was found is what was planted."""
        return self.distractor.estimate > 0.9 > self.truth.estimate and self.distractor.estimate > self.truth.estimate


def distractor_test(
    positive: Matrix, negative: Matrix, truth: Flags, method: str = "ccs", *, loudness: float = 4.0, seed: int = 0
) -> DistractorTest:
    """Add to each pair a random direction whose sign has nothing to do with truth, and see what is found.

    loudness: size of what is added to each side, in units of the root mean square distance of the sides from their
    mean.
    """
    sides = np.stack([np.asarray(positive, float), np.asarray(negative, float)])
    planted = np.arange(sides.shape[1]) % 2 == 0
    planted = planted[random_order(len(planted), "distractor", seed)]
    vector = torch.randn(sides.shape[2], generator=generator_for("distractor", seed), dtype=torch.float64).numpy()
    size = loudness * np.sqrt(((sides - sides.mean(1, keepdims=True)) ** 2).sum(2).mean())
    added = np.where(planted, 1.0, -1.0)[:, None] * vector / np.linalg.norm(vector) * size
    louder = sides[0] + added, sides[1] - added
    probe = fit_contrast(*louder, method, truth=truth if method == "mean_difference" else None, seed=seed)
    return DistractorTest(probe.accuracy(*louder, truth), probe.accuracy(*louder, planted))
