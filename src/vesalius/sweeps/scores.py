"""Scores: what a sweep measured, per example."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from jaxtyping import Bool, Float
from torch import Tensor

from vesalius.sweeps.cost import Cost

PROMPTS = ("corrupted", "clean")


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
