"""Where a rule about a part is wrong on fresh texts, and which other rules do as well there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from vesalius.describe.example import Example
from vesalius.inputs import Corpus
from vesalius.inputs.beginning import speller
from vesalius.parts import Part
from vesalius.quantities import FIRES_WHERE, Runs
from vesalius.quantities.activation import counted, token_values
from vesalius.quantities.fires_where import picked
from vesalius.quantities.rules import Rule, in_words
from vesalius.stats import measure

SHOWN, BEFORE, AFTER = 6, 24, 7
"""Counterexamples of each kind that are kept, and tokens around them."""


def counterexamples(runs: Runs, part: Part, rule: Rule, threshold: float) -> dict[str, Any]:
    """Tokens of a corpus that break a rule about a part, and how many there are.

    fires: tokens where the part is above the threshold; picked: those that the rule picks; both. silent: examples that
    are picked where the part is lowest; unexplained: those that are not, where it is highest; one of each context.
    """
    values, here = token_values(runs, [part])[0], picked(runs, rule)
    fires = (values > threshold) & counted(runs)
    return {
        "tokens": int(counted(runs).sum()),
        "fires": int(fires.sum()),
        "picked": int(here.sum()),
        "both": int((fires & here).sum()),
        "silent": [asdict(one) for one in _worst(runs, -values, values, here & ~fires)],
        "unexplained": [asdict(one) for one in _worst(runs, values, values, fires & ~here)],
    }


def _worst(runs: Runs, key: Tensor, values: Tensor, among: Tensor) -> list[Example]:
    most, at = key.masked_fill(~among, -torch.inf).max(1)
    rows = [row for row in most.argsort(descending=True).tolist()[:SHOWN] if bool(among[row].any())]
    return [_example(runs, values, row, int(at[row])) for row in rows]


def documents_of(runs: Runs) -> list[int]:
    """The number of each text's document: the one that its label ends with ("discovery 17"), else a new one for each
    label; texts without groups are documents of their own."""
    labels = runs.groups.get("document", tuple(map(str, range(runs.n))))
    ends = [label.rpartition(" ")[2] for label in labels]
    if all(end.isdigit() for end in ends):
        return list(map(int, ends))
    known = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return [known[label] for label in labels]


def _example(runs: Runs, values: Tensor, row: int, at: int) -> Example:
    assert isinstance(runs.data, Corpus)
    tokens = runs.data.tokens
    first, last = max(1, at - BEFORE), min(int(tokens.lengths[row]), at + AFTER + 1)
    ids = tokens.ids[row, first:last].tolist()
    return Example(
        value=float(values[row, at]),
        tokens=tuple(map(speller(runs.model.tokenizer), ids)),
        ids=tuple(ids),
        values=tuple(values[row, first:last].tolist()),
        at=at - first,
        document=documents_of(runs)[row],
        offset=at,
    )


def rivals(runs: Runs, part: Part, rule: Rule, others: Sequence[Rule]) -> list[dict[str, Any]]:
    """How much more a part fires where a rule picks than where each of some others does, on the same texts.

    Differences of `fires_where` text by text, with a 95 % interval; told_apart: whether the other is worse. Those that
    are not belong to the description as a set: nothing says which of them is the right one.
    """
    own = FIRES_WHERE.measure(runs, part, {"rule": rule})
    found = []
    for other in others:
        less = own - FIRES_WHERE.measure(runs, part, {"rule": other})
        difference = measure("difference", less.double().numpy(), groups=runs.groups, clusters=runs.clusters)
        interval = {"difference": difference.estimate, "low": difference.low, "high": difference.high}
        found.append({"rule": other, "words": in_words(other), **interval, "told_apart": (difference.low or 0.0) > 0})
    return found
