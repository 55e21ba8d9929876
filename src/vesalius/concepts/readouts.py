"""Readouts: from activations to a number for each class. Planes, a small network, and one that pools over tokens.

Each is fitted to rows and classes and gives scores [example, output]; of two classes one score is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from vesalius.concepts.classifier import (
    Plane,
    cross_validated,
    discriminant,
    largest_margin,
    logistic,
    mean_difference,
    ridge,
    sparse,
)
from vesalius.errors import UnknownNameError
from vesalius.seeds import generator_for

Matrix = NDArray[Any]
Numbers = NDArray[np.intp]
Floats = NDArray[np.float64]
Groups = Sequence[str]
HIDDEN, STEPS = 32, 120


class Readout(Protocol):
    """What a probe computes."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Its numbers, by name."""
        ...

    def scores(self, rows: Matrix, owner: Numbers | None = None) -> Floats:
        """[example, output] from rows [row, width]; owner: the example of each row, default one row each."""
        ...


@dataclass(frozen=True, eq=False)
class Planes:
    """weights: [output, width], bias: [output]. penalties: what cross-validation chose for each output, if it did."""

    weights: Float[Tensor, "output width"]
    bias: Float[Tensor, " output"]
    penalties: tuple[float, ...] = ()

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Weights and bias."""
        return {"weights": self.weights, "bias": self.bias}

    def scores(self, rows: Matrix, owner: Numbers | None = None) -> Floats:
        """[example, output]; where an example has several rows the mean over them."""
        found: Floats = np.asarray(rows, dtype=np.float64) @ self.weights.numpy().T + self.bias.numpy()
        return found if owner is None else _averaged(found, owner)

    @classmethod
    def of(cls, planes: Sequence[Plane], penalties: Sequence[float] = ()) -> Planes:
        """One output for each plane."""
        weights = torch.from_numpy(np.stack([plane.weights for plane in planes]))
        return cls(weights, torch.tensor([plane.bias for plane in planes], dtype=torch.float64), tuple(penalties))


@dataclass(frozen=True, eq=False)
class Network:
    """A layer of rectified units on scaled rows, and a plane on it."""

    centre: Float[Tensor, " width"]
    scale: Float[Tensor, " width"]
    hidden: Float[Tensor, "unit width"]
    hidden_bias: Float[Tensor, " unit"]
    weights: Float[Tensor, "output unit"]
    bias: Float[Tensor, " output"]

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Everything, by the names of the fields."""
        return dict(vars(self))

    def scores(self, rows: Matrix, owner: Numbers | None = None) -> Floats:
        """[example, output]; where an example has several rows the mean over them."""
        x = _standard(rows, self.centre, self.scale)
        found = torch.relu(x @ self.hidden.T + self.hidden_bias) @ self.weights.T + self.bias
        return found.numpy() if owner is None else _averaged(found.numpy(), owner)


@dataclass(frozen=True, eq=False)
class Pooled:
    """Rows of an example are pooled by a softmax of query . row, one head of attention, and read by a plane."""

    centre: Float[Tensor, " width"]
    scale: Float[Tensor, " width"]
    query: Float[Tensor, " width"]
    weights: Float[Tensor, "output width"]
    bias: Float[Tensor, " output"]

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Everything, by the names of the fields."""
        return dict(vars(self))

    def scores(self, rows: Matrix, owner: Numbers | None = None) -> Floats:
        """[example, output]."""
        x = _standard(rows, self.centre, self.scale)
        place = torch.arange(len(x)) if owner is None else torch.from_numpy(np.unique(owner, return_inverse=True)[1])
        return (pool(x, place, self.query) @ self.weights.T + self.bias).numpy()


def _standard(rows: Matrix, centre: Tensor, scale: Tensor) -> Float[Tensor, "row width"]:
    return (torch.from_numpy(np.asarray(rows, dtype=np.float64)) - centre) / scale


def pool(rows: Float[Tensor, "row width"], owner: Tensor, query: Tensor) -> Float[Tensor, "example width"]:
    """The rows of each example, weighted by a softmax of their products with a query."""
    n, logits = int(owner.max()) + 1, rows @ query
    top = torch.full((n,), -torch.inf, dtype=rows.dtype).scatter_reduce(0, owner, logits.detach(), "amax")
    weight = (logits - top[owner]).exp()
    total = torch.zeros(n, dtype=rows.dtype).index_add(0, owner, weight)
    return torch.zeros(n, rows.shape[1], dtype=rows.dtype).index_add(0, owner, rows * (weight / total[owner])[:, None])


def _averaged(scores: Floats, owner: Numbers) -> Floats:
    place = np.unique(owner, return_inverse=True)[1]
    found: Floats = np.stack([np.bincount(place, weights=column) for column in scores.T], 1)
    return found / np.bincount(place)[:, None]


# Fits: (rows, numbers of classes, groups, owner of each row, seed, penalties already chosen) -> readout


def _each(fit: Callable[[Matrix, Any], Plane]) -> Callable[..., Readout]:
    """A plane for each class against the rest; of two classes one."""

    def fitted(rows: Matrix, classes: Numbers, groups: Groups, owner: Numbers, *_: Any) -> Planes:
        del groups
        own = classes[owner]
        count = int(classes.max()) + 1
        return Planes.of([fit(rows, own == label) for label in (range(count) if count > 2 else [1])])

    return fitted


def _logistic(
    rows: Matrix, classes: Numbers, groups: Groups, owner: Numbers, seed: int, penalties: Sequence[float]
) -> Planes:
    """Each class's penalty by cross-validation, where none is given."""
    del seed
    own, count, of = classes[owner], int(classes.max()) + 1, [groups[number] for number in owner]
    sides = [own == label for label in (range(count) if count > 2 else [1])]
    chosen = penalties or [cross_validated(rows, inside, of) for inside in sides]
    return Planes.of([logistic(rows, inside, penalty=one, tolerance=1e-4) for inside, one in
                      zip(sides, chosen, strict=True)], chosen)  # fmt: skip


def _ridge(rows: Matrix, numbers: Floats, groups: Groups, owner: Numbers, *_: Any) -> Planes:
    return Planes.of([ridge(rows, numbers[owner], [groups[number] for number in owner])])


def _network(rows: Matrix, classes: Numbers, groups: Groups, owner: Numbers, seed: int, *_: Any) -> Network:
    """A small network, by full-batch Adam with weight decay."""
    del groups
    x, centre, scale = _scaled(rows)
    x, outputs = x.float(), int(classes.max()) + 1
    generator = generator_for("probe network", seed)
    shapes = [(HIDDEN, x.shape[1]), (HIDDEN,), (outputs, HIDDEN), (outputs,)]
    start = [torch.randn(shape, generator=generator) / shape[-1] ** 0.5 * (len(shape) > 1)
             for shape in shapes]  # fmt: skip
    own = torch.from_numpy(classes[owner])
    hidden, hidden_bias, weights, bias = _descended(
        start, lambda w, b, v, c: torch.nn.functional.cross_entropy(torch.relu(x @ w.T + b) @ v.T + c, own)
    )
    return Network(centre, scale, hidden, hidden_bias, *_binary(weights, bias))


def _pooled(rows: Matrix, classes: Numbers, groups: Groups, owner: Numbers, *_: Any) -> Pooled:
    """Query and plane together, by full-batch Adam with weight decay."""
    del groups
    x, centre, scale = _scaled(rows)
    examples, place = np.unique(owner, return_inverse=True)
    own, where = torch.from_numpy(classes[examples]), torch.from_numpy(place)
    outputs = int(classes.max()) + 1
    # From zero: the query begins as the mean over tokens.
    start = [torch.zeros(shape, dtype=torch.float64) for shape in [(x.shape[1],), (outputs, x.shape[1]), (outputs,)]]
    query, weights, bias = _descended(
        start, lambda q, w, b: torch.nn.functional.cross_entropy(pool(x, where, q) @ w.T + b, own)
    )
    return Pooled(centre, scale, query, *_binary(weights, bias))


def _scaled(rows: Matrix) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of mean 0 and spread 1, and what makes them so."""
    x = torch.from_numpy(np.asarray(rows, dtype=np.float64))
    centre, scale = x.mean(0), x.std(0, correction=0).clamp_min(1e-12)
    return _standard(rows, centre, scale), centre, scale


def _descended(start: list[Tensor], loss: Callable[..., Tensor], decay: float = 1e-3) -> list[Tensor]:
    """Where Adam ends; decay: half of it times the squared weights is added to the loss."""
    free = [tensor.requires_grad_() for tensor in start]
    optimiser = torch.optim.Adam(free, lr=0.02, weight_decay=decay)
    with torch.enable_grad():
        for _ in range(STEPS):
            optimiser.zero_grad()
            loss(*free).backward()
            optimiser.step()
    return [tensor.detach().double() for tensor in free]


def _binary(weights: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Of two outputs their difference, so that two classes have one score."""
    return (weights[1:] - weights[:1], bias[1:] - bias[:1]) if len(bias) == 2 else (weights, bias)


FITS: Mapping[str, Callable[..., Readout]] = {
    "logistic": _logistic,
    "mass_mean": _each(mean_difference),
    "lda": _each(discriminant),
    "svm": _each(largest_margin),
    "sparse": _each(sparse),
    "mlp": _network,
    "attention": _pooled,
    "ridge": _ridge,
}
"""By kind of probe."""
LINEAR = ("logistic", "mass_mean", "lda", "svm", "sparse", "ridge")


def fit_readout(
    kind: str,
    rows: Matrix,
    classes: Numbers | Floats,
    groups: Groups,
    owner: Numbers | None = None,
    seed: int = 0,
    like: Readout | None = None,
) -> Readout:
    """A readout of a kind, from rows [row, width] and for each example its class (or number) and group.

    owner: the example of each row; default one row each. like: one whose penalties are taken, not chosen
    anew. Raises UnknownNameError for an unknown kind, InputError as `classifier.logistic`.
    """
    if kind not in FITS:
        raise UnknownNameError("kind of probe", kind, FITS)
    where = np.arange(len(rows)) if owner is None else owner
    return FITS[kind](rows, classes, groups, where, seed, like.penalties if isinstance(like, Planes) else ())
