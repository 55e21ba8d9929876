"""Planes between two classes. Alone imports scikit-learn for probes, and only when it is used."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from vesalius.errors import InputError, NotFiniteError

Rows = Float[np.ndarray, "example width"]
Labels = Bool[np.ndarray, " example"]
STEPS, TOLERANCE = 10_000, 1e-7
"""Of L-BFGS; columns of unit spread need some dozens of steps."""


@dataclass(frozen=True, eq=False)
class Plane:
    """A linear classifier: an example is of the class when weights . x + bias is above 0.

    weights: [width], in the units of the rows it was fitted to.
    """

    weights: Float[np.ndarray, " width"]
    bias: float

    def scores(self, rows: Rows) -> Float[np.ndarray, " example"]:
        """[example], above 0 on the side of the class."""
        return np.asarray(rows, dtype=np.float64) @ self.weights + self.bias

    def predict(self, rows: Rows) -> Labels:
        """[example] whether each is of the class."""
        found: Labels = self.scores(rows) > 0
        return found

    def accuracy(self, rows: Rows, labels: Labels) -> float:
        """Share of examples whose label is predicted."""
        return float(np.mean(self.predict(rows) == labels))


def logistic(rows: Rows, labels: Labels, *, penalty: float = 1.0, tolerance: float = TOLERANCE) -> Plane:
    """Logistic regression with an L2 penalty, on columns brought to mean 0 and spread 1; the plane is for the rows.

    rows: [example, width]. labels: [example]. penalty: factor on half the squared weights of scaled columns, beside the
    summed loss (scikit-learn's 1 / C). tolerance: largest gradient at the end. Columns that don't vary get weight 0.
    The result has no randomness.

    Raises InputError for shapes that don't fit, a single class, or no convergence; NotFiniteError.
    """
    x, y = _checked(rows, labels)
    if not penalty > 0:
        raise InputError(f"penalty must be positive; got {penalty}")
    mean, spread = x.mean(0), x.std(0)
    varies = spread > 1e-12 * np.maximum(np.abs(mean), 1e-300)
    scale = np.where(varies, spread, 1.0)
    fitted = _fit((x - mean) / scale * varies, y, penalty, tolerance)
    weights = fitted.coef_[0].astype(np.float64) * varies / scale
    return Plane(weights, float(fitted.intercept_[0] - mean @ weights))


PENALTIES = (1.0, 30.0, 1e3, 3e4)
"""Tried by cross-validation."""
FOLDS = 3


def cross_validated(rows: Rows, labels: Labels, groups: Sequence[str], penalties: Sequence[float] = PENALTIES) -> float:
    """The penalty whose `logistic` probes are most often right on groups that they were not fitted to, of three parts.

    Of equals the largest. Raises as `logistic`.
    """
    x, y = _checked(rows, labels)
    parts = folds(y, groups)
    right = []
    for penalty in penalties:
        fit = partial(logistic, penalty=penalty, tolerance=1e-3)
        right.append(sum(_right(x, y, fold, fit) for fold in parts))
    return max(zip(right, penalties, strict=True))[1]


def folds(labels: Labels, groups: Sequence[str], count: int = FOLDS) -> list[Labels]:
    """Which examples each part holds out: whole groups, and both classes where there are groups enough for that.

    Raises InputError when no part can leave both classes to fit to.
    """
    classes = np.asarray(labels)
    names = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    number = np.array([names[group] for group in groups])
    # Groups are dealt out in turns, those of one class after those of the other.
    mean = np.bincount(number, weights=classes.astype(float)) / np.bincount(number)
    rank = np.empty(len(names), dtype=int)
    rank[np.argsort(mean, kind="stable")] = np.arange(len(names))
    parts = [rank[number] % count == part for part in range(count)]
    usable = [part for part in parts if part.any() and len(set(classes[~part].tolist())) == 2]
    if not usable:
        raise InputError(f"{len(names)} groups are too few to cross-validate over; {2 * count} are needed")
    return usable


def _right(x: Rows, y: Labels, fold: Labels, fit: Callable[[Rows, Labels], Plane]) -> float:
    return float(np.sum(fit(x[~fold], y[~fold]).predict(x[fold]) == y[fold]))


def discriminant(rows: Rows, labels: Labels) -> Plane:
    """Linear discriminant analysis, its covariance shrunk as Ledoit and Wolf (2004) do. Raises as `logistic`."""
    x, y = _checked(rows, labels)
    if min(y.sum(), (~y).sum()) < 2:
        raise InputError(f"a covariance takes 2 examples of each class; got {y.sum()} and {(~y).sum()}")
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(x, y)
    return Plane(fitted.coef_[0].astype(np.float64), float(fitted.intercept_[0]))


def largest_margin(rows: Rows, labels: Labels, *, penalty: float = 1e2) -> Plane:
    """A linear support vector machine on columns of mean 0 and spread 1. Raises as `logistic`."""
    x, y = _checked(rows, labels)
    from sklearn.svm import LinearSVC

    mean, scale = x.mean(0), np.maximum(x.std(0), 1e-12)
    # The dual is what scikit-learn solves; it needs no random draws when every example is visited in turn.
    fitted = LinearSVC(C=1 / penalty, dual="auto", max_iter=20_000, random_state=0).fit((x - mean) / scale, y)
    weights = fitted.coef_[0].astype(np.float64) / scale
    return Plane(weights, float(fitted.intercept_[0] - mean @ weights))


def sparse(rows: Rows, labels: Labels, *, k: int = 8) -> Plane:
    """`logistic` on the k columns whose class means are farthest apart in their spread (Gurnee et al. 2023)."""
    x, y = _checked(rows, labels)
    apart = np.abs(x[y].mean(0) - x[~y].mean(0)) / np.maximum(x.std(0), 1e-12)
    columns = np.argsort(-apart, kind="stable")[:k]
    found, weights = logistic(x[:, columns], y), np.zeros(x.shape[1])
    weights[columns] = found.weights
    return Plane(weights, found.bias)


def ridge(rows: Rows, numbers: Float[np.ndarray, " example"], groups: Sequence[str]) -> Plane:
    """Least squares with an L2 penalty for labels that are numbers, cross-validated by groups as `cross_validated`.

    `scores` of the plane are the predicted numbers. Raises InputError for shapes that don't fit.
    """
    x, y = np.asarray(rows, dtype=np.float64), np.asarray(numbers, dtype=np.float64)
    parts = folds(y > np.median(y), groups)
    wrong = []
    for penalty in PENALTIES:
        errors = [(_ridge(x[~part], y[~part], penalty).scores(x[part]) - y[part]) ** 2 for part in parts]
        wrong.append(float(np.concatenate(errors).sum()))
    return _ridge(x, y, PENALTIES[int(np.argmin(wrong))])


def _ridge(x: Rows, y: Float[np.ndarray, " example"], penalty: float) -> Plane:
    mean, scale = x.mean(0), np.maximum(x.std(0), 1e-12)
    z = (x - mean) / scale
    # The smaller of the two systems of equations.
    if len(x) < x.shape[1]:
        weights = z.T @ np.linalg.solve(z @ z.T + penalty * np.eye(len(x)), y - y.mean()) / scale
    else:
        weights = np.linalg.solve(z.T @ z + penalty * np.eye(x.shape[1]), z.T @ (y - y.mean())) / scale
    return Plane(weights, float(y.mean() - mean @ weights))


def words_counted(train: Sequence[str], test: Sequence[str]) -> tuple[Rows, Rows]:
    """Bags of words: [text, word] how often each word of the training texts is in a text; letters' case is ignored."""
    from sklearn.feature_extraction.text import CountVectorizer

    words = r"(?u)\w+|[^\w\s]"
    counter = CountVectorizer(token_pattern=words, max_features=5000)
    return (counter.fit_transform(list(train)).toarray().astype(np.float64),
            counter.transform(list(test)).toarray().astype(np.float64))  # fmt: skip


def _fit(x: Rows, y: Labels, penalty: float, tolerance: float) -> Any:
    # Late: scikit-learn takes a second to import, and most of the package does without it.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            return LogisticRegression(C=1 / penalty, max_iter=STEPS, tol=tolerance).fit(x, y)
        except ConvergenceWarning as error:
            raise InputError(
                f"logistic regression did not converge in {STEPS:,} steps on {x.shape[0]} examples of width "
                f"{x.shape[1]}; raise its penalty ({penalty:g})"
            ) from error


def mean_difference(rows: Rows, labels: Labels) -> Plane:
    """The plane half-way between the means of the two classes, at right angles to the line through them.

    Raises InputError and NotFiniteError as `logistic`.
    """
    x, y = _checked(rows, labels)
    inside, outside = x[y].mean(0), x[~y].mean(0)
    weights = inside - outside
    return Plane(weights, float(-weights @ (inside + outside) / 2))


def _checked(rows: Rows, labels: Labels) -> tuple[Rows, Labels]:
    x, y = np.asarray(rows, dtype=np.float64), np.asarray(labels, dtype=bool)
    if x.ndim != 2 or y.shape != (len(x),) or not x.size:
        raise InputError(f"a probe is fitted to rows [example, width] and a label each; got {x.shape} and {y.shape}")
    if y.all() or not y.any():
        raise InputError(f"all {len(y)} examples are {'of' if y.all() else 'outside'} the class; a probe needs both")
    if not np.isfinite(x).all():
        raise NotFiniteError(f"row {int(np.argwhere(~np.isfinite(x))[0][0])} holds NaN or infinity; drop it")
    return x, y
