"""Whether a part's strongest examples say the same on two corpora, or only look as if they meant something.

The strongest examples of a random direction look like a concept too, and like another one on another corpus (Bolukbasi
et al. 2021, "An Interpretability Illusion for BERT", section 4). So what counts is the agreement between corpora, and
how much of it random directions at the same site have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vesalius.describe.example import Example
from vesalius.describe.examples import ActivatingExamples
from vesalius.errors import InputError
from vesalius.parts import Part
from vesalius.stats import rank_p

FEWEST_RANDOM = 19
"""Random directions that a p-value of .05 takes."""
FEWEST_EXAMPLES = 4


@dataclass(frozen=True)
class Illusion:
    """One part on two corpora.

    within: how alike two halves of its strongest examples on one corpus are, the mean of both corpora. across: the
    strongest on one and on the other. Both are the share of the tokens fired on that two sets of examples have in
    common, 0 to 1. random: `across` of random directions. p: share of them (and the part) that agree as well.
    """

    part: Part
    within: float
    across: float
    random: tuple[float, ...]
    p: float

    @property
    def suspicious(self) -> bool:
        """Consistent on each corpus, and across them no more so than random directions."""
        return self.p > 0.05 and self.within > self.across

    def __str__(self) -> str:
        verdict = "no more than random directions" if self.p > 0.05 else f"p = {self.p:.3g}"
        return f"{self.part}: within a corpus {self.within:.0%}, across {self.across:.0%} ({verdict})"


def across_corpora(
    first: ActivatingExamples, second: ActivatingExamples, random: Sequence[Part], parts: Sequence[Part] | None = None
) -> tuple[Illusion, ...]:
    """The test of each part against random directions; parts: default all that are not among `random`.

    first, second: the examples of the same parts, the random ones among them, on two corpora. Raises InputError for
    fewer than 19 random directions, for examples of another model, of the same texts, or of fewer than four contexts.
    """
    if len(random) < FEWEST_RANDOM:
        raise InputError(f"{len(random)} random directions; p = .05 takes {FEWEST_RANDOM}")
    if first.model_hash != second.model_hash:
        raise InputError("the two collections of examples are of different models")
    if first.texts == second.texts:
        raise InputError("both collections are of the same texts; the test needs two corpora")
    null = np.array([_across(first, second, part) for part in random])
    chosen = [part for part in first.parts if part not in set(random)] if parts is None else parts
    found = []
    for part in chosen:
        across = _across(first, second, part)
        within = (_within(first, part) + _within(second, part)) / 2
        found.append(Illusion(part, within, across, tuple(null.tolist()), rank_p(across, null)))
    return tuple(found)


def _across(first: ActivatingExamples, second: ActivatingExamples, part: Part) -> float:
    return in_common(_strongest(first, part), _strongest(second, part))


def _within(examples: ActivatingExamples, part: Part) -> float:
    top = _strongest(examples, part)
    return in_common(top[::2], top[1::2])


def _strongest(examples: ActivatingExamples, part: Part) -> tuple[Example, ...]:
    top: tuple[Example, ...] = examples[part].top
    if len(top) < FEWEST_EXAMPLES:
        raise InputError(f"{part} has {len(top)} examples on these texts, and the test takes {FEWEST_EXAMPLES}")
    return top


def in_common(first: Sequence[Example], second: Sequence[Example]) -> float:
    """Share of the tokens fired on that two sets of examples have in common; letters' case and spaces don't count."""
    counts = [Counter(example.token.strip().lower() for example in some) for some in (first, second)]
    shares = [{token: n / sum(count.values()) for token, n in count.items()} for count in counts]
    return sum(min(share, shares[1].get(token, 0.0)) for token, share in shares[0].items())
