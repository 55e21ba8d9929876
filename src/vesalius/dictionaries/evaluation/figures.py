"""Figures: one number each, with its interval and its definition in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from vesalius.dictionaries.evaluation.totals import COLUMNS, Floats, Totals
from vesalius.errors import InputError, NotFiniteError
from vesalius.stats import Measurement, measure_totals

DRAWS = 1000
DENSE = {"dense_1pct": 0.01, "dense_10pct": 0.1}
LATENT_DRAWS = 100
"""Of the shares of latents, whose totals are as many as there are latents."""

WORDS: Mapping[str, str] = MappingProxyType(
    {
        "fvu": "fraction of variance unexplained: summed squared error over summed squared distance from the mean",
        "l0": "latents active per row",
        "dead": "share of latents that fired in no row",
        "dense_1pct": "share of latents active in more than 1 % of rows",
        "dense_10pct": "share of latents active in more than 10 % of rows",
        "cosine": "mean cosine of a row and its reconstruction",
        "l2_ratio": "mean norm of the reconstruction over the norm of the row; under 1 wherever something is missing",
        "reconstruction_bias": "squares of the reconstruction over its products with the rows; under 1: shrunken",
        "ce_clean": "cross-entropy of the next token, nats, with nothing replaced",
        "ce": "cross-entropy with the reconstruction in place of the model's own activations",
        "ce_increase": "what that adds to the clean cross-entropy",
        "ce_increase_mean": "what the mean activation in their place adds",
        "ce_increase_zero": "what zeros in their place add",
        "kl": "KL divergence of the next-token distribution from the clean one, nats",
        "kl_mean": "the same, with the mean activation",
        "kl_zero": "the same, with zeros",
        "loss_recovered": "1 - ce_increase / ce_increase_zero: flattering, because zeros do so much harm",
        "loss_recovered_mean": "1 - ce_increase / ce_increase_mean",
        "kl_recovered": "1 - kl / kl_zero",
        "kl_recovered_mean": "1 - kl / kl_mean",
    }
)
"""What every figure is."""
_UNITS = {"l0": "latents", "ce": "nats", "kl": "nats"}
"""By the name of a figure up to its first underscore; the others are ratios."""


@dataclass(frozen=True, repr=False)
class Figure:
    """A number with its 95 % interval over groups of rows. measurement: the same with one value per group."""

    measurement: Measurement

    @property
    def value(self) -> float:
        """Of all rows together."""
        return self.measurement.estimate

    @property
    def low(self) -> float | None:
        """Lower end of the interval; None where there is none."""
        return self.measurement.low

    @property
    def high(self) -> float | None:
        """Upper end."""
        return self.measurement.high

    def to_json(self) -> dict[str, Any]:
        """value, low and high."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def __repr__(self) -> str:
        return f"Figure({self})"

    def __str__(self) -> str:
        return f"{self.value:.4g}" + ("" if self.low is None else f" [{self.low:.4g}, {self.high:.4g}]")


Statistic = Callable[[Floats], Floats]


def figure(name: str, totals: Floats, statistic: Statistic, seed: int, cost: Mapping[str, Any]) -> Figure | None:
    """A statistic of column totals [group, column], with its bootstrap interval over groups; None where it is 0 / 0."""
    unit = "" if "recovered" in name else _UNITS.get(name.split("_", 1)[0], "")
    try:
        return Figure(measure_totals(name, totals, statistic, draws=DRAWS, unit=unit, seed=seed, cost=cost))
    except NotFiniteError:
        return None


def row_figures(totals: Totals, seed: int = 0) -> dict[str, Figure]:
    """Figures of how well rows are reconstructed; with several sites, means over them.

    Raises InputError when the rows don't vary, so that there is no variance to explain.
    """
    if not (totals.sites[:, :, COLUMNS.index("deviation")].sum(1) > 0).all():
        raise InputError("all rows are equal at a site, so there is no variance to explain; give other activations")
    statistics: dict[str, Statistic] = {
        "fvu": _over_sites("error", "deviation"),
        "l0": lambda totals: totals[..., -1] / totals[..., -2],
        "cosine": _over_sites("cosine", "nonzero"),
        "l2_ratio": _over_sites("ratio", "nonzero"),
        "reconstruction_bias": _over_sites("reconstruction", "product"),
    }
    columns, cost = totals.joined(), {"rows": totals.n_rows}
    found = {name: figure(name, columns, statistic, seed, cost) for name, statistic in statistics.items()}
    return {name: value for name, value in found.items() if value is not None} | _latent_figures(totals, seed)


def _over_sites(top: str, bottom: str) -> Statistic:
    """Mean over sites of one column's total over another's."""
    above, below = COLUMNS.index(top), COLUMNS.index(bottom)

    def statistic(totals: Floats) -> Floats:
        sites = totals[..., :-2].reshape(*totals.shape[:-1], -1, len(COLUMNS))
        mean: Floats = (sites[..., above] / sites[..., below]).mean(-1)
        return mean

    return statistic


def _latent_figures(totals: Totals, seed: int) -> dict[str, Figure]:
    """Shares of dead and dense latents."""
    if totals.fired is None:
        return {}
    cost, density = {"rows": totals.n_rows}, totals.density
    # Rows stand in the last column, so that a resampled total has its own number of them.
    fired = np.concatenate([totals.fired, totals.rows[:, None].astype(np.float32)], 1)
    silent = (totals.fired == 0).mean(1, dtype=np.float64)
    dead = float((density == 0).mean())
    found = {"dead": Figure(_without_interval("dead", silent, dead, cost))}
    for name, share in DENSE.items():
        found[name] = Figure(
            measure_totals(
                name,
                fired,
                lambda t, share=share: (t[..., :-1] > share * t[..., -1:]).mean(-1),  # type: ignore[misc]
                estimate=float((density > share).mean()),
                draws=LATENT_DRAWS,
                method="percentile",
                seed=seed,
                cost=cost,
            )
        )
    return found


def _without_interval(name: str, values: Floats, estimate: float, cost: Mapping[str, Any]) -> Measurement:
    """Of a figure to which other draws of the rows could only add."""
    n = len(values)
    return Measurement(
        name=name, values=tuple(values.tolist()), estimate=estimate, low=None, high=None, n=n, n_groups=n, cost=cost
    )
