"""Figures: one number each, with its interval and its definition in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from vesalius.dictionaries.evaluation.sums import COLUMNS, Floats, Sums, joined
from vesalius.errors import InputError, NotFiniteError
from vesalius.stats import bootstrap_of_sums

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
        "cosine": "mean cosine of a row and what it is rebuilt as",
        "l2_ratio": "mean norm of what is rebuilt over the norm of the row; under 1 wherever something is missing",
        "reconstruction_bias": "squares of what is rebuilt over its products with the rows; under 1: shrunken",
        "ce_clean": "cross-entropy of the next token, nats, with nothing replaced",
        "ce": "cross-entropy with the rebuilt activations in place of the model's own",
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
)  # fmt: skip
"""What every figure is."""


@dataclass(frozen=True)
class Figure:
    """A number with its 95 % interval; low and high are None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, Any]:
        """value, low and high."""
        return {"value": self.value, "low": self.low, "high": self.high}


Statistic = Callable[[Floats], Floats]


def figure(totals: Floats, statistic: Statistic, seed: int) -> Figure | None:
    """A statistic of column totals [group, column], with its bootstrap interval over groups; None where it is 0 / 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(totals.sum(0)))
        if not np.isfinite(value):
            return None
        if len(totals) < 2:
            return Figure(value)
        try:
            low, high = bootstrap_of_sums(totals, statistic, draws=DRAWS, seed=seed)
        except NotFiniteError:  # 0 / 0 without some of the groups
            return Figure(value)
    # A quantity that is the same in every group has an interval of one point, up to rounding.
    return Figure(value, min(low, value), max(high, value))


def row_figures(sums: Sums, seed: int = 0) -> dict[str, Figure]:
    """Figures of how well rows are rebuilt; with several sites, means over them.

    Raises InputError when the rows don't vary, so that there is no variance to explain.
    """
    if not (sums.sites[:, :, COLUMNS.index("deviation")].sum(1) > 0).all():
        raise InputError("all rows are equal at a site, so there is no variance to explain; give other activations")
    totals = joined(sums)
    wanted: dict[str, Statistic] = {
        "fvu": _over_sites("error", "deviation"),
        "l0": lambda totals: totals[..., -1] / totals[..., -2],
        "cosine": _over_sites("cosine", "nonzero"),
        "l2_ratio": _over_sites("ratio", "nonzero"),
        "reconstruction_bias": _over_sites("rebuilt", "product"),
    }
    found = {name: figure(totals, statistic, seed) for name, statistic in wanted.items()}
    return {name: value for name, value in found.items() if value is not None} | _latent_figures(sums, seed)


def _over_sites(top: str, bottom: str) -> Statistic:
    """Mean over sites of one column's total over another's."""
    above, below = COLUMNS.index(top), COLUMNS.index(bottom)

    def statistic(totals: Floats) -> Floats:
        sites = totals[..., :-2].reshape(*totals.shape[:-1], -1, len(COLUMNS))
        mean: Floats = (sites[..., above] / sites[..., below]).mean(-1)
        return mean

    return statistic


def _latent_figures(sums: Sums, seed: int) -> dict[str, Figure]:
    """Shares of dead and dense latents. Dead has no interval: other draws of the rows can only add to it."""
    if sums.fired is None:
        return {}
    found = {"dead": Figure(float((sums.density == 0).mean()))}
    totals = np.concatenate([sums.fired, sums.rows[:, None].astype(np.float32)], 1)
    for name, share in DENSE.items():
        statistic = lambda t, share=share: (t[..., :-1] > share * t[..., -1:]).mean(-1)  # noqa: E731
        value = float((sums.density > share).mean())
        low, high = value, value
        if len(totals) > 1:
            low, high = bootstrap_of_sums(totals, statistic, draws=LATENT_DRAWS, seed=seed, method="percentile")
        found[name] = Figure(value, min(low, value), max(high, value))
    return found
