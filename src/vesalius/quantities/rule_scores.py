"""Scores of a rule: how well it and a part's activations on fresh texts predict each other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vesalius.intervention import derangement
from vesalius.parts import Part
from vesalius.quantities.activation import counted, token_values
from vesalius.quantities.base import PROBABILITY, Parameters, PerExample, Quantity
from vesalius.quantities.fires_where import moved, picked, read_all, without_tokenizer
from vesalius.quantities.matching import Matched
from vesalius.quantities.pseudo_values import (
    Score,
    auprc,
    auprc_balanced,
    auroc,
    difference_of_shares,
    groups_of,
    pseudo_values,
    scored,
)
from vesalius.quantities.rules import in_words
from vesalius.quantities.runs import Runs
from vesalius.refs import resolve

Picked = Bool[Tensor, "example pos"]


class RuleScore(Quantity):
    """A score of the parameter `rule` against a part's values. Null `shuffled`: the same number of tokens of each text,
    picked at random."""

    kind = "predictive"
    scale = PROBABILITY

    def unit(self, runs: Runs) -> str:
        return "score"

    def refuses(self, runs: Runs, part: Part) -> str:
        return without_tokenizer(runs)

    def measure(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample:
        return self._score(runs, part, parameters, picked(runs, parameters["rule"]))

    def nulls(self, runs: Runs, part: Part, parameters: Parameters) -> Mapping[str, PerExample]:
        return {"shuffled": self._score(runs, part, parameters, moved(runs, parameters["rule"]))}

    def prepare(self, runs: Runs, wanted: Sequence[tuple[Part, Parameters]]) -> None:
        read_all(runs, wanted)

    def scale_of(self, runs: Runs, part: Part, parameters: Parameters) -> float | None:
        """1: a score is at most that."""
        return 1.0

    @abstractmethod
    def _score(self, runs: Runs, part: Part, parameters: Parameters, some: Picked) -> PerExample: ...


class Auroc(RuleScore):
    """Area under the ROC curve, less ½, of a part's value as the sign of a token that the rule picks.

    Of all tokens of these texts; it does not depend on how frequent the picked ones are.
    """

    name = "auroc"

    def unit(self, runs: Runs) -> str:
        return "AUROC above ½"

    def phrase(self, parameters: Parameters) -> str:
        return f"is higher {in_words(parameters['rule'])} than on other tokens"

    def _score(self, runs: Runs, part: Part, parameters: Parameters, some: Picked) -> PerExample:
        return _areas(runs, part, some, auroc)


class Auprc(RuleScore):
    """Area under the precision-recall curve (average precision) of a part's value as the sign of a token that the rule
    picks, less the share of picked tokens: at the frequency that they have in these texts."""

    name = "auprc"

    def unit(self, runs: Runs) -> str:
        return "AUPRC above the share picked"

    def phrase(self, parameters: Parameters) -> str:
        return f"is highest {in_words(parameters['rule'])}"

    def _score(self, runs: Runs, part: Part, parameters: Parameters, some: Picked) -> PerExample:
        return _areas(runs, part, some, auprc)


class BalancedAuprc(RuleScore):
    """Area under the precision-recall curve, less ½, as it would be if the rule picked every second token."""

    name = "auprc_balanced"

    def unit(self, runs: Runs) -> str:
        return "balanced AUPRC above ½"

    def phrase(self, parameters: Parameters) -> str:
        return f"is highest {in_words(parameters['rule'])}, where those are as many as the other tokens"

    def _score(self, runs: Runs, part: Part, parameters: Parameters, some: Picked) -> PerExample:
        return _areas(runs, part, some, auprc_balanced)


class Simulation(RuleScore):
    """Correlation (Pearson) of a part's value with the rule, 1 on the tokens it picks and 0 on others.

    The score of Bills et al. (2023), who let a language model simulate the values, for a rule.
    """

    name = "simulation"

    def unit(self, runs: Runs) -> str:
        return "correlation"

    def phrase(self, parameters: Parameters) -> str:
        return f"has values as if it fired {in_words(parameters['rule'])}"

    def _score(self, runs: Runs, part: Part, parameters: Parameters, some: Picked) -> PerExample:
        real, values = counted(runs), token_values(runs, [part])[0].double()
        one, other = _standard(some.double(), real), _standard(values, real)
        if one is None or other is None:
            return torch.zeros(runs.n).double()
        r = float((one * other)[real].mean())
        influence = (one * other - r / 2 * (one**2 + other**2)) * real / int(real.sum())
        return pseudo_values(groups_of(runs), r, influence.sum(1))


class Detection(RuleScore):
    """Of texts in which a part fires, the share in which the rule picks a token, less that of the other texts.

    Detection (Paulo et al. 2024), for a rule: twice the balanced accuracy of whole texts, less 1. A part fires above
    the parameter `threshold`. Null `shuffled`: what the rule picks in other texts.
    """

    name = "detection"

    def unit(self, runs: Runs) -> str:
        return "difference of shares"

    def phrase(self, parameters: Parameters) -> str:
        return f"fires in texts with a token {in_words(parameters['rule'])}"

    def nulls(self, runs: Runs, part: Part, parameters: Parameters) -> Mapping[str, PerExample]:
        other = derangement(runs.n, runs.seed)
        return {"shuffled": self._score(runs, part, parameters, picked(runs, parameters["rule"])[other])}

    def _score(self, runs: Runs, part: Part, parameters: Parameters, some: Picked) -> PerExample:
        here = _fires(runs, part, parameters["threshold"]).any(1)
        return difference_of_shares(groups_of(runs), some.any(1), (here, ~here))


class Fuzzing(RuleScore):
    """Of tokens on which a part fires, the share that the rule picks, less that of the other tokens.

    Fuzzing (Paulo et al. 2024), for a rule: twice the balanced accuracy of single tokens, less 1. A part fires above
    the parameter `threshold`.
    """

    name = "fuzzing"

    def unit(self, runs: Runs) -> str:
        return "difference of shares"

    def phrase(self, parameters: Parameters) -> str:
        return f"fires mostly {in_words(parameters['rule'])}"

    def _score(self, runs: Runs, part: Part, parameters: Parameters, some: Picked) -> PerExample:
        fires = _fires(runs, part, parameters["threshold"])
        return difference_of_shares(groups_of(runs), some, (fires, counted(runs) & ~fires))


class ToldApart(RuleScore):
    """Of tokens on which a part fires, the share that the rule picks, less that of those on which another part fires.

    A description that fits the neighbour as well says little about the part (most do: arXiv 2605.12874). Parameters:
    `threshold`, above which the part fires, `neighbour`, a part's ref, and `neighbour_threshold`. Tokens on which both
    fire are the part's own. The neighbour is the control; there is no other.
    """

    name = "told_apart"

    def unit(self, runs: Runs) -> str:
        return "difference of shares"

    def phrase(self, parameters: Parameters) -> str:
        return f"fires {in_words(parameters['rule'])}, and the part most like it does not"

    def prepare(self, runs: Runs, wanted: Sequence[tuple[Part, Parameters]]) -> None:
        both = [one for part, given in wanted for one in (part, *([_neighbour(part, given)] if given else []))]
        token_values(runs, both)

    def matched(self, runs: Runs, part: Part, members: Sequence[Part], parameters: Parameters) -> Matched:
        return Matched("its neighbour is part of the comparison", ())

    def _score(self, runs: Runs, part: Part, parameters: Parameters, some: Picked) -> PerExample:
        fires = _fires(runs, part, parameters["threshold"])
        other = _fires(runs, _neighbour(part, parameters), parameters["neighbour_threshold"])
        return difference_of_shares(groups_of(runs), some, (fires, other & ~fires))


def _fires(runs: Runs, part: Part, threshold: Any) -> Picked:
    return (token_values(runs, [part])[0] > float(threshold)) & counted(runs)


def _neighbour(part: Part, parameters: Parameters) -> Part:
    return resolve(parameters["neighbour"], part)


def _areas(runs: Runs, part: Part, some: Picked, score: Score) -> PerExample:
    """A score of the part's values on picked tokens and on the others."""
    there = counted(runs)
    return scored(groups_of(runs), token_values(runs, [part])[0], there & some, there & ~some, score)


def _standard(values: Float[Tensor, "example pos"], real: Picked) -> Tensor | None:
    """With mean 0 and variance 1 over real tokens; None for values that are all alike."""
    centred = values - values[real].mean()
    spread = float(centred[real].square().mean().sqrt())
    return centred / spread if spread > 0 else None
