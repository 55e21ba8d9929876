"""Fails where: how much more often the model is wrong on prompts in which a rule picks a token than on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from vesalius.parts import Part
from vesalius.quantities.base import PROBABILITY, Parameters, PerExample, Quantity
from vesalius.quantities.contrast import Contrast
from vesalius.quantities.fires_where import picked, without_tokenizer
from vesalius.quantities.matching import Matched
from vesalius.quantities.pseudo_values import difference_of_shares, groups_of
from vesalius.quantities.rules import in_words
from vesalius.quantities.runs import Runs
from vesalius.seeds import generator_for


class FailsWhere(Quantity):
    """Of clean prompts in which the parameter `rule` picks a token, the share that the model gets wrong, less that of
    the others.

    What a part of a model fires on, and does there, foretells where the model errs; this is how often it does. Wrong is
    a prompt whose metric is not above 0. Parameter `until`: only so many tokens of each prompt are looked at. Null
    `shuffled`: as many prompts at random. The other prompts are the control; there is no other. `describe.foretold`
    makes prompts of both kinds.
    """

    name = "fails_where"
    kind = "predictive"
    scale = PROBABILITY

    def unit(self, runs: Runs) -> str:
        return "difference of shares"

    def phrase(self, parameters: Parameters) -> str:
        return f"makes the model wrong more often on prompts with a token {in_words(parameters['rule'])}"

    def refuses(self, runs: Runs, part: Part) -> str:
        return without_tokenizer(runs) if isinstance(runs.data, Contrast) else "prompts with answers are needed"

    def measure(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample:
        return _difference(runs, _holding(runs, parameters))

    def nulls(self, runs: Runs, part: Part, parameters: Parameters) -> Mapping[str, PerExample]:
        some = _holding(runs, parameters)
        return {
            "shuffled": _difference(runs, some[torch.randperm(runs.n, generator=generator_for("fails", runs.seed))])
        }

    def scale_of(self, runs: Runs, part: Part, parameters: Parameters) -> float | None:
        """1: shares differ by that at most."""
        return 1.0

    def matched(self, runs: Runs, part: Part, members: Sequence[Part], parameters: Parameters) -> Matched:
        return Matched("the other prompts are part of the comparison", ())


def _holding(runs: Runs, parameters: Parameters) -> Bool[Tensor, " example"]:
    """The prompts in which the rule picks a token."""
    found = picked(runs, parameters["rule"])
    until = parameters.get("until")
    return (found if until is None else found[:, : int(until)]).any(1)


def _difference(runs: Runs, some: Bool[Tensor, " example"]) -> PerExample:
    return difference_of_shares(groups_of(runs), runs.metric("clean").cpu() <= 0, (some, ~some))
