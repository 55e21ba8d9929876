"""Scores of all texts together, as numbers of single texts, so that intervals and tests apply to them.

What stands for one text is its *pseudo-value*: the score, and what the texts of its group move it by (its influence)
times the number of groups. Their mean over groups is the score, and their spread gives its standard error
(Hampel 1974; for areas under curves that of DeLong et al. 1988, and of groups Obuchowski 1997, Biometrics 53:567).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vesalius.quantities.base import PerExample
from vesalius.quantities.runs import Runs

Score = Callable[[Tensor, Tensor], tuple[float, Tensor, Tensor]]
"""Of positive and negative values the score, and what each positive and each negative one moves it by."""


def groups_of(runs: Runs) -> Sequence[Hashable]:
    """The group of each text; its own number where there are none."""
    return runs.groups[runs.clusters[0]] if runs.clusters else range(runs.n)


def pseudo_values(groups: Sequence[Hashable], score: float, influence: Float[Tensor, " example"]) -> PerExample:
    """For each text the score and what its group moves it by, times the number of groups.

    influence: what each text moves the score by; sums to 0.
    """
    known = {label: number for number, label in enumerate(dict.fromkeys(groups))}
    group = torch.tensor([known[label] for label in groups])
    moves = torch.zeros(len(known)).double().index_add(0, group, influence.double())
    return score + len(known) * moves[group]


def scored(
    groups: Sequence[Hashable],
    values: Float[Tensor, "example ..."],
    positive: Bool[Tensor, "example ..."],
    negative: Bool[Tensor, "example ..."],
    score: Score,
) -> PerExample:
    """Pseudo-values of a score of texts, or of tokens of texts; 0 where there is nothing of one kind."""
    values = values.double()
    both = values[positive], values[negative]
    if not all(map(len, both)):
        return torch.zeros(len(values)).double()
    found, *moved_by = score(*both)
    influence = torch.zeros_like(values)
    influence[positive], influence[negative] = moved_by
    return pseudo_values(groups, found, influence.reshape(len(values), -1).sum(1))


def auroc(positive: Float[Tensor, " m"], negative: Float[Tensor, " n"]) -> tuple[float, Tensor, Tensor]:
    """Area under the ROC curve, less ½, and what each value moves it by."""
    below, above = share_below(negative, positive), 1 - share_below(positive, negative)
    area = float(below.mean())
    return area - 0.5, (below - area) / len(positive), (above - area) / len(negative)


def auprc(positive: Float[Tensor, " m"], negative: Float[Tensor, " n"]) -> tuple[float, Tensor, Tensor]:
    """Average precision less the share of positives, and what each value moves that by: derivatives to its weight."""
    m, n = len(positive), len(negative)
    ordered = positive.sort().values
    hits = m - torch.searchsorted(ordered, ordered).double()
    wrong = n - torch.searchsorted(negative.sort().values, ordered).double()
    precision, share = hits / (hits + wrong), m / (m + n)
    mean = float(precision.mean())
    up, down = (torch.nn.functional.pad((x / (hits + wrong) ** 2 / m).cumsum(0), (1, 0)) for x in (wrong, hits))
    at = torch.searchsorted(ordered, positive, right=True)
    own = (precision[torch.searchsorted(ordered, positive)] - mean) / m + up[at] - (1 - share) / (m + n)
    others = share / (m + n) - down[torch.searchsorted(ordered, negative, right=True)]
    return mean - share, own, others


def auprc_balanced(positive: Float[Tensor, " m"], negative: Float[Tensor, " n"]) -> tuple[float, Tensor, Tensor]:
    """Average precision, less ½, where all positives together weigh as much as all negatives; and what each value moves
    it by."""
    m, n = len(positive), len(negative)
    ordered = positive.sort().values
    hits = 1 - torch.searchsorted(ordered, ordered).double() / m
    wrong = 1 - torch.searchsorted(negative.sort().values, ordered).double() / n
    precision = hits / (hits + wrong)
    mean = float(precision.mean())
    slopes = [x / (hits + wrong) ** 2 / m for x in (wrong, hits)]
    up, down = (torch.nn.functional.pad(slope.cumsum(0), (1, 0)) for slope in slopes)
    # What a value at or above each threshold adds to its share, less what all shares lose by one more value.
    lost = float((slopes[0] * hits).sum())
    above = torch.searchsorted(ordered, positive, right=True)
    own = (precision[torch.searchsorted(ordered, positive)] - mean + up[above] - lost) / m
    others = (lost - down[torch.searchsorted(ordered, negative, right=True)]) / n
    return mean - 0.5, own, others


def share_below(others: Float[Tensor, "*any m"], values: Float[Tensor, "*any n"]) -> Float[Tensor, "*any n"]:
    """Of the others, how many are smaller than each value; equal ones count half."""
    ordered, asked = others.sort(-1).values.contiguous(), values.contiguous()
    both = torch.searchsorted(ordered, asked) + torch.searchsorted(ordered, asked, right=True)
    return both.double() / (2 * others.shape[-1])


def difference_of_shares(groups: Sequence[Hashable], hits: Tensor, among: tuple[Tensor, Tensor]) -> PerExample:
    """Share of hits among the first, less that among the second; 0 where either is empty. All [example] or
    [example, pos]."""
    counts = [int(some.sum()) for some in among]
    if not all(counts):
        return torch.zeros(len(hits)).double()
    shares = [float((hits & some).sum()) / count for some, count in zip(among, counts, strict=True)]
    parts = [some * (hits.double() - share) / count for some, share, count in zip(among, shares, counts, strict=True)]
    return pseudo_values(groups, shares[0] - shares[1], (parts[0] - parts[1]).reshape(len(hits), -1).sum(1))
