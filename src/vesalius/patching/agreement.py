"""How estimated effects agree with measured ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

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
    rank_per_example: Float[Tensor, " example"]
    """Spearman's rank correlation for each example."""

    def __repr__(self) -> str:
        single = f"{float(self.per_example.nanmedian()):.2f} within one example (median)"
        return f"Agreement(pearson {self.pearson:.2f}, {single}; sign {self.sign:.2f}; error {self.error:.2g})"


def agreement(
    estimated: Float[Tensor, "cell example"],
    measured: Float[Tensor, "cell example"],
    keep: Bool[Tensor, "cell example"],
    shape: Sequence[int],
) -> Agreement:
    """Of effects in double precision, where `keep` is True. shape: [example], only examples of one are averaged."""
    found, true = (torch.where(keep, values, 0.0) for values in (estimated, measured))
    large = keep & (true.abs() > LARGE * true.abs().max())
    shapes = torch.tensor(shape)
    means: tuple[list[Tensor], list[Tensor]] = ([], [])
    for one in shapes.unique():
        here = keep[:, shapes == one]
        for values, listed in zip((found, true), means, strict=True):
            listed.append((values[:, shapes == one].sum(1) / here.sum(1))[here.any(1)])
    columns = [(found[keep[:, row], row], true[keep[:, row], row]) for row in range(keep.shape[1])]
    return Agreement(
        pearson=_pearson(torch.cat(means[0]), torch.cat(means[1])),
        per_example=torch.tensor([_pearson(*both) for both in columns], dtype=torch.float64),
        sign=float((found.sign() == true.sign())[large].double().mean()) if bool(large.any()) else float("nan"),
        error=float((found - true).abs().max()),
        rank_per_example=torch.tensor(
            [_pearson(_ranks(one), _ranks(two)) for one, two in columns], dtype=torch.float64
        ),
    )


def _ranks(values: Float[Tensor, " cell"]) -> Float[Tensor, " cell"]:
    """Equal values share the mean of their ranks."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0)
    return ((last - count + last - 1).double() / 2)[place]


def _pearson(one: Tensor, other: Tensor) -> float:
    """Correlation; NaN when one of them does not vary."""
    if len(one) < 2 or float(one.std()) == 0 or float(other.std()) == 0:
        return float("nan")
    return float(torch.corrcoef(torch.stack([one, other]))[0, 1])
