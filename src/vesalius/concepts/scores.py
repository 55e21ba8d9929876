"""ConceptScores: a metric on a concept, one line per method, one value per dictionary."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vesalius.concepts.readings import Floats
from vesalius.stats import Measurement, clopper_pearson, clustered_t


@dataclass(frozen=True)
class ScoreLine:
    """One line. values: one per dictionary (retrained from other seeds), or a single one for what has no dictionary.

    measurement: of their mean, over the texts that were tested on (its interval is for other texts); where a metric
    gives no value per text it has one value per dictionary, and no interval. k: latents or coordinates used. parts: the
    value of each label.
    """

    method: str
    words: str
    values: tuple[float, ...]
    measurement: Measurement
    k: int | None = None
    parts: Mapping[str, float] | None = None

    @property
    def value(self) -> float:
        """Mean over the dictionaries."""
        return self.measurement.estimate

    @property
    def low(self) -> float | None:
        """Lower end of the 95 % interval of the mean; None where there is none."""
        return self.measurement.low

    @property
    def high(self) -> float | None:
        """Upper end."""
        return self.measurement.high

    @property
    def spread(self) -> float | None:
        """Standard deviation over the dictionaries; None of one."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Mean, interval, spread, the values and parts."""
        return {
            "method": self.method,
            "words": self.words,
            "k": self.k,
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "spread": self.spread,
            "values": list(self.values),
            "parts": None if self.parts is None else dict(self.parts),
        }

    def cells(self) -> tuple[str, str]:
        """Value with its interval, and spread, for people."""
        ends = "" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.value:.3f}{ends}", "" if self.spread is None else f"{self.spread:.3f}"


@dataclass(frozen=True)
class ConceptScores:
    """A metric on one concept. note: what to know before it is believed."""

    metric: str
    concept: str
    n_train: int
    n_test: int
    lines: tuple[ScoreLine, ...]
    note: str = ""

    def __getitem__(self, key: str | tuple[str, int]) -> ScoreLine:
        """The line of a method, or of a method and k. Raises KeyError."""
        method, k = (key, None) if isinstance(key, str) else key
        for line in self.lines:
            if line.method == method and k in (None, line.k):
                return line
        raise KeyError(key)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, text and numbers."""
        return {
            "metric": self.metric,
            "concept": self.concept,
            "n_train": self.n_train,
            "n_test": self.n_test,
            "note": self.note,
            "lines": [line.to_json() for line in self.lines],
        }

    def __repr__(self) -> str:
        rows = []
        for line in self.lines:
            value, spread = line.cells()
            k = "" if line.k is None else f" k={line.k}"
            rows.append(f"  {line.method}{k}: {value}{f', spread {spread}' if spread else ''}")
        return "\n".join([f"{self.metric} on {self.concept} ({self.n_train} + {self.n_test} texts)", *rows])

    def _repr_html_(self) -> str:
        head = "<tr><th></th><th>k</th><th>value [95 %]</th><th>spread over seeds</th></tr>"
        rows = "".join(_row(line) for line in self.lines)
        caption = html.escape(f"{self.metric} on {self.concept}. {self.note}")
        return f"<table><caption>{caption}</caption>{head}{rows}</table>"


def _row(line: ScoreLine) -> str:
    cells = "".join(f"<td>{cell}</td>" for cell in ("" if line.k is None else line.k, *line.cells()))
    return f"<tr><th title='{html.escape(line.words, quote=True)}'>{html.escape(line.method)}</th>{cells}</tr>"


def line_of_texts(
    method: str,
    words: str,
    values: Sequence[Floats],
    groups: Sequence[str],
    *,
    k: int | None = None,
    labels: Sequence[str] = (),
    share: bool = True,
) -> ScoreLine:
    """A line from values per text that was tested on, [text] for each dictionary; texts of a group are not independent.

    labels: [text], the target of each, for the parts. share: values are 0 or 1, or means of such.
    """
    each = np.mean(values, axis=0)
    own = tuple(float(np.mean(of)) for of in values)
    names = list(dict.fromkeys(labels))
    of_label = np.array(labels)
    parts = {name: float(each[of_label == name].mean()) for name in names} if len(names) > 1 else None
    return ScoreLine(method, words, own, share_of(method, each, groups, share=share), k, parts)


def share_of(name: str, each: Floats, groups: Sequence[str], *, share: bool = True) -> Measurement:
    """The mean of values [text], such as whether each was predicted rightly, with an interval over groups."""
    low, high = _interval(each, groups, share)
    return Measurement(
        name=name,
        values=tuple(each.tolist()),
        estimate=float(np.mean(each)),
        low=low,
        high=high,
        n=len(each),
        n_groups=len(set(groups)),
        groups={"group": tuple(groups)},
    )


def line_of_dictionaries(
    method: str,
    words: str,
    values: Sequence[float],
    *,
    k: int | None = None,
    parts: Mapping[str, float] | None = None,
) -> ScoreLine:
    """A line from one value per dictionary, without an interval."""
    n = len(values)
    estimate = float(np.mean(values))
    measurement = Measurement(
        name=method, values=tuple(values), estimate=estimate, low=None, high=None, n=n, n_groups=n
    )
    return ScoreLine(method, words, tuple(values), measurement, k, parts)


def _interval(each: Floats, groups: Sequence[str], share: bool) -> tuple[float | None, float | None]:
    """By clustered t over groups; exact for counts when all are independent, or all values are one."""
    # A t interval of values that are all 0 or all 1 has no width; the exact one of a count has.
    n, counted = len(each), share and (len(set(groups)) == len(each) or float(np.ptp(each)) == 0)
    if counted:
        low, high = clopper_pearson(round(float(each.sum())), n)
        return min(low, float(each.mean())), max(high, float(each.mean()))
    if n < 2 or len(set(groups)) < 2:
        return None, None
    test = clustered_t(each, list(groups))
    return (max(test.low, 0.0), min(test.high, 1.0)) if share else (test.low, test.high)
