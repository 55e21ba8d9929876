"""A table of numbers for notebooks: blue raises, red lowers, and the number is there for those who see no colours."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from jaxtyping import Float
from torch import Tensor


def heatmap(title: str, rows: Sequence[str], columns: Sequence[str], values: Float[Tensor, "row column"]) -> str:
    """HTML of a table, coloured by size; NaN is an empty cell."""
    top = float(values.nan_to_num().abs().max()) or 1.0
    heads = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th>{''.join(_cell(value, top) for value in row)}</tr>"
        for name, row in zip(rows, values.tolist(), strict=True)
    )
    head = f"<caption>{escape(title)}</caption><thead><tr><th></th>{heads}</tr></thead>"
    return f"<table>{head}<tbody>{lines}</tbody></table>"


def _cell(value: float, top: float) -> str:
    if value != value:
        return "<td></td>"
    tint = "33,102,172" if value >= 0 else "178,24,43"
    return f"<td style='text-align:right;background:rgba({tint},{min(abs(value) / top, 1) * 0.6:.3f})'>{value:.2f}</td>"
