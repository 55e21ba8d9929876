"""Erasure: take a concept out of activations, and as little else as possible.

LEACE (Belrose et al. 2023, arXiv:2306.03819, theorems 4.1 to 4.3): of all affine maps after which no linear reader does
better than a constant, the one that moves activations least. The guarantee is linear and holds for the examples that it
was fitted to; what a non-linear reader still finds is measured by `leaks`. Beside it the oracle form, which is told the
labels (section 4.3), the quadratic form, which carries every class's Gaussian to their barycentre by optimal transport
(so that means and covariances agree), iterated nullspace projection (INLP: Ravfogel et al. 2020, arXiv:2004.07667) and
the projection out of the span of class means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vesalius.concepts.classifier import logistic
from vesalius.errors import InputError, NotFiniteError, UnknownNameError

Matrix = Float[Tensor, "row width"]
RIDGE_FREE = torch.finfo(torch.float64).eps
"""Relative size under which a singular value is nothing but rounding."""
WEAKEST = 1e-6
"""Correlation of a direction of the activations with the labels that is still erased."""
ROUNDS = 64
BLOCK = 8192
"""Rows that are counted in together."""


@dataclass(frozen=True, eq=False)
class Eraser:
    """x - ((x - centre) reads^T) writes. reads, writes: [rank, width] float64; centre: [width].

    Called with activations [..., width] it gives them without the concept, in their own dtype and on their device.
    """

    reads: Float[Tensor, "rank width"]
    writes: Float[Tensor, "rank width"]
    centre: Float[Tensor, " width"]
    method: str = "leace"

    @property
    def rank(self) -> int:
        """Directions that are taken out."""
        return len(self.reads)

    def __call__(self, x: Tensor) -> Tensor:
        """Raises InputError for another width."""
        if x.shape[-1] != self.reads.shape[1]:
            raise InputError(f"this eraser is for activations of width {self.reads.shape[1]}; got {list(x.shape)}")
        wide = x.to(torch.float64)
        reads, writes, centre = (part.to(x.device) for part in (self.reads, self.writes, self.centre))
        return (wide - (wide - centre) @ reads.T @ writes).to(x.dtype)


@dataclass(eq=False)
class LeaceFitter:
    """Means and covariances of activations and labels, batch by batch, in O(width^2) memory; `eraser` is LEACE's.

    width: of the activations; classes: of the labels' one-hot form, or columns of labels that are numbers. shrinkage:
    pull the covariance towards a multiple of the identity (Bodnar, Gupta and Parolya 2014); the guarantee for the
    examples that were fitted then holds no more, and rare directions are handled with more care. weakest: correlation
    of a direction with the labels under which it is left in.
    """

    width: int
    classes: int
    shrinkage: bool = False
    weakest: float = WEAKEST
    n: int = 0
    _shift: Tensor | None = None
    _sum_x: Tensor = field(init=False)
    _sum_z: Tensor = field(init=False)
    _xx: Tensor = field(init=False)
    _xz: Tensor = field(init=False)

    def __post_init__(self) -> None:
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.float64)  # noqa: E731
        self._sum_x, self._sum_z = zeros(self.width), zeros(self.classes)
        self._xx, self._xz = zeros(self.width, self.width), zeros(self.width, self.classes)

    def update(self, x: Matrix, z: Tensor) -> LeaceFitter:
        """Count in activations [row, width] and their labels: numbers of classes [row], or columns [row, class].

        Raises InputError for shapes that don't fit, NotFiniteError.
        """
        labels = one_hot(z, self.classes)
        if x.ndim != 2 or x.shape[1] != self.width or len(x) != len(labels):
            raise InputError(f"rows are [row, {self.width}] with a label each; got {list(x.shape)}, {list(z.shape)}")
        for some, own in zip(x.split(BLOCK), labels.split(BLOCK), strict=True):
            self._count(some.to(torch.float64), own.to(x.device))
        return self

    def _count(self, x: Tensor, z: Tensor) -> None:
        if self._shift is None:
            # Sums of what is left over a first mean lose no digits; the exact mean is taken off at the end.
            self._shift = x.mean(0)
            for name in ("_sum_x", "_sum_z", "_xx", "_xz"):
                setattr(self, name, getattr(self, name).to(x.device))
        away = x - self._shift
        if not bool(torch.isfinite(away.sum())):
            raise NotFiniteError("a row to erase from holds NaN or infinity; drop it")
        self.n += len(x)
        self._sum_x += away.sum(0)
        self._sum_z += z.sum(0)
        self._xz.addmm_(away.T, z)
        # A covariance is symmetric: of its four quarters three are enough.
        half = self.width // 2
        left, right = away[:, :half], away[:, half:]
        self._xx[:half, :half].addmm_(left.T, left)
        self._xx[:half, half:].addmm_(left.T, right)
        self._xx[half:, half:].addmm_(right.T, right)

    def covariances(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of the activations, their covariance and that with the labels. Raises InputError for under two rows."""
        if self.n < 2 or self._shift is None:
            raise InputError(f"an eraser is fitted to at least 2 rows; got {self.n}")
        half = self.width // 2
        whole = self._xx.clone()
        whole[half:, :half] = whole[:half, half:].T
        mean = self._sum_x / self.n
        xx = (whole - self.n * torch.outer(mean, mean)) / (self.n - 1)
        xz = (self._xz - torch.outer(mean, self._sum_z)) / (self.n - 1)
        return mean + self._shift, shrunk(xx * (self.n - 1) / self.n, self.n) if self.shrinkage else xx, xz

    @property
    def eraser(self) -> Eraser:
        """The eraser of what was counted in. Raises InputError when labels are all the same."""
        mean, xx, xz = self.covariances()
        whiten, colour = roots(xx)
        u, sizes, _ = torch.linalg.svd(whiten @ xz, full_matrices=False)
        if float(xz.abs().max()) == 0.0:
            raise InputError("the labels go along with nothing in these rows, or are all the same: nothing to erase")
        kept = u[:, sizes > self.weakest]
        return Eraser((whiten @ kept).T.cpu(), (colour @ kept).T.cpu(), mean.cpu())


def one_hot(z: Tensor, classes: int) -> Float[Tensor, "row class"]:
    """Columns of labels. Raises InputError for a class that is not among them."""
    if z.ndim == 2:
        if z.shape[1] != classes:
            raise InputError(f"labels have {z.shape[1]} columns; {classes} are expected")
        return z.to(torch.float64)
    if z.is_floating_point():
        return z[:, None].to(torch.float64)
    if len(z) and not 0 <= int(z.min()) <= int(z.max()) < classes:
        raise InputError(f"labels are numbers of classes under {classes}; got {int(z.min())} to {int(z.max())}")
    return torch.nn.functional.one_hot(z.long(), classes).to(torch.float64)


def roots(covariance: Float[Tensor, "width width"]) -> tuple[Tensor, Tensor]:
    """The inverse square root and the square root of a covariance; directions without variance have neither."""
    size, vectors = torch.linalg.eigh(covariance)
    there = size > size[-1] * len(size) * RIDGE_FREE
    root = size.clamp_min(0.0).sqrt()
    inverse = torch.where(there, 1 / root.clamp_min(1e-300), 0.0)
    return vectors * inverse @ vectors.T, vectors * torch.where(there, root, 0.0) @ vectors.T


def shrunk(covariance: Tensor, n: int) -> Tensor:
    """A covariance (by n, not n - 1) shrunk towards a multiple of the identity, as little as its noise asks for
    (Bodnar, Gupta and Parolya 2014, arXiv:1308.2608, equations 3.7 and 3.8)."""
    width, trace = len(covariance), covariance.trace()
    target = trace / width
    # Squared norms of the covariance, of its target, and of what lies between them.
    own, of_target = covariance.square().sum(), trace.square() / width
    noise = trace.square() / n
    weight = 1 - noise / (own - of_target).clamp_min(1e-300)
    return weight * covariance + (1 - weight) * target * torch.eye(width, dtype=covariance.dtype)


# One call each: activations [row, width], numbers of classes [row] -> Eraser


def leace(x: Matrix, z: Tensor, **options: Any) -> Eraser:
    """LEACE of rows and labels; options as for `LeaceFitter`."""
    return LeaceFitter(x.shape[1], _columns(z), **options).update(x, z).eraser


def mean_projection(x: Matrix, z: Int[Tensor, " row"]) -> Eraser:
    """Project out the span of the class means, about the mean of all."""
    rows = x.to(torch.float64)
    centre = rows.mean(0)
    means = torch.stack([rows[z == label].mean(0) for label in range(_columns(z))]) - centre
    _, sizes, basis = torch.linalg.svd(means, full_matrices=False)
    kept = basis[sizes > sizes[0] * 1e-9] if float(sizes[0]) else basis[:0]
    return Eraser(kept, kept, centre, "mean_projection")


def inlp(x: Matrix, z: Int[Tensor, " row"], *, rounds: int = ROUNDS, slack: float = 0.0) -> Eraser:
    """Project out the direction of a logistic probe, round after round, until it is right no more often, on these rows,
    than the commonest class (plus `slack`), or for so many rounds. One direction for each class and round."""
    rows = x.to(torch.float64)
    centre, classes = rows.mean(0), _columns(z)
    basis = torch.zeros(0, rows.shape[1], dtype=torch.float64)
    for _ in range(rounds):
        left = rows - centre - (rows - centre) @ basis.T @ basis
        found = []
        for label in range(classes) if classes > 2 else [1]:
            inside = (z == label).numpy()
            plane = logistic(left.numpy(), inside, penalty=1.0)
            if plane.accuracy(left.numpy(), inside) > max(inside.mean(), 1 - inside.mean()) + slack:
                found.append(torch.from_numpy(plane.weights))
        if not found:
            break
        new = torch.stack(found) - torch.stack(found) @ basis.T @ basis
        basis = torch.linalg.qr(torch.cat([basis, new]).T)[0].T
        if len(basis) >= rows.shape[1]:
            break
    return Eraser(basis, basis, centre, "inlp")


METHODS: dict[str, Callable[..., Eraser]] = {"leace": leace, "mean_projection": mean_projection, "inlp": inlp}


def fit_rows(x: Any, z: Any, method: str = "leace", **options: Any) -> Eraser:
    """An eraser of rows [row, width] and labels [row]. Raises UnknownNameError for an unknown method."""
    if method not in METHODS:
        raise UnknownNameError("method of erasure", method, METHODS)
    return METHODS[method](torch.as_tensor(x), torch.as_tensor(z), **options)


def random_eraser(like: Eraser, generator: torch.Generator) -> Eraser:
    """Projects a random subspace of the same rank out, about the same centre: the control of an amnesic test."""
    drawn = torch.randn(like.rank, like.reads.shape[1], generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(drawn.T)[0].T
    return Eraser(basis, basis, like.centre, "random")


def _columns(z: Tensor) -> int:
    if z.ndim == 2:
        return z.shape[1]
    return 1 if z.is_floating_point() else int(z.max()) + 1


# With the labels at hand


@dataclass(frozen=True, eq=False)
class OracleEraser:
    """x less what its label alone predicts of it: the smallest move after which no linear reader finds the label."""

    coefficients: Float[Tensor, "width class"]
    mean: Float[Tensor, " class"]

    @classmethod
    def fit(cls, x: Matrix, z: Tensor) -> OracleEraser:
        """From rows and numbers of classes."""
        rows, labels = x.to(torch.float64), one_hot(z, _columns(z))
        away = labels - labels.mean(0)
        return cls((rows - rows.mean(0)).T @ away @ torch.linalg.pinv(away.T @ away), labels.mean(0))

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        """Activations [row, width] with these labels, without what the labels say."""
        labels = one_hot(z, len(self.mean))
        return (x.to(torch.float64) - (labels - self.mean) @ self.coefficients.T).to(x.dtype)


@dataclass(frozen=True, eq=False)
class GaussianEraser:
    """Every class's Gaussian carried to the barycentre of them all, by optimal transport: afterwards the classes agree
    in mean and covariance, so that no quadratic reader finds them where they are Gaussian.

    means: [class, width]; maps: [class, width, width]; centre: [width].
    """

    means: Float[Tensor, "class width"]
    maps: Float[Tensor, "class width width"]
    centre: Float[Tensor, " width"]

    @classmethod
    def fit(cls, x: Matrix, z: Int[Tensor, " row"], *, steps: int = 100) -> GaussianEraser:
        """From rows and numbers of classes. Raises InputError for a class with fewer than two rows."""
        rows, classes = x.to(torch.float64), _columns(z)
        of = [rows[z == label] for label in range(classes)]
        few = [label for label, own in enumerate(of) if len(own) < 2]
        if few:
            raise InputError(f"class {few[0]} has {len(of[few[0]])} rows; a covariance takes at least 2")
        means = torch.stack([own.mean(0) for own in of])
        covariances = torch.stack([own.T.cov() for own in of])
        weights = torch.tensor([len(own) for own in of], dtype=torch.float64) / len(rows)
        target = barycentre(covariances, weights, steps)
        maps = torch.stack([transport(covariance, target) for covariance in covariances])
        return cls(means, maps, weights @ means)

    def __call__(self, x: Tensor, z: Int[Tensor, " row"]) -> Tensor:
        """Activations [row, width] with these labels, carried to the barycentre."""
        away = (x.to(torch.float64) - self.means[z])[:, :, None]
        return ((self.maps[z] @ away)[:, :, 0] + self.centre).to(x.dtype)


def transport(one: Tensor, other: Tensor) -> Float[Tensor, "width width"]:
    """The optimal map between centred Gaussians with these covariances (Knott and Smith 1984)."""
    inverse, root = roots(one)
    return inverse @ roots(root @ other @ root)[1] @ inverse


def barycentre(covariances: Tensor, weights: Tensor, steps: int = 100) -> Float[Tensor, "width width"]:
    """Covariance of the Wasserstein barycentre of centred Gaussians, by the fixed point of Alvarez-Esteban et al. 2016
    (arXiv:1511.05355, equation 7)."""
    found = torch.einsum("c,cij->ij", weights, covariances)
    for _ in range(steps):
        inverse, root = roots(found)
        mean = sum(w * roots(root @ own @ root)[1] for w, own in zip(weights, covariances, strict=True))
        new = inverse @ mean @ mean @ inverse
        moved, found = float((new - found).norm()), (new + new.T) / 2
        if moved <= 1e-13 * float(found.norm()):
            break
    return found


def moved(before: Matrix, after: Matrix) -> float:
    """Mean squared distance that an eraser moves rows by."""
    return float((before.to(torch.float64) - after.to(torch.float64)).square().sum(1).mean())


def labels_tensor(numbers: Sequence[float] | Any) -> Tensor:
    """Numbers of classes, or labels that are numbers, as a tensor."""
    values = np.asarray(numbers)
    whole = values.dtype.kind in "iu" or bool(np.all(values == values.astype(int)))
    return torch.from_numpy(values.astype(np.int64 if whole else np.float64))
