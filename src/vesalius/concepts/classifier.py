"""Classical probes: a plane between two classes. The only place that imports scikit-learn, and only when it is used."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
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


def logistic(rows: Rows, labels: Labels, *, penalty: float = 1.0) -> Plane:
    """Logistic regression with an L2 penalty, on columns brought to mean 0 and spread 1; the plane is for the rows.

    rows: [example, width]. labels: [example]. penalty: factor on half the squared weights of scaled columns, beside the
    summed loss (scikit-learn's 1 / C). Columns that don't vary get weight 0. The result has no randomness.

    Raises InputError for shapes that don't fit, a single class, or no convergence; NotFiniteError.
    """
    x, y = _checked(rows, labels)
    if not penalty > 0:
        raise InputError(f"penalty must be positive; got {penalty}")
    mean, spread = x.mean(0), x.std(0)
    varies = spread > 1e-12 * np.maximum(np.abs(mean), 1e-300)
    scale = np.where(varies, spread, 1.0)
    fitted = _fit((x - mean) / scale * varies, y, penalty)
    weights = fitted.coef_[0].astype(np.float64) * varies / scale
    return Plane(weights, float(fitted.intercept_[0] - mean @ weights))


def _fit(x: Rows, y: Labels, penalty: float) -> Any:
    # Late: scikit-learn takes a second to import, and most of the package does without it.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            return LogisticRegression(C=1 / penalty, max_iter=STEPS, tol=TOLERANCE).fit(x, y)
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
