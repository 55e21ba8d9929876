"""Attribution by removing features: one at a time (occlusion), in all or many sets (Shapley values, LIME)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vesalius.attribution.question import Question, all_sets
from vesalius.errors import InputError
from vesalius.seeds import generator_for

Shares = Float[Tensor, " feature"]
MOST_EXACT = 16
"""Features whose sets are all run."""
_RIDGE = 1e-9


def occlusion(question: Question) -> Shares:
    """What the number loses when one feature is absent (Zeiler and Fergus 2014, section 4.2)."""
    return question.value - question.worth(~torch.eye(len(question), dtype=torch.bool))


def shapley(question: Question) -> Shares:
    """Shapley values by their definition, from the worth of every set of features.

    Absent elements come from the references, whatever the others are: interventional values. Raises InputError for
    more than 16 features.
    """
    count = len(question)
    if count > MOST_EXACT:
        raise InputError(f"{count} features have 2^{count} sets; shapley takes at most {MOST_EXACT}: use kernel_shap")
    sets = all_sets(count)
    worth, size = question.worth(sets), sets.sum(1)
    found = torch.empty(count, dtype=torch.float64)
    for feature in range(count):
        without = (~sets[:, feature]).nonzero()[:, 0]
        # Bit `feature` of a set's number says whether the feature is in it.
        gain = worth[without + (1 << feature)] - worth[without]
        weight = torch.tensor([1 / (count * math.comb(count - 1, int(n))) for n in size[without]], dtype=torch.float64)
        found[feature] = (weight * gain).sum()
    return found


def kernel_shap(question: Question, samples: int = 2048, seed: int = 0) -> Shares:
    """Shapley values as weighted least squares (Lundberg and Lee 2017, theorem 2), exact where all sets fit.

    samples: sets that are run. Where fewer than all, each is drawn with its complement, sizes by the kernel's weight.
    The shares add up to the change from the baseline exactly. Raises InputError for too few samples.
    """
    count = len(question)
    if count == 1:
        return torch.tensor([question.value - question.at_baseline], dtype=torch.float64)
    if samples < 2 * count:
        raise InputError(f"{count} features need {2 * count} samples or more; got {samples}")
    exact = count <= MOST_EXACT and 2**count - 2 <= samples
    sets, weight = _every_set(count) if exact else _drawn_sets(count, samples, seed)
    gained = question.worth(sets) - question.at_baseline
    return _constrained(sets.double(), weight, gained, question.value - question.at_baseline)


def _every_set(count: int) -> tuple[Bool[Tensor, "set feature"], Float[Tensor, " set"]]:
    """All but none and all, with Shapley's kernel."""
    sets = all_sets(count)[1:-1]
    by_size = [0.0, *((count - 1) / (math.comb(count, n) * n * (count - n)) for n in range(1, count))]
    return sets, torch.tensor(by_size, dtype=torch.float64)[sets.sum(1)]


def _drawn_sets(count: int, samples: int, seed: int) -> tuple[Bool[Tensor, "set feature"], Float[Tensor, " set"]]:
    """Sets in pairs with their complements; as often as the kernel says, so that all weigh alike."""
    generator = generator_for("kernel_shap", seed)
    sizes = torch.arange(1, count, dtype=torch.float64)
    drawn = torch.multinomial(1 / (sizes * (count - sizes)), samples // 2, True, generator=generator) + 1
    order = torch.rand(len(drawn), count, generator=generator).argsort(1).argsort(1)
    sets = order < drawn[:, None]
    return torch.cat([sets, ~sets]), torch.ones(2 * len(sets), dtype=torch.float64)


def _constrained(sets: Tensor, weight: Tensor, gained: Tensor, total: float) -> Shares:
    """Least squares of gained on sets, with coefficients that add up to the total: the last one is the rest."""
    left = sets[:, :-1] - sets[:, -1:]
    right = gained - sets[:, -1] * total
    root = weight.sqrt()
    found = torch.linalg.lstsq(left * root[:, None], (right * root)[:, None], driver="gelsd").solution[:, 0]
    return torch.cat([found, (total - found.sum())[None]])


def lime(question: Question, samples: int = 2048, width: float | None = None, seed: int = 0) -> Shares:
    """LIME (Ribeiro et al. 2016, section 3.4): a linear model of the number near the input.

    Of images and tokens features are present or absent at random, and weigh by their cosine to the whole input (width
    .25). Of rows the columns are drawn from a normal distribution around the row, as wide as the references, without
    discretising, and weigh by their distance in standard deviations (width .75 sqrt(columns)); a share is the slope
    times the row's distance from the references' mean. Raises InputError for too few samples and constant columns.
    """
    if samples < 2 * len(question):
        raise InputError(f"{len(question)} features need {2 * len(question)} samples or more; got {samples}")
    if question.kind == "row":
        mean = question.references.double().mean(0).cpu()
        shares = slopes_near(question, samples, width, seed) * (question.x.double().cpu() - mean)
        return question.shares(shares)
    sets = torch.rand(samples, len(question), generator=generator_for("lime", seed)) < 0.5
    sets[0] = True
    distance = 1 - (sets.double().mean(1)).sqrt()
    return _weighted_slopes(sets.double(), question.worth(sets), distance, 0.25 if width is None else width)


def slopes_near(
    question: Question, samples: int = 2048, width: float | None = None, seed: int = 0
) -> Float[Tensor, " column"]:
    """Slopes of the linear model of a row, per unit of each column."""
    spread = question.references.double().std(0, correction=0).cpu()
    if bool((spread == 0).any()):
        column = question.names[int(question.features[int((spread == 0).nonzero()[0])])]
        raise InputError(
            f"lime draws each column as wide as the background is, and {column} is constant there; give more rows, or "
            "leave the column out"
        )
    count = len(spread)
    drawn = torch.randn(samples, count, generator=generator_for("lime", seed), dtype=torch.float64)
    drawn[0] = 0
    points = (question.x.double().cpu() + drawn * spread).to(question.x)
    worth = torch.cat([question.plain(some) for some in points.split(question.batch)])
    wide = 0.75 * math.sqrt(count) if width is None else width
    return _weighted_slopes(drawn, worth, drawn.norm(dim=1), wide) / spread


def _weighted_slopes(features: Tensor, worth: Tensor, distance: Tensor, width: float) -> Shares:
    weight = torch.exp(-((distance / width) ** 2) / 2)
    weight = weight / weight.sum()
    centred = features - (weight[:, None] * features).sum(0)
    left = (weight[:, None] * centred).T @ centred
    right = centred.T @ (weight * (worth - (weight * worth).sum()))
    return torch.linalg.solve(left + _RIDGE * torch.eye(len(left), dtype=left.dtype), right)
