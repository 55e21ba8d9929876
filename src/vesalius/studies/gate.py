"""The gate: does the model do the task at all, overall and per template, before anything is taken apart.

The thresholds are fixed here, before any patching. Templates below theirs are left out on discovery. The validation
split's prompts are all used, whatever the model answers there: leaving some out would choose the test data by their
outcome.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vesalius.inputs import Pairs
from vesalius.metric import logit_diff, wide
from vesalius.model import Model
from vesalius.stats import Measurement, measure

PREFERENCE = 0.7
TEMPLATE_PREFERENCE = 0.5
# Fewer prompts than this cannot be clustered or split any further.
FEWEST_ROWS = 4
NO_TEMPLATE = "(no template given)"
# Full-vocabulary logits are large: so many prompts at a time.
_TOGETHER = 8


@dataclass(frozen=True)
class TemplateRow:
    """One template: share of prompts whose answer beats the distractor, share whose answer comes first of all tokens,
    and the mean logit difference. passed: None on validation, where no template is chosen."""

    template: str
    split: str
    n: int
    preference: float
    top1: float
    logit_diff: float
    passed: bool | None
    used: bool

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True, eq=False)
class Gate:
    """How well the model does the task on one split's clean prompts.

    preference: share whose answer has a higher logit than the distractor. top1: share whose answer is the likeliest of
    all tokens. answer_probability, answer_rank (1 is first; the estimate is the median): of the answer, at the read
    position.
    """

    labels: tuple[str, ...]
    templates: tuple[TemplateRow, ...]
    preference: Measurement
    top1: Measurement
    logit_diff: Measurement
    answer_probability: Measurement
    answer_rank: Measurement

    @property
    def passed(self) -> bool:
        enough = len(self.rows) >= FEWEST_ROWS
        return self.preference.estimate >= PREFERENCE and self.logit_diff.estimate > 0 and enough

    @property
    def rows(self) -> list[int]:
        """Examples of templates that passed; all of them where none is chosen."""
        good = {row.template for row in self.templates if row.passed is not False}
        return [number for number, label in enumerate(self.labels) if label in good]

    @property
    def used(self) -> list[int]:
        """Examples that a study goes on with: of templates that passed, or all when too few did (past the gate)."""
        return self.rows if len(self.rows) >= FEWEST_ROWS else list(range(len(self.labels)))

    def to_json(self) -> dict[str, Any]:
        names = ("preference", "top1", "logit_diff", "answer_probability", "answer_rank")
        return {
            "passed": self.passed,
            "thresholds": {"preference": PREFERENCE, "template_preference": TEMPLATE_PREFERENCE},
            **{name: estimate(getattr(self, name)) for name in names},
        }

    def _repr_html_(self) -> str:
        words = {
            "answer preferred to the distractor": f"{self.preference.estimate:.0%}",
            "answer first of all tokens": f"{self.top1.estimate:.0%}",
            "probability of the answer": f"{self.answer_probability.estimate:.2f}",
            "rank of the answer, median": f"{self.answer_rank.estimate:.0f}",
            "logit difference": f"{self.logit_diff.estimate:+.2f}",
        }
        rows = "".join(f"<tr><th>{escape(name)}</th><td>{value}</td></tr>" for name, value in words.items())
        return f"<table><caption>{'passed' if self.passed else 'not passed'}</caption>{rows}</table>"


def estimate(measured: Measurement) -> dict[str, Any]:
    """Estimate, interval and n of a measurement."""
    return {name: getattr(measured, name) for name in ("estimate", "low", "high", "n")}


def gate(model: Model, pairs: Pairs, split: str = "discovery") -> Gate:
    """Run the clean prompts and compare with the thresholds. split: templates are chosen on discovery only."""
    found: dict[str, NDArray[np.float64]] = _measured(model, pairs)
    groups, clusters = pairs.groups, pairs.clusters
    made = {name: measure(name, values, groups=groups, clusters=clusters) for name, values in found.items()}
    for name in ("preference", "top1", "answer_probability"):
        made[name] = _within(made[name], 0.0, 1.0)
    median = float(np.median(found["answer_rank"]))
    made["answer_rank"] = replace(made["answer_rank"], estimate=median, low=None, high=None)
    labels = tuple(pairs.groups.get("template", (NO_TEMPLATE,) * len(pairs)))
    rows = tuple(_template(template, split, labels, found) for template in dict.fromkeys(labels))
    result = Gate(labels, rows, **made)
    used = {labels[number] for number in result.used}
    return replace(result, templates=tuple(replace(row, used=row.template in used) for row in rows))


def _template(
    template: str, split: str, labels: tuple[str, ...], found: Mapping[str, NDArray[np.float64]]
) -> TemplateRow:
    here = np.array([label == template for label in labels])
    mean = {name: float(values[here].mean()) for name, values in found.items()}
    # Half right is chance: a template has to do better than that.
    passed = mean["preference"] > TEMPLATE_PREFERENCE if split == "discovery" else None
    return TemplateRow(
        template, split, int(here.sum()), mean["preference"], mean["top1"], mean["logit_diff"], passed, True
    )


def _measured(model: Model, pairs: Pairs) -> dict[str, NDArray[np.float64]]:
    """Per example, by name."""
    found: dict[str, list[torch.Tensor]] = {}
    for first in range(0, len(pairs), _TOGETHER):
        some = pairs.subset(range(first, min(first + _TOGETHER, len(pairs))))
        values = _of_sequences(model, some) if some.several else _of_tokens(model, some)
        for name, of in values.items():
            found.setdefault(name, []).append(of.double().cpu())
    return {name: torch.cat(listed).numpy() for name, listed in found.items()}


def _of_tokens(model: Model, pairs: Pairs) -> dict[str, torch.Tensor]:
    logits = model.run(pairs.tokens("clean")).logits
    end = wide(logits[torch.arange(len(pairs)), pairs.read_at()])
    index = pairs.answer[:, None].to(end.device)
    answer, difference = end.gather(1, index), logit_diff(logits, pairs)
    return {
        "preference": difference > 0,
        "top1": (end <= answer).all(1),
        "logit_diff": difference,
        "answer_probability": end.softmax(-1).gather(1, index)[:, 0],
        "answer_rank": 1 + (end > answer).sum(1),
    }


def _of_sequences(model: Model, pairs: Pairs) -> dict[str, torch.Tensor]:
    """Teacher-forced: whether all tokens come first, the probability of all of them, and the first one's rank."""
    rows, _, fold = logit_diff.rows_of(pairs)
    assert rows.targets is not None
    logits = model.run(rows.tokens("clean")).logits
    read = wide(logits[torch.arange(len(rows))[:, None], rows.reads])
    targets = rows.targets.to(read.device)
    own = read.gather(-1, targets.clamp_min(0)[..., None])
    each = (own - read.logsumexp(-1, keepdim=True))[..., 0]
    logprob = (each * (targets >= 0)).sum(1)
    first = ((read <= own).all(-1) | (targets < 0)).all(1)
    n = len(pairs)
    return {
        "preference": fold(logprob) > 0,
        "top1": first[:n],
        "logit_diff": fold(logprob),
        "answer_probability": logprob[:n].exp(),
        "answer_rank": 1 + (read[:n, 0] > own[:n, 0]).sum(1),
    }


def _within(measured: Measurement, least: float, most: float) -> Measurement:
    """With an interval that is cut off where the figure cannot be."""
    assert measured.low is not None and measured.high is not None
    return replace(measured, low=max(measured.low, least), high=min(measured.high, most))
