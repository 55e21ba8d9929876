"""History: what training measured at every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vesalius.errors import FileFormatError

COLUMNS = ("loss", "fvu", "l0", "dead", "lr")
_WIDTH, _HEIGHT, _POINTS = 320, 80, 160


@dataclass(frozen=True, eq=False)
class History:
    """One float per step and column.

    loss: squared error per row in scaled units, plus penalties. fvu: fraction of variance unexplained, of the batch.
    l0: active latents per row. dead: share of latents that fired in none of the last `dead_after` rows, or in none of
    all rows so far, where there were fewer. lr: learning rate.
    """

    columns: Mapping[str, NDArray[np.float64]]

    def __post_init__(self) -> None:
        shapes = {name: np.shape(column) for name, column in self.columns.items()}
        numbers = all(np.asarray(column).dtype.kind in "biuf" for column in self.columns.values())
        if set(shapes) != set(COLUMNS) or len({*shapes.values()}) != 1 or len(shapes["loss"]) != 1 or not numbers:
            raise FileFormatError(
                f"a training history has the columns {', '.join(COLUMNS)}, equally long; got {shapes}"
            )

    def __len__(self) -> int:
        return len(self.columns["loss"])

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        return self.columns[name]

    def last(self, steps: int = 50) -> dict[str, float]:
        """Mean of each column over the last steps."""
        return {name: float(np.mean(values[-steps:])) for name, values in self.columns.items() if len(values)}

    def _repr_html_(self) -> str:
        """Figures of the last steps and a curve of the error."""
        if not len(self):
            return "<p>no steps yet</p>"
        ends = self.last()
        words = f"{len(self):,} steps: fvu {ends['fvu']:.4f}, l0 {ends['l0']:.1f}, silent {ends['dead']:.1%}"
        return f"<p>{words}</p>{_curve(self['fvu'])}"


def _curve(values: NDArray[np.float64]) -> str:
    """An SVG of the values on a logarithmic scale, in at most `_POINTS` means of neighbours."""
    means = np.array([piece.mean() for piece in np.array_split(values, min(len(values), _POINTS))])
    logs = np.log10(np.maximum(means, 1e-6))
    # A flat curve is drawn too.
    low, high = float(logs.min()), float(max(logs.max(), logs.min() + 1e-9))
    across = np.linspace(0, _WIDTH, len(logs))
    down = (high - logs) / (high - low) * (_HEIGHT - 4) + 2
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="fraction of variance unexplained, from {means[0]:.3g} to {means[-1]:.3g}">'
        f"<title>fvu {means[0]:.3g} to {means[-1]:.3g} (log scale)</title>"
        f'<polyline points="{points}" fill="none" stroke="currentColor"/></svg>'
    )
