"""How a mean over groups is weighted, and the variance of it: one design for any number of variables.

The estimand is the mean over groups in which each counts once, however many examples were drawn from it: an example of
a group of n weighs 1 / (G n). A template that happens to hold half of the prompts is then worth no more than another,
and with one clustering everything is the t-test of the G group means, which keeps its level when some means are surer
than others (Bakirov & Szekely 2005; Ibragimov & Mueller 2010).

Two examples are taken to be dependent when they share a group of any clustering. A label may name several groups,
joined by "|": "Mary|John" shares one with every prompt about Mary and with every prompt about John.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vesalius.errors import InputError
from vesalius.stats.arrays import Floats, Labels, at_least_two, group

Codes = NDArray[np.intp]
_ROWS = 800  # examples from which degrees of freedom are worked out; more are thinned out evenly


@dataclass(frozen=True)
class _Sums:
    """Sums of examples `rows` between `starts`: one column of each group; the squares count `factor [column]` times."""

    rows: Codes
    starts: Codes
    factor: Floats

    def of(self, table: Floats) -> Floats:
        sums = np.add.reduceat(table[:, self.rows], self.starts, axis=1)
        return np.asarray((sums**2) @ self.factor)


@dataclass(frozen=True)
class Design:
    """Weights and dependence of examples. `groups`: of the first clustering. `df`: degrees of freedom of `variance`.

    `effective_groups` is df + 1: how many independent groups, all alike, would say as much.
    """

    weights: Floats
    groups: int
    smallest: int
    df: float
    factor: float
    parts: tuple[tuple[_Sums, ...], ...]
    both: tuple[_Sums, ...]

    @property
    def effective_groups(self) -> float:
        return self.df + 1

    def variance(self, table: Floats) -> Floats:
        """Variance of the weighted mean of each row of `table [variable, example]`, `[variable]`.

        The sum over all pairs of examples that share a group of their weighted residuals' products (Cameron, Gelbach &
        Miller 2011, eq. 2.11, and for labels of two names Aronow, Samii & Assenova 2015), never below that of one
        clustering alone, times a factor that makes it unbiased if groups of every kind differ (Bell & McCaffrey 2002).
        """
        shares = (table - (table @ self.weights)[:, None]) * self.weights
        parts = [_total(part, shares) for part in self.parts]
        found = np.max(parts, axis=0)
        if len(parts) == 2:
            found = np.maximum(found, parts[0] + parts[1] - _total(self.both, shares))
        found = found * self.factor
        # Group sums that happen to agree are no certainty.
        alone = np.sum(shares**2, axis=1) * table.shape[1] / (table.shape[1] - 1)
        return np.where(found > 1e-20 * alone, found, alone)


def design(clusters: tuple[Labels, ...], n: int) -> Design:
    """The design of n examples with up to two clusterings; without any, every example is a group of its own.

    Raises InputError for more than two, for labels of another number, and for a clustering of one group.
    """
    if len(clusters) > 2:
        raise InputError(f"{len(clusters)} clusterings given; at most 2 are supported (template and names)")
    for labels in clusters:
        if len(labels) != n:
            raise InputError(f"{len(labels)} group labels for {n} values; give one label per example")
    return _design(tuple(tuple(labels) for labels in clusters), n)


@lru_cache(maxsize=64)
def _design(clusters: tuple[tuple[Hashable, ...], ...], n: int) -> Design:
    first = at_least_two(group(clusters[0], n)) if clusters else group(range(n), n)
    weights = 1 / (first.count * np.bincount(first.codes)[first.codes])
    kinds = [_members(labels) for labels in clusters]
    for kind in kinds:
        if kind.max() < 1:
            raise InputError("1 group; a clustered statistic needs at least 2 groups (add templates)")
    # Where no two examples share a group there is nothing to respect.
    shared = [kind for kind in kinds if int(kind.max()) + 1 < np.count_nonzero(kind >= 0)]
    smallest = min((int(kind.max()) + 1 for kind in kinds), default=n)
    kinds = shared or [np.arange(n)[:, None]]
    parts = tuple(_sums(kind) for kind in kinds)
    both = _both(*kinds) if len(kinds) == 2 else ()
    if len(kinds) == 1 and kinds[0].shape[1] == 1 and (not shared or int(kinds[0].max()) + 1 == first.count):
        count = first.count
        return Design(weights, count, smallest, count - 1.0, count / (count - 1), parts, both)
    factor, df = _moments(first.codes, kinds)
    factor = max(factor, first.count / (first.count - 1))
    return Design(weights, first.count, smallest, min(df, smallest - 1.0), factor, parts, both)


def _members(labels: tuple[Hashable, ...]) -> Codes:
    """Codes `[example, member]` of the groups that each label names, -1 after the last.

    A group that all examples are in is left out where labels name others: it can't be seen in these data.
    """
    named: list[tuple[Hashable, ...]]
    named = [tuple(dict.fromkeys(label.split("|"))) if isinstance(label, str) else (label,) for label in labels]
    if len(set(labels)) > 1:
        everywhere = set(named[0]).intersection(*named)
        named = [tuple(name for name in names if name not in everywhere) or (names,) for names in named]
    seen: dict[Hashable, int] = {}
    codes = np.full((len(named), max(map(len, named))), -1, dtype=np.intp)
    for row, names in enumerate(named):
        for column, name in enumerate(names):
            codes[row, column] = seen.setdefault(name, len(seen))
    return codes


def _sums(codes: Codes) -> tuple[_Sums, ...]:
    """Sums whose squares add up to the products of all pairs of examples that share a group, each pair once."""
    groups = _grouped(codes, np.ones(len(codes)))
    if codes.shape[1] == 1:
        return (groups,)
    # Examples of the same k groups were counted k times.
    whole = np.unique(np.sort(codes, axis=1), axis=0, return_inverse=True)[1].reshape(-1, 1)
    return groups, _grouped(whole, 1.0 - (codes >= 0).sum(1))


def _both(first: Codes, second: Codes) -> tuple[_Sums, ...]:
    """The same of pairs that share a group of both clusterings."""
    width = int(second.max()) + 1
    joined = np.stack([np.where((a < 0) | (b < 0), -1, a * width + b) for a in first.T for b in second.T], axis=1)
    known, codes = np.unique(joined, return_inverse=True)
    return _sums(codes.reshape(joined.shape) - int(known[0] < 0))


def _grouped(codes: Codes, factor: Floats) -> _Sums:
    rows, columns = np.nonzero(codes >= 0)
    order = np.argsort(codes[rows, columns], kind="stable")
    rows, of = rows[order], codes[rows, columns][order]
    starts = np.flatnonzero(np.diff(of, prepend=-1))
    return _Sums(rows, starts, np.asarray(factor[rows[starts]], dtype=np.float64))


def _total(sums: tuple[_Sums, ...], shares: Floats) -> Floats:
    return np.asarray(sum(each.of(shares) for each in sums))


def _moments(first: Codes, kinds: list[Codes]) -> tuple[float, float]:
    """Factor that makes the variance unbiased, and Satterthwaite's degrees of freedom of it.

    Both under a working model in which every group of every clustering differs by as much as examples do (Imbens &
    Kolesar 2016; Pustejovsky & Tipton 2018): the variance is a quadratic form x' Q x, of mean tr(Q S) and variance
    2 tr(Q S Q S).
    """
    if len(first) > _ROWS:
        kept = np.argsort(first, kind="stable")[np.linspace(0, len(first) - 1, _ROWS).astype(np.intp)]
        first, kinds = first[kept], [kind[kept] for kind in kinds]
    counts = np.bincount(first)
    weights = 1 / (np.count_nonzero(counts) * counts[first])
    shared = [_shared(kind) for kind in kinds]
    related = np.any([count > 0 for count in shared], axis=0) | np.eye(len(first), dtype=bool)
    model = np.eye(len(first)) + sum(shared)
    a = weights[:, None] * related * weights
    ends = a.sum(axis=1)
    q = a - np.outer(ends, weights) - np.outer(weights, ends) + ends.sum() * np.outer(weights, weights)
    qs, variance = q @ model, float(weights @ model @ weights)
    mean = float(np.trace(qs))
    if mean < 1e-6 * variance:  # all examples are related: there is no variance to see
        return 1.0, 1.0
    return max(1.0, variance / mean), max(1.0, mean**2 / float(np.sum(qs * qs.T)))


def _shared(codes: Codes) -> Floats:
    """Number of groups that two examples share, as a share of those that each has, `[example, example]`."""
    shared = np.zeros((len(codes), len(codes)))
    for a in codes.T:
        for b in codes.T:
            shared += (a[:, None] == b[None]) & (a >= 0)[:, None] & (b >= 0)[None]
    of = np.sqrt((codes >= 0).sum(1))
    return np.asarray(shared / np.outer(of, of))
