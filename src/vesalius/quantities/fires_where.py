"""Fires where: how much more a part fires on the tokens that a rule picks than on the others of the same text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vesalius.data.tasks.base import tokenizer_of
from vesalius.inputs.beginning import speller
from vesalius.parts import Part
from vesalius.protocol import canonical_json
from vesalius.quantities.activation import counted, token_values, tokens_of
from vesalius.quantities.base import DEVIATION, Parameters, PerExample, Quantity, control_parts
from vesalius.quantities.rules import Rule, Text, in_words, matches
from vesalius.quantities.runs import Runs
from vesalius.seeds import generator_for


class FiresWhere(Quantity):
    """Mean value on the tokens that a rule picks less that on the others, text by text, in standard deviations.

    The standard deviation is the part's over all tokens of these texts, so that parts of different sizes compare. A
    text in which the rule picks nothing, or everything, says nothing, and counts as 0. A text's first token is left out
    (see `activation.counted`). Null `shuffled`: the same with the picked tokens moved elsewhere in the text. Parameter
    `rule`: see `quantities.rules`.
    """

    name = "fires_where"
    kind = "predictive"
    scale = DEVIATION

    def unit(self, runs: Runs) -> str:
        return "SD"

    def phrase(self, parameters: Parameters) -> str:
        return f"fires more {in_words(parameters['rule'])} than elsewhere"

    def refuses(self, runs: Runs, part: Part) -> str:
        return without_tokenizer(runs)

    def measure(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample:
        return _difference(_standard(runs, part), picked(runs, parameters["rule"]), counted(runs))

    def prepare(self, runs: Runs, wanted: Sequence[tuple[Part, Parameters]]) -> None:
        """All parts in one pass over the texts."""
        read_all(runs, wanted)

    def control(self, runs: Runs, part: Part, parameters: Parameters, control: Mapping[str, Any]) -> PerExample | None:
        """As of any quantity, with the values of all control parts from one pass."""
        token_values(runs, [part, *control_parts(control, part)])
        return super().control(runs, part, parameters, control)

    def scale_of(self, runs: Runs, part: Part, parameters: Parameters) -> float | None:
        """1: values are in standard deviations."""
        return 1.0

    def nulls(self, runs: Runs, part: Part, parameters: Parameters) -> Mapping[str, PerExample]:
        other = moved(runs, parameters["rule"])
        return {"shuffled": _difference(_standard(runs, part), other, counted(runs))}

    def diagnostics(self, runs: Runs, part: Part, parameters: Parameters) -> Mapping[str, Any]:
        """Share of the tokens that the rule picks, and of the texts in which it picks any."""
        found = picked(runs, parameters["rule"])
        return {"picked": float(found.sum()) / int(counted(runs).sum()), "texts": float(found.any(1).double().mean())}


def without_tokenizer(runs: Runs) -> str:
    """Why rules do not apply to a model, in words; empty when they do."""
    return "" if runs.model.tokenizer is not None else f"{runs.model.name} has no tokenizer; rules are about text"


def read_all(runs: Runs, wanted: Sequence[tuple[Part, Parameters]]) -> None:
    """The values of parts and of their controls in one pass over the texts."""
    token_values(
        runs, [one for part, given in wanted for one in (part, *control_parts(given.get("control", {}), part))]
    )


def picked(runs: Runs, rule: Rule) -> Bool[Tensor, "example pos"]:
    """The tokens that a rule picks in the texts of these runs, of those that count; found once for each rule."""

    def compute() -> Tensor:
        return matches(rule, runs.once("text", lambda: text_of(runs))) & counted(runs)

    return runs.once(("picked", canonical_json(rule)), compute)


def moved(runs: Runs, rule: Rule) -> Bool[Tensor, "example pos"]:
    """As many tokens of each text as the rule picks, at random among those that count."""

    def ranks() -> Tensor:
        draw = torch.rand(tokens_of(runs).ids.shape, generator=generator_for("fires_where", runs.seed))
        return draw.masked_fill(~counted(runs), torch.inf).argsort(1).argsort(1)

    return runs.once("ranks", ranks) < picked(runs, rule).sum(1, keepdim=True)


def text_of(runs: Runs) -> Text:
    """The texts as rules see them; every token is decoded once."""
    tokens = tokens_of(runs)
    return Text(tokens.ids.cpu(), tokens.real.cpu(), speller(tokenizer_of(runs.model)))


def _standard(runs: Runs, part: Part) -> Float[Tensor, "example pos"]:
    """Values in standard deviations over all tokens that count; of a part that never changes, zeros."""
    values = token_values(runs, [part])[0].double()
    spread = float(values[counted(runs)].std())
    return values / spread if spread > 0 else torch.zeros_like(values)


def _difference(values: Tensor, some: Tensor, real: Tensor) -> PerExample:
    others = real & ~some
    n, m = some.sum(1), others.sum(1)
    means = [(values * mask).sum(1) / mask.sum(1).clamp_min(1) for mask in (some, others)]
    return torch.where((n > 0) & (m > 0), means[0] - means[1], torch.zeros(()).double())
