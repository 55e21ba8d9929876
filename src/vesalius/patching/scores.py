"""Scores: what a sweep measured, per example."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vesalius.errors import InputError
from vesalius.patching.cost import Cost

PROMPTS = ("corrupted", "clean")
LARGE = 0.1


@dataclass(frozen=True, eq=False, repr=False)
class Agreement:
    """Estimated against measured effects. One average hides much: see `per_example`."""

    pearson: float
    """Correlation over cells of the mean effects."""
    per_example: Float[Tensor, " example"]
    """The same for each example."""
    sign: float
    """Share of large effects (over a tenth of the largest) that have the right sign; NaN without any."""
    error: float
    """Largest difference of any cell and example."""

    def __repr__(self) -> str:
        single = f"{float(self.per_example.nanmedian()):.2f} within one example (median)"
        return f"Agreement(pearson {self.pearson:.2f}, {single}; sign {self.sign:.2f}; error {self.error:.2g})"


def _pearson(one: Tensor, other: Tensor) -> float:
    """Correlation; NaN when one of them does not vary."""
    if len(one) < 2 or float(one.std()) == 0 or float(other.std()) == 0:
        return float("nan")
    return float(torch.corrcoef(torch.stack([one, other]))[0, 1])


@dataclass(frozen=True, eq=False)
class Scores:
    """What a sweep measured; nothing is averaged."""

    values: Float[Tensor, "site *each example"]
    """The metric of each edited run: [site, position|head, example], or [site, example] with each=None."""
    base: Float[Tensor, " example"]
    """The metric without an edit, on the prompts that were edited."""
    source: Float[Tensor, " example"]
    """The metric of the other prompts, where patched values come from."""
    mask: Bool[Tensor, "site *each example"]
    """False on cells past an example's length; `values` holds `base` there."""
    cost: Cost
    sites: tuple[str, ...]
    each: str | None
    edit: str
    metric: str
    unit: str
    prompts: str
    """The prompts that were edited: `corrupted` or `clean`."""
    error: float | None = None
    """Largest difference from plain float32 runs among the cells that were run again; None when none was."""
    compute: str = "float32"

    @property
    def effects(self) -> Float[Tensor, "site *each example"]:
        """Change of the metric by the edit."""
        return self.values - self.base

    @property
    def mean(self) -> Float[Tensor, site * each]:
        """Mean effect over the examples that reach the cell; NaN where none does."""
        return (self.effects * self.mask).sum(-1) / self.mask.sum(-1)

    def against(self, measured: Scores) -> Agreement:
        """How these effects (estimates, or rounded ones) agree with measured ones.

        Raises InputError for scores of other cells or examples.
        """
        if self.values.shape != measured.values.shape or (self.sites, self.each) != (measured.sites, measured.each):
            raise InputError(
                f"scores of {self.values.shape[0]} sites, each {self.each}, {tuple(self.values.shape)} cannot be held "
                f"against {measured.values.shape[0]} sites, each {measured.each}, {tuple(measured.values.shape)}"
            )
        keep = (self.mask & measured.mask).flatten(0, -2)
        pairs = [(s.flatten(0, -2).double(), keep) for s in (self.effects, measured.effects)]
        found, true = (torch.where(keep, values, 0.0) for values, keep in pairs)
        large = keep & (true.abs() > LARGE * true.abs().max())
        means = [values.sum(-1) / keep.sum(-1).clamp_min(1) for values in (found, true)]
        columns = [(found[keep[:, row], row], true[keep[:, row], row]) for row in range(keep.shape[1])]
        single = torch.tensor([_pearson(*both) for both in columns], dtype=torch.float64)
        return Agreement(
            pearson=_pearson(*means), per_example=single,
            sign=float((found.sign() == true.sign())[large].double().mean()) if bool(large.any()) else float("nan"),
            error=float((found - true).abs().max()),
        )  # fmt: skip

    def __repr__(self) -> str:
        shape = ", ".join(f"{name} {size}" for name, size in zip(self._axes, self.values.shape, strict=True))
        told = (
            f"; {self.compute}, error {self.error:.2g} {self.unit}" if self.error and self.compute != "float32" else ""
        )
        return f"Scores({self.edit} on {self.prompts} prompts, {self.metric}: {shape}; {self.cost.describe()}{told})"

    @property
    def _axes(self) -> tuple[str, ...]:
        return ("site", *([self.each] if self.each else []), "example")

    def _repr_html_(self) -> str:
        """A heat table of mean effects: sites down, positions or heads across."""
        table = self.mean if self.each else self.mean[:, None]
        top = float(table.nan_to_num().abs().max()) or 1.0
        heads = "".join(f"<th>{column}</th>" for column in range(table.shape[1])) if self.each else "<th>effect</th>"
        rows = "".join(
            f"<tr><th style='text-align:left'>{escape(site)}</th>{''.join(_cell(float(v), top) for v in row)}</tr>"
            for site, row in zip(self.sites, table, strict=True)
        )
        what = f"{self.edit} on {self.prompts} prompts, each {self.each or 'site'}"
        title = escape(f"Mean change of {self.metric} ({self.unit}): {what}")
        return (
            f"<table><caption>{title}</caption><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table>"
            f"<p>{escape(self.cost.describe())}</p>"
        )


def _cell(value: float, top: float) -> str:
    if value != value:
        return "<td></td>"
    # Blue raises the metric, red lowers it; the number is there for those who do not see colours.
    tint = "33,102,172" if value >= 0 else "178,24,43"
    return f"<td style='text-align:right;background:rgba({tint},{min(abs(value) / top, 1) * 0.6:.3f})'>{value:.2f}</td>"
