"""What any room returns when it has measured something: per-example values with an interval and what it cost."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from vesalius.errors import InputError, NotFiniteError
from vesalius.stats.arrays import Floats, finite, vector
from vesalius.stats.clustered import clustered_t
from vesalius.stats.exact import clopper_pearson
from vesalius.stats.resampling import FEWEST_GROUPS, interval_of_sums

_ROUNDING = 1e-9
"""A relative difference that is none."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Measurement:
    """Per-example values of one quantity, their mean (or other estimate) and an interval at `level`.

    values: one float per example (or per group, where the estimate is a statistic of groups), in `unit`; `groups` maps
    a kind of group (template, names) to one label per value; `cost` and `diagnostics` are free JSON. n_groups is the
    number of groups of the clustering with the fewest, effective_groups how many independent groups, all alike, would
    be as sure (default: n_groups). low and high are None where there are too few groups for an interval. Raises
    NotFiniteError naming the first bad index, InputError on lengths and for an interval with one end.
    """

    name: str
    values: tuple[float, ...]
    estimate: float
    low: float | None
    high: float | None
    n: int
    n_groups: int
    level: float = 0.95
    unit: str = ""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    seed: int | None = None
    cost: Mapping[str, Any] = field(default_factory=dict)
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    effective_groups: float | None = None

    def __post_init__(self) -> None:
        values = tuple(float(v) for v in self.values)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "groups", {k: tuple(map(str, v)) for k, v in self.groups.items()})
        for index, value in enumerate(values):
            _finite(value, f"values[{index}]", self.name)
        if (self.low is None) != (self.high is None):
            raise InputError(f"measurement {self.name!r}: an interval has two ends; got {self.low} and {self.high}")
        for part in ("estimate", "low", "high"):
            if getattr(self, part) is not None:
                object.__setattr__(self, part, float(getattr(self, part)))
                _finite(getattr(self, part), part, self.name)
        given = self.n_groups if self.effective_groups is None else self.effective_groups
        object.__setattr__(self, "effective_groups", float(given))
        _finite(float(given), "effective_groups", self.name)
        self._check_lengths()

    def _check_lengths(self) -> None:
        if self.n != len(self.values):
            raise InputError(f"measurement {self.name!r}: n is {self.n} but there are {len(self.values)} values")
        for kind, labels in self.groups.items():
            if len(labels) != self.n:
                raise InputError(f"measurement {self.name!r}: {len(labels)} labels of {kind!r} for {self.n} values")

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; `Measurement(**that)` gives the measurement back."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain["values"] = list(self.values)
        plain["groups"] = {k: list(v) for k, v in self.groups.items()}
        return plain | {"cost": dict(self.cost), "diagnostics": dict(self.diagnostics)}

    def __repr__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.4g}, {self.high:.4g}]"
        counted = f"{self.n} examples in {self.n_groups} groups"
        return f"Measurement({self.name}: {self.estimate:.4g}{interval} {self.unit}, {counted})"

    def _repr_html_(self) -> str:
        interval = "none" if self.low is None or self.high is None else f"{self.low:.4g} to {self.high:.4g}"
        rows = {
            "estimate": f"{self.estimate:.4g} {self.unit}".strip(),
            f"{self.level:.0%} interval": interval,
            "examples": f"{self.n} in {self.n_groups} groups{self._fewer}",
        }
        cells = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
        return f"<table><caption>{html.escape(self.name)}</caption>{cells}</table>"

    @property
    def _fewer(self) -> str:
        """The effective number of groups, where it is another."""
        effective = self.n_groups if self.effective_groups is None else self.effective_groups
        return "" if abs(effective - self.n_groups) < 0.05 else f" (as sure as {effective:.1f} independent ones)"


def measure(
    name: str,
    values: ArrayLike,
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    clusters: Sequence[str] = ("template", "names"),
    level: float = 0.95,
    unit: str = "",
    seed: int | None = None,
    cost: Mapping[str, Any] | None = None,
    diagnostics: Mapping[str, Any] | None = None,
) -> Measurement:
    """A Measurement of the mean of values `[example]` with its clustered t interval.

    `clusters` are the kinds of group (keys of `groups`, at most two; absent ones are skipped) that the interval
    respects; without any the examples count as independent. The estimate is the mean over groups of the first of them,
    each counting once, however many examples it has. Raises InputError for fewer than 2 values or groups.
    """
    labels = {kind: tuple(map(str, of)) for kind, of in (groups or {}).items()}
    test = clustered_t(values, *(labels[kind] for kind in clusters if kind in labels), level=level)
    return Measurement(
        name=name,
        values=tuple(vector(values).tolist()),
        estimate=test.estimate,
        low=test.low,
        high=test.high,
        n=test.n,
        n_groups=test.n_groups,
        level=level,
        unit=unit,
        groups=labels,
        seed=seed,
        cost=cost or {},
        diagnostics=diagnostics or {},
        effective_groups=test.effective_groups,
    )


def measure_share(name: str, hits: ArrayLike) -> Measurement:
    """Share of independent examples [example] that are hits, with the exact interval (Clopper and Pearson 1934).

    Raises InputError for no examples.
    """
    each = np.asarray(hits, dtype=bool)
    ends, n = clopper_pearson(int(each.sum()), len(each)), len(each)
    share = float(each.mean())
    values = tuple(each.astype(float).tolist())
    return Measurement(name=name, values=values, estimate=share, low=ends.low, high=ends.high, n=n, n_groups=n)


def measure_totals(
    name: str,
    totals: ArrayLike,
    statistic: Callable[[Floats], Floats],
    *,
    estimate: float | None = None,
    draws: int = 2000,
    method: Literal["bca", "percentile"] = "bca",
    unit: str = "",
    seed: int = 0,
    cost: Mapping[str, Any] | None = None,
    diagnostics: Mapping[str, Any] | None = None,
) -> Measurement:
    """A Measurement of a statistic of totals over groups, such as a ratio of sums, with its 95 % bootstrap interval.

    totals: [group, column]. statistic: [..., column] totals to [...], over any leading axes. estimate: default the
    statistic of the totals of all groups. values: the statistic of each group alone, of those where it is defined; the
    groups are resampled for the interval, as in `interval_of_sums`. There is none for fewer than 6 groups, where the
    statistic is 0 / 0 without some of them, nor where what came out does not hold the estimate, so that resampling
    moves the statistic itself; `diagnostics` then says which (`no_interval`).

    Raises NotFiniteError where the statistic of all groups is not finite.
    """
    x = finite(totals, "totals")
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = float(statistic(x.sum(0))) if estimate is None else float(estimate)
        _finite(whole, "estimate", name)
        each = np.asarray(statistic(x), dtype=np.float64)
        low, high, missing = _bootstrapped(x, statistic, whole, draws, method, seed)
    defined = np.isfinite(each)
    noted = dict(diagnostics or {})
    if missing:
        noted["no_interval"] = missing
    return Measurement(
        name=name,
        values=tuple(each[defined].tolist()),
        estimate=whole,
        low=low,
        high=high,
        n=int(defined.sum()),
        n_groups=len(x),
        unit=unit,
        groups={"group": tuple(str(number) for number in defined.nonzero()[0])},
        seed=seed,
        cost=cost or {},
        diagnostics=noted,
    )


def _bootstrapped(
    totals: Floats,
    statistic: Callable[[Floats], Floats],
    whole: float,
    draws: int,
    method: Literal["bca", "percentile"],
    seed: int,
) -> tuple[float | None, float | None, str]:
    """Both ends, and why there are none."""
    if len(totals) < FEWEST_GROUPS:
        return None, None, f"{len(totals)} group(s); an interval needs at least {FEWEST_GROUPS}"
    try:
        low, high = interval_of_sums(totals, statistic, draws=draws, seed=seed, method=method)
    except NotFiniteError:
        return None, None, "0 / 0 without some of the groups"
    # A quantity that is the same in every group has an interval of one point, up to rounding.
    slack = _ROUNDING * max(abs(low), abs(high), abs(whole))
    if low - slack <= whole <= high + slack:
        return min(low, whole), max(high, whole), ""
    return None, None, f"resampled groups give {low:.4g} to {high:.4g}, which does not hold the estimate"


def _finite(value: float, where: str, name: str) -> None:
    if not math.isfinite(value):
        raise NotFiniteError(f"measurement {name!r}: {where} is {value}; nothing can be concluded from it")
