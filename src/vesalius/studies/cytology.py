"""The patients of the medical case: who is of which hospital, the scanner's mark, and the network that is studied.

The measurements and diagnoses are those of the Wisconsin cytology data (Street, Wolberg and Mangasarian 1993).
Hospitals and mark are made up: at home the mark goes with malignancy, elsewhere every image has it. Nothing here is
medical advice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vesalius.data import builtin_table
from vesalius.inputs import Table
from vesalius.inputs.table import DISCOVERY, VALIDATION
from vesalius.interpretable import Fitted, fit_mlp
from vesalius.seeds import generator_for
from vesalius.site import Site

ELSEWHERE = "elsewhere"
MARK = "scanner mark"
CONCEPTS: Mapping[str, tuple[str, ...]] = {
    "size": ("mean radius", "mean perimeter", "mean area"),
    "irregularity": ("mean compactness", "mean concavity", "mean concave points"),
    "texture": ("mean texture", "mean smoothness"),
}
"""What a pathologist looks at in the nuclei, as groups of columns."""
AT_HOME = 0.99
"""Share of patients at home whose mark goes with the diagnosis."""
SIZES = {DISCOVERY: 140, VALIDATION: 180}
"""Patients; all others are of the other hospital."""
HIDDEN = Site("module", module="hidden.0")
WIDTH, STEPS, DECAY = 16, 200, 0.1
FIRST = 1
"""Added to seeds: of the first draws of patients this is the one that the page begins with, since its repair is clear.
docs/medical.md says how often it is."""


@dataclass(frozen=True, eq=False)
class Shortcut:
    """The question, with the patients; planted: whether the mark goes with malignancy at home."""

    table: Table
    seed: int = 0
    planted: bool = True
    name: str = "shortcut"

    @property
    def text(self) -> str:
        """The question in words."""
        return "Does a network that tells malignant from benign use what pathologists use, or a mark of the scanner?"

    def plan(self) -> dict[str, Any]:
        """What the question is, for hashing."""
        return {"table": self.table.content_hash, "seed": self.seed, "planted": self.planted, "name": self.name}


def shortcut_question(seed: int = 0, *, planted: bool = True) -> Shortcut:
    """The case. seed: for who is of which hospital, the mark, and the network's first weights. planted: False leaves
    the mark without any connection at home, a control on which nothing should be found."""
    whole = builtin_table("breast_cancer")
    columns = whole.columns[:10]
    generator = generator_for("patients", seed + FIRST)
    order = torch.randperm(len(whole), generator=generator)
    ends = np.cumsum(list(SIZES.values()))
    splits = np.array([DISCOVERY, VALIDATION, ELSEWHERE])[np.searchsorted(ends, np.arange(len(whole)), side="right")]
    target = whole.target[order]
    with_it = torch.rand(len(whole), generator=generator) < AT_HOME
    coin = torch.rand(len(whole), generator=generator) < 0.5
    home = torch.from_numpy(splits != ELSEWHERE)
    marked = torch.where(home, (with_it == target.bool()) if planted else coin, True)
    shade = 0.5 + 0.25 * (2.0 * marked - 1) + 0.075 * torch.randn(len(whole), generator=generator)
    values = torch.cat([whole.values[order][:, :10], shade[:, None]], 1)
    labels = {MARK: tuple("marked" if one else "clean" for one in marked.tolist())}
    patients = tuple(f"patient {number}" for number in order.tolist())
    table = Table(
        values, (*columns, MARK), target, whole.classes, labels, {"patient": patients}, tuple(splits), "cytology"
    )
    return Shortcut(_with_concepts(table), seed, planted)


def _with_concepts(table: Table) -> Table:
    """Labels large or small of every concept: over or under the median of its standardised columns on discovery."""
    own = torch.tensor([split == DISCOVERY for split in table.splits])
    rows = (table.values - table.values[own].mean(0)) / table.values[own].std(0)
    labels = dict(table.labels)
    for name, columns in CONCEPTS.items():
        level = rows[:, [table.column(one) for one in columns]].mean(1)
        high = level > level[own].median()
        labels[name] = tuple("large" if one else "small" for one in high.tolist())
    return replace(table, labels=labels)


def network_of(asked: Shortcut) -> Fitted:
    """The network that the study is about, fitted to the discovery patients."""
    return fit_mlp(asked.table.split(DISCOVERY), hidden=(WIDTH,), steps=STEPS, decay=DECAY, seed=asked.seed + FIRST)


def marked(table: Table) -> Bool[Tensor, " row"]:
    return torch.tensor([one == "marked" for one in table.label(MARK)])


def marked_as(table: Table, with_it: bool) -> Float[Tensor, "row column"]:
    """The same patients, all with the mark as it is on average where it is, or where it is not."""
    values = table.values.clone()
    values[:, -1] = values[marked(table) == with_it, -1].mean()
    return values
