"""Models that are a sum of terms: linear and logistic ones, and generalised additive ones with a curve for each column.

The terms of a row are a tensor of the network, `module:terms|out`, so that each of them is a Part like any other: it
can be read, held, exchanged, claimed about. Hastie and Tibshirani 1990 (Generalized Additive Models); curves are cubic
B-splines with a ridge (Eilers and Marx 1996, Statistical Science 11:89, with the penalty on the coefficients).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vesalius.inputs import Table
from vesalius.interpretable.fitted import Fitted, fitted
from vesalius.interpretable.fitting import Standardise, check_table
from vesalius.interpretable.splines import DEGREE, b_splines, uniform_knots
from vesalius.parts import Part
from vesalius.quantities import coordinate
from vesalius.site import Site

TERMS = Site("module", module="terms")
PENALTIES = tuple(10.0**power for power in range(-3, 3))
"""Of the inverse penalty, those that cross-validation on the rows of the fit chooses among."""
FOLDS = 5
INTERVALS = 5


class LinearTerms(nn.Module):
    """[row, column * output]: every standardised column times its coefficient."""

    def __init__(self, scale: nn.Module, weights: Float[Tensor, "column output"]) -> None:
        super().__init__()
        self.scale = scale
        self.weights = nn.Parameter(weights)

    def forward(self, values: Float[Tensor, "row column"]) -> Float[Tensor, "row term"]:
        """Terms, column after column."""
        return (self.scale(values)[..., None] * self.weights).flatten(1)


class CurveTerms(nn.Module):
    """[row, column * output]: a curve of every standardised column, with mean 0 over the rows of the fit."""

    knots: Tensor
    centre: Tensor

    def __init__(
        self,
        scale: nn.Module,
        knots: Float[Tensor, "column knot"],
        centre: Float[Tensor, "column basis"],
        weights: Float[Tensor, "column basis output"],
    ) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("knots", knots)
        self.register_buffer("centre", centre)
        self.weights = nn.Parameter(weights)

    def forward(self, values: Float[Tensor, "row column"]) -> Float[Tensor, "row term"]:
        """Terms, column after column."""
        basis = b_splines(self.scale(values), self.knots) - self.centre
        return torch.einsum("rcb,cbo->rco", basis, self.weights).flatten(1)


class Additive(nn.Module):
    """The sum of the terms and an intercept: logits [row, class], or one number [row, 1].

    Of two classes the terms are log-odds of the second, and the first one's logit is 0.
    """

    def __init__(self, terms: nn.Module, intercept: Float[Tensor, " output"], binary: bool) -> None:
        super().__init__()
        self.terms = terms
        self.intercept = nn.Parameter(intercept)
        self.binary = binary

    def forward(self, values: Float[Tensor, "row column"]) -> Float[Tensor, "row output"]:
        """Logits, or the number that is predicted."""
        terms: Tensor = self.terms(values)
        total = terms.unflatten(1, (-1, len(self.intercept))).sum(1) + self.intercept
        return torch.cat([torch.zeros_like(total), total], 1) if self.binary else total


def fit_linear(table: Table, *, seed: int = 0) -> Fitted:
    """Logistic regression of a table with classes, ridge regression of one with numbers, on standardised columns.

    The penalty is chosen by cross-validation on these rows. Raises InputError as `fitting.check_table`.
    """
    check_table(table)
    scale = Standardise(table.values.float())
    weights, intercept = _solved(scale(table.values.float()), table, seed)
    net = Additive(LinearTerms(scale, weights), intercept, len(table.classes) == 2)
    return _of(table, net, "linear" if not table.classes else "logistic", len(table.columns))


def fit_gam(table: Table, *, intervals: int = INTERVALS, seed: int = 0) -> Fitted:
    """A generalised additive model: a curve for every column, their sum the log-odds, or the number.

    intervals: between the knots of a curve. The penalty is chosen by cross-validation on these rows. Raises InputError
    as `fitting.check_table`.
    """
    check_table(table)
    scale = Standardise(table.values.float())
    rows = scale(table.values.float())
    knots = uniform_knots(rows.amin(0), rows.amax(0), intervals)
    basis = b_splines(rows, knots)
    centre = basis.mean(0)
    weights, intercept = _solved((basis - centre).flatten(1), table, seed)
    curves = weights.unflatten(0, (len(table.columns), intervals + DEGREE))
    net = Additive(CurveTerms(scale, knots, centre, curves), intercept, len(table.classes) == 2)
    return _of(table, net, "GAM", len(table.columns) * (intervals + DEGREE))


def _solved(design: Float[Tensor, "row feature"], table: Table, seed: int) -> tuple[Tensor, Tensor]:
    """Weights [feature, output] and intercepts [output] by scikit-learn, with a ridge chosen by cross-validation."""
    # Late and here only: importing vesalius must stay light.
    from sklearn.linear_model import LogisticRegressionCV, RidgeCV
    from sklearn.model_selection import StratifiedKFold

    x, y = design.double().numpy(), table.target.numpy()
    if not table.classes:
        found = RidgeCV(alphas=[1 / one for one in PENALTIES]).fit(x, y)
        weights, intercept = found.coef_[None], np.array([found.intercept_])
    else:
        folds = StratifiedKFold(min(FOLDS, int(np.bincount(y).min())), shuffle=True, random_state=seed)
        # By the log-loss: shares of right rows tie, and then any penalty would be taken.
        found = LogisticRegressionCV(
            Cs=list(PENALTIES), l1_ratios=(0.0,), cv=folds, scoring="neg_log_loss", max_iter=2000,
            use_legacy_attributes=False,
        ).fit(x, y)  # fmt: skip
        weights, intercept = found.coef_, found.intercept_
    return torch.from_numpy(weights.T.copy()).float(), torch.from_numpy(np.atleast_1d(intercept)).float()


def _of(table: Table, net: Additive, kind: str, complexity: int) -> Fitted:
    per = len(net.intercept)
    names = table.columns if per == 1 else tuple(f"{one}, {own}" for one in table.columns for own in table.classes)
    return fitted(table, net, kind, term_parts(names), complexity)


def term_parts(names: Sequence[str]) -> tuple[Part, ...]:
    """The terms by these names, as Parts."""
    return tuple(coordinate(TERMS, number, len(names), name) for number, name in enumerate(names))
