"""Scores: a metric on a concept, one line per method, one value per dictionary; what is comparable stands together."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vesalius.dictionaries.probing.readings import Floats
from vesalius.stats import clopper_pearson, clustered_t


@dataclass(frozen=True)
class Score:
    """One line. values: one per dictionary (retrained from other seeds), or a single one for what has no dictionary.

    low, high: 95 % interval of their mean, for other texts; None where there is none. k: latents or coordinates used.
    parts: the same per label.
    """

    method: str
    words: str
    values: tuple[float, ...]
    low: float | None = None
    high: float | None = None
    k: int | None = None
    parts: Mapping[str, float] | None = None

    @property
    def value(self) -> float:
        """Mean over the dictionaries."""
        return float(np.mean(self.values))

    @property
    def spread(self) -> float | None:
        """Standard deviation over the dictionaries; None of one."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Everything, the mean and spread with it."""
        return {
            "method": self.method, "words": self.words, "k": self.k, "value": self.value, "low": self.low,
            "high": self.high, "spread": self.spread, "values": list(self.values),
            "parts": None if self.parts is None else dict(self.parts),
        }  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """A metric on one concept. note: what to know before it is believed."""

    metric: str
    concept: str
    n_train: int
    n_test: int
    lines: tuple[Score, ...]
    note: str = ""

    def __getitem__(self, key: str | tuple[str, int]) -> Score:
        """The line of a method, or of a method and k. Raises KeyError."""
        method, k = (key, None) if isinstance(key, str) else key
        for line in self.lines:
            if line.method == method and k in (None, line.k):
                return line
        raise KeyError(key)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, text and numbers."""
        return {
            "metric": self.metric, "concept": self.concept, "n_train": self.n_train, "n_test": self.n_test,
            "note": self.note, "lines": [line.to_json() for line in self.lines],
        }  # fmt: skip

    def __repr__(self) -> str:
        rows = [f"  {line.method}{'' if line.k is None else f' k={line.k}'}: {_told(line)}" for line in self.lines]
        return "\n".join([f"{self.metric} on {self.concept} ({self.n_train} + {self.n_test} texts)", *rows])

    def _repr_html_(self) -> str:
        head = "<tr><th></th><th>k</th><th>value [95 %]</th><th>spread over seeds</th></tr>"
        rows = "".join(_row(line) for line in self.lines)
        caption = html.escape(f"{self.metric} on {self.concept}. {self.note}")
        return f"<table><caption>{caption}</caption>{head}{rows}</table>"


def _told(line: Score) -> str:
    ends = "" if line.low is None else f" [{line.low:.3f}, {line.high:.3f}]"
    return f"{line.value:.3f}{ends}" + ("" if line.spread is None else f", spread {line.spread:.3f}")


def _row(line: Score) -> str:
    ends = "" if line.low is None else f" [{line.low:.3f}, {line.high:.3f}]"
    spread = "" if line.spread is None else f"{line.spread:.3f}"
    cells = ("" if line.k is None else str(line.k), f"{line.value:.3f}{ends}", spread)
    return f"<tr><th title='{html.escape(line.words, quote=True)}'>{html.escape(line.method)}</th>" + "".join(
        f"<td>{cell}</td>" for cell in cells
    ) + "</tr>"  # fmt: skip


def scored(
    method: str, words: str, values: Sequence[Floats], groups: Sequence[str], *, k: int | None = None,
    labels: Sequence[str] = (), share: bool = True,
) -> Score:  # fmt: skip
    """A line from values per test example, [example] for each dictionary; examples of a group are not independent.

    labels: [example], the target of each, for the parts. share: values are 0 or 1, or means of such.
    """
    each = np.mean(values, axis=0)
    low, high = _interval(each, groups, share)
    names = list(dict.fromkeys(labels))
    owners = np.array(labels)
    parts = {name: float(each[owners == name].mean()) for name in names} if len(names) > 1 else None
    return Score(method, words, tuple(float(np.mean(own)) for own in values), low, high, k, parts)


def _interval(each: Floats, groups: Sequence[str], share: bool) -> tuple[float | None, float | None]:
    """By clustered t over groups; exact for counts when all are independent, or all values are one."""
    n, counted = len(each), share and (len(set(groups)) == len(each) or float(np.ptp(each)) == 0)
    if counted:
        low, high = clopper_pearson(round(float(each.sum())), n)
        return min(low, float(each.mean())), max(high, float(each.mean()))
    if n < 2 or len(set(groups)) < 2:
        return None, None
    test = clustered_t(each, list(groups))
    return (max(test.low, 0.0), min(test.high, 1.0)) if share else (test.low, test.high)
