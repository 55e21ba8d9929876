"""A fitted model of a table: a `vs.Model` with its parts by name, what it predicts, and what is said of its columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vesalius.describe import Description, Prediction
from vesalius.errors import InputError
from vesalius.inputs import Table
from vesalius.interpretable.fitting import (
    MLP,
    Standardise,
    check_table,
    count_weights,
    outputs_of,
    seeded,
    table_loss,
    train,
)
from vesalius.model import Model
from vesalius.parts import Part
from vesalius.quantities import HELPS, RAISES, Runs, column_part, coordinate
from vesalius.site import Site
from vesalius.stats import Measurement, measure, measure_share

LOW, HIGH = 0.1, 0.9
"""Quantiles of a column between which its effect is described."""
LEAST = 0.2
"""Log-odds, or spreads of the target, from which an effect of a column is worth claiming."""


@dataclass(frozen=True, eq=False, repr=False)
class Fitted:
    """A model that was fitted to a table. parts: what it is made of, by name; complexity: numbers that a reader would
    have to look at to know what it does."""

    model: Model
    kind: str
    columns: tuple[str, ...]
    classes: tuple[str, ...]
    parts: tuple[Part, ...]
    complexity: int
    spread: float = 1.0
    """Of the target, where it is a number: the unit of what is worth claiming."""

    def __repr__(self) -> str:
        return f"Fitted({self.kind} of {len(self.columns)} columns, {len(self.parts)} parts)"

    @torch.no_grad()
    def predict(self, table: Table) -> Float[Tensor, "row output"]:
        """Probabilities [row, class], or numbers [row, 1]. Raises InputError for a table with other columns."""
        self.check(table)
        logits = self.model.run(table.values.float()).logits.double()
        return logits.softmax(-1) if self.classes else logits

    def score(self, table: Table) -> Measurement:
        """Share of rows that are right, or 1 less squared error over the target's variance (R²), with its interval."""
        self.check(table)
        return score_of(self.model.run(table.values.float()).logits.double(), table)

    def check(self, table: Table) -> None:
        """Raises InputError for a table that this model was not made for."""
        if table.columns != self.columns:
            other = sorted(set(self.columns) ^ set(table.columns))[:4]
            raise InputError(
                f"this model takes the columns {list(self.columns)}; these rows differ in {other or 'order'}"
            )
        if table.classes != self.classes:
            raise InputError(f"this model tells {list(self.classes)} apart, and these rows {list(table.classes)}")


def score_of(output: Float[Tensor, "row output"], table: Table, name: str = "") -> Measurement:
    """Of logits, or numbers, what `Fitted.score` gives."""
    if not table.classes:
        target = table.target.double()
        values = 1 - (output[:, 0] - target) ** 2 / target.var(correction=0)
        return measure(name or "R²", values.numpy(), groups=table.groups, clusters=table.clusters)
    hits = (output.argmax(1) == table.numbers).numpy()
    if not table.clusters or all(len(set(table.groups[kind])) == len(hits) for kind in table.clusters):
        return measure_share(name or "accuracy", hits)
    return measure(name or "accuracy", hits.astype(float), groups=table.groups, clusters=table.clusters)


def fitted(table: Table, net: nn.Module, kind: str, parts: Sequence[Part], complexity: int) -> Fitted:
    """A network as a fitted model of a table."""
    model = Model(net.eval().requires_grad_(False), name=f"{kind} of {table.name or 'a table'}")
    spread = 1.0 if table.classes else float(table.target.double().std(correction=0))
    return Fitted(model, kind, table.columns, table.classes, tuple(parts), complexity, spread)


def describe_columns(runs: Runs, found: Fitted, names: Sequence[str] = ()) -> tuple[Description, ...]:
    """What a model of a table does with each column, as descriptions with predictions to be tested on fresh rows.

    runs: of the model on the discovery rows. names: which columns; default all, those with most effect first. Each says
    which way the column pushes the odds of the last class (or the number) between its 10 % and 90 % quantiles, and that
    the answer is worse with other rows' values. Columns whose effect is under what is worth claiming are left out.
    Raises InputError for runs on another model or other data.
    """
    table = runs.data
    if not isinstance(table, Table) or runs.model is not found.model:
        raise InputError(f"columns are described on a table, of the model {found.model.name}; got {runs!r}")
    made = [_described(runs, found, table, name) for name in names or table.columns]
    return tuple(sorted((one for one in made if one is not None), key=lambda one: -abs(one.predictions[0].mean)))


def _described(runs: Runs, found: Fitted, table: Table, name: str) -> Description | None:
    part, column = column_part(table, name), table.values[:, table.column(name)].double().numpy()
    low, high = np.quantile(column, [LOW, HIGH]).tolist()
    given = {"low": low, "high": high, **({"class": table.classes[-1]} if table.classes else {})}
    if low == high:
        return None
    mean, least = runs.mean(RAISES.measure(runs, part, given)), LEAST * found.spread
    if abs(mean) < least:
        return None
    up = "raises" if mean > 0 else "lowers"
    what = f"the odds of {table.classes[-1]}" if table.classes else "what is predicted"
    words = f"{up} {what} by {abs(mean):.2f} between {low:.3g} and {high:.3g}"
    effect = Prediction(
        RAISES.name, given, mean, 1.0, words, f"{up} {what} when it goes from {low:.3g} to {high:.3g}",
        1 if mean > 0 else -1, max(abs(mean) / 2, least), RAISES.scale_of(runs, part, given), control={},
    )  # fmt: skip
    return Description(part, "", (effect, *_needed(runs, part)), name=name)


def _needed(runs: Runs, part: Part) -> tuple[Prediction, ...]:
    """That the answer rests on it, where it does by 2 % or more of what it does on everything."""
    mean, scale = runs.mean(HELPS.measure(runs, part, {})), HELPS.scale_of(runs, part, {}) or 0.0
    if mean < 0.02 * scale or scale <= 0:
        return ()
    size = max(mean / 2, 0.02 * scale)
    words = HELPS.phrase({})
    return (
        Prediction(
            HELPS.name, {}, mean, 1.0, f"{words}, by {mean:.3g}", words, 1, size, scale,
            (("shuffled", size / 2),), control={},
        ),
    )  # fmt: skip


def fit_mlp(
    table: Table, *, hidden: Sequence[int] = (32,), steps: int = 400, decay: float = 0.01, seed: int = 0
) -> Fitted:
    """A multi-layer perceptron of a table: the black box that the others are compared with.

    Its hidden layers are at `module:hidden.<n>|out`; its parts are their units. Raises InputError as
    `fitting.check_table`.
    """
    check_table(table)
    values, target = table.values.float(), table.target.float()
    widths = (len(table.columns), *hidden, outputs_of(table))
    net = seeded(lambda: MLP(Standardise(values), widths), seed)
    assert isinstance(net, MLP)
    if not table.classes:
        mean, spread = float(target.mean()), float(target.std())
        train(
            net, values, lambda found: ((found[:, 0] - (target - mean) / spread) ** 2).mean(), steps=steps, decay=decay
        )
        with torch.no_grad():
            net.head.weight *= spread
            net.head.bias.copy_(net.head.bias * spread + mean)
    else:
        train(net, values, table_loss(table), steps=steps, decay=decay)
    sites = [(Site("module", module=f"hidden.{number}"), width) for number, width in enumerate(hidden)]
    parts = [coordinate(site, unit, width, f"{site} {unit}") for site, width in sites for unit in range(width)]
    return fitted(table, net, "MLP", parts, count_weights(net))
