"""The gate: does the model do the task at all, overall and per template, before anything is taken apart.

The thresholds are fixed here, before any patching. Prompts of a template below its gate are left out of everything that
follows, in both splits, by this rule alone; they stay in the report as failed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vesalius.circuits.effects import clusters_of
from vesalius.inputs import Pairs
from vesalius.metric import logit_diff
from vesalius.model import Model
from vesalius.stats import clustered_t

ACCURACY = 0.7
TEMPLATE_ACCURACY = 0.5
# Fewer prompts than this cannot be clustered or split any further.
FEWEST_ROWS = 4
NO_TEMPLATE = "(no template given)"


@dataclass(frozen=True)
class TemplateRow:
    """One template: share of prompts whose answer beats the distractor, and the mean logit difference."""

    template: str
    split: str
    n: int
    accuracy: float
    logit_diff: float
    passed: bool

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True, eq=False)
class Gate:
    """How well the model does the task on one split's clean prompts. values: [example] logit differences."""

    values: NDArray[np.float64]
    labels: tuple[str, ...]
    templates: tuple[TemplateRow, ...]
    accuracy: dict[str, float]
    logit_diff: dict[str, float]

    @property
    def passed(self) -> bool:
        return (
            self.accuracy["estimate"] >= ACCURACY and self.logit_diff["estimate"] > 0 and len(self.rows) >= FEWEST_ROWS
        )

    @property
    def rows(self) -> list[int]:
        """Examples of templates that passed."""
        good = {row.template for row in self.templates if row.passed}
        return [number for number, label in enumerate(self.labels) if label in good]


def gate(model: Model, pairs: Pairs, split: str) -> Gate:
    """Run the clean prompts and hold them against the thresholds."""
    values = np.concatenate(
        [logit_diff(model.run(part.tokens("clean")).logits, part).double().numpy() for part in _parts(pairs)]
    )
    labels = tuple(pairs.groups.get("template", (NO_TEMPLATE,) * len(pairs)))
    groups = clusters_of(pairs)
    rows = []
    for template in dict.fromkeys(labels):
        here = values[[label == template for label in labels]]
        accuracy = float((here > 0).mean())
        # Half right is chance: a template has to do better than that.
        rows.append(TemplateRow(template, split, len(here), accuracy, float(here.mean()), accuracy > TEMPLATE_ACCURACY))
    return Gate(
        values, labels, tuple(rows), _figure((values > 0).astype(float), groups, 0.0, 1.0), _figure(values, groups)
    )


def _parts(pairs: Pairs, size: int = 8) -> list[Pairs]:
    """A few prompts at a time: full-vocabulary logits are large."""
    return [pairs.subset(range(first, min(first + size, len(pairs)))) for first in range(0, len(pairs), size)]


def _figure(
    values: NDArray[np.float64], groups: tuple[tuple[str, ...], ...], least: float = -np.inf, most: float = np.inf
) -> dict[str, float]:
    """Mean with a clustered interval, cut off where the figure cannot be."""
    test = clustered_t(values, *groups)
    return {"estimate": test.estimate, "low": max(test.low, least), "high": min(test.high, most), "n": test.n}
