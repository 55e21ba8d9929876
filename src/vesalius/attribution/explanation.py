"""Explanation: what each feature of one input has contributed to a number, by one method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.attribution.question import ALWAYS, Question
from vesalius.errors import InputError
from vesalius.jobs.frames import data_frame

if TYPE_CHECKING:
    import pandas

SHOWN = 12


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """values: of every element of the input, in its shape. method, options, seed: how; signed: whether a positive value
    speaks for a higher number (else only sizes mean something). complete: whether the method promises that the values
    add up to the change from the baseline."""

    question: Question
    values: Float[Tensor, "*any"]
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    signed: bool = True
    complete: bool = False

    @cached_property
    def shares(self) -> Float[Tensor, " feature"]:
        """Of each feature: the sum over its elements."""
        return self.question.shares(self.values)

    @property
    def names(self) -> tuple[str, ...]:
        return self.question.names

    @property
    def gap(self) -> float:
        """Completeness gap: the change from the baseline less the sum of all values."""
        kept = self.values[self.question.features.to(self.values.device) != ALWAYS]
        return self.question.value - self.question.at_baseline - float(kept.double().sum())

    @property
    def relative_gap(self) -> float:
        """Size of the gap over that of the change from the baseline, or of all shares together if that is larger."""
        whole = max(abs(self.question.value - self.question.at_baseline), float(self.shares.abs().sum()))
        return abs(self.gap) / max(whole, 1e-12)

    @property
    def order(self) -> tuple[int, ...]:
        """Features, those that speak most for the change from the baseline first; of sizes, the largest first."""
        falls = self.signed and self.question.value < self.question.at_baseline
        return tuple((-self.shares if falls else self.shares).argsort(descending=True, stable=True).tolist())

    def __len__(self) -> int:
        return len(self.question)

    def __repr__(self) -> str:
        first = ", ".join(f"{self.names[n]} {float(self.shares[n]):+.3g}" for n in self._largest[:3])
        return f"Explanation({self.question.target}, {self.method}; {first}{', ...' if len(self) > 3 else ''})"

    @property
    def _largest(self) -> list[int]:
        return self.shares.abs().argsort(descending=True, stable=True).tolist()

    def to_frame(self) -> pandas.DataFrame:
        """One row per feature: feature, share. Raises InputError where pandas is not installed."""
        return data_frame(
            [{"feature": name, "share": float(one)} for name, one in zip(self.names, self.shares, strict=True)]
        )

    def _repr_html_(self) -> str:
        top = float(self.shares.abs().max()) or 1.0
        rows = "".join(
            f"<tr><td>{escape(self.names[n])}</td><td>{float(self.shares[n]):+.3g}</td><td>"
            f"<div style='height:.7em;width:{120 * abs(float(self.shares[n])) / top:.0f}px;background:"
            f"{'#c2570c' if float(self.shares[n]) >= 0 else '#2166ac'}'></div></td></tr>"
            for n in self._largest[:SHOWN]
        )
        more = f"<p>and {len(self) - SHOWN} more</p>" if len(self) > SHOWN else ""
        return (
            f"<h3>{escape(self.question.target)}: {self.question.value:.3g}</h3><p>{escape(self.method)}; with every "
            f"feature absent {self.question.at_baseline:.3g} ({escape(self.question.baseline)})</p>"
            f"<table>{rows}</table>{more}"
        )


def same_question(explanations: list[Explanation]) -> None:
    """Raises InputError for explanations that do not compare."""
    first = explanations[0].question
    for one in explanations[1:]:
        other = one.question
        alike = first.names == other.names and first.target == other.target and first.x.shape == other.x.shape
        if not alike or not torch.equal(first.x, other.x):
            raise InputError(f"explanations of {first.target} and {other.target}, or of other inputs, do not compare")
