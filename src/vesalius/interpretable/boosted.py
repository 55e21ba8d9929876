"""Explainable boosting machines: fitted by `interpret-core`, and then a network like the others.

An EBM (Lou et al. 2013, KDD; Nori et al. 2019, arXiv:1909.09223) is a sum of step functions of a column, or of two
columns. Its tables become a network's buffers, so that its terms are Parts, and every claim about them gets a verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vesalius.errors import InputError
from vesalius.inputs import Table
from vesalius.interpretable.additive import Additive, term_parts
from vesalius.interpretable.fitted import Fitted, fitted
from vesalius.interpretable.fitting import check_table

MISSING = "explainable boosting machines need the package interpret-core: pip install 'vesalius[ebm]'"


class StepTerms(nn.Module):
    """[row, term * output]: of every term the number that stands in its table, found by the bins of its columns."""

    def __init__(
        self,
        cuts: Sequence[Sequence[Tensor]],
        columns: Sequence[tuple[int, ...]],
        scores: Sequence[Float[Tensor, ...]],
    ) -> None:
        super().__init__()
        self.columns = [tuple(some) for some in columns]
        for number, (own, table) in enumerate(zip(cuts, scores, strict=True)):
            self.register_buffer(f"table_{number}", table)
            for axis, edges in enumerate(own):
                self.register_buffer(f"cuts_{number}_{axis}", edges)

    def forward(self, values: Float[Tensor, "row column"]) -> Float[Tensor, "row term"]:
        """Terms in their order."""
        return torch.cat([self._of(number, values) for number in range(len(self.columns))], 1)

    def _of(self, number: int, values: Tensor) -> Float[Tensor, "row output"]:
        table: Tensor = self.get_buffer(f"table_{number}")
        bins = [
            self._bins(self.get_buffer(f"cuts_{number}_{axis}"), values[:, column])
            for axis, column in enumerate(self.columns[number])
        ]
        return table[tuple(bins)]

    def _bins(self, cuts: Tensor, values: Tensor) -> Int[Tensor, " row"]:
        # Bin 0 is for what is missing, which a table here never is.
        return torch.searchsorted(cuts, values.double().contiguous(), right=True) + 1


def fit_ebm(table: Table, *, interactions: int = 0, rounds: int = 500, seed: int = 0) -> Fitted:
    """An explainable boosting machine of a table.

    interactions: terms of two columns. rounds: of boosting, at most. Raises InputError as `fitting.check_table`, and
    when interpret-core is not installed.
    """
    check_table(table)
    try:
        # Late and here only: an extra.
        from interpret.glassbox import ExplainableBoostingClassifier, ExplainableBoostingRegressor
    except ImportError as error:
        raise InputError(MISSING) from error
    kind = ExplainableBoostingClassifier if table.classes else ExplainableBoostingRegressor
    made = kind(interactions=interactions, max_rounds=rounds, outer_bags=4, random_state=seed, n_jobs=1)
    return from_ebm(made.fit(table.values.double().numpy(), table.target.numpy()), table)


def from_ebm(made: Any, table: Table) -> Fitted:
    """A fitted EBM of interpret-core as a network: the same numbers, to rounding.

    Raises InputError for one with other than continuous columns, or another number of them.
    """
    kinds = list(made.feature_types_in_)
    if len(kinds) != len(table.columns) or any(kind != "continuous" for kind in kinds):
        raise InputError(
            f"an EBM of {len(kinds)} columns ({', '.join(sorted(set(kinds)))}) does not fit {len(table.columns)} "
            "columns of numbers; fit it with feature_types=['continuous', ...]"
        )
    columns = [tuple(some) for some in made.term_features_]
    cuts = [[_cuts(made.bins_[column], len(some)) for column in some] for some in columns]
    several = len(table.classes) > 2
    tables = [torch.from_numpy(np.asarray(one)).double() for one in made.term_scores_]
    tables = [one if several else one[..., None] for one in tables]
    intercept = torch.from_numpy(np.atleast_1d(np.asarray(made.intercept_, dtype=np.float64)))
    net = Additive(StepTerms(cuts, columns, tables), intercept, len(table.classes) == 2)
    names = [" and ".join(table.columns[column] for column in some) for some in columns]
    if several:
        names = [f"{one}, {own}" for one in names for own in table.classes]
    return fitted(table, net, "EBM", term_parts(names), sum(one.numel() for one in tables))


def _cuts(levels: Sequence[Any], columns: int) -> Float[Tensor, " cut"]:
    """Where a column is cut: terms of several columns have a coarser level, where there is one."""
    return torch.from_numpy(np.asarray(levels[min(len(levels), columns) - 1], dtype=np.float64))
