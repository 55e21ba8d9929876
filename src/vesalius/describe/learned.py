"""Learned rules: for each part, the rule about text that best picks the tokens it fires on.

The rule is learned on half of the examples (by document), and has to hold on the other half; where no rule does better
there than on shuffled labels, nothing is said. A description is a sentence and a prediction about fresh texts, so it
can be wrong, whatever its examples look like. No language model is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vesalius.describe.description import FITS, Description, Discovery, Prediction
from vesalius.describe.examples import ActivatingExamples
from vesalius.describe.learning import Learned, Sampled, learn, sampled
from vesalius.describe.output import promoted_ids
from vesalius.describe.predictions import above
from vesalius.directions import Direction
from vesalius.errors import UnknownNameError
from vesalius.inputs.beginning import speller
from vesalius.parts import Part
from vesalius.quantities import (
    AUPRC,
    AUPRC_BALANCED,
    AUROC,
    DETECTION,
    FIRES_WHERE,
    FUZZING,
    PROMOTES,
    SIMULATION,
    STANDS_IN,
    TOLD_APART,
    Runs,
    quantity,
)
from vesalius.quantities.activation import token_values
from vesalius.quantities.fires_where import picked
from vesalius.quantities.rule_effects import levels
from vesalius.quantities.rules import Rule, in_words

LABEL = "rule"
LEAST = {
    FIRES_WHERE.name: 0.5, AUROC.name: 0.1, AUPRC.name: 0.05, AUPRC_BALANCED.name: 0.1, SIMULATION.name: 0.1,
    FUZZING.name: 0.2, DETECTION.name: 0.1, TOLD_APART.name: 0.2, STANDS_IN.name: 0.2, PROMOTES.name: 0.02,
}  # fmt: skip
"""What a rule must reach on discovery texts, by quantity; `stands_in` as a share of what ablation to the mean costs."""


@dataclass(frozen=True, eq=False)
class LearnedRules:
    """The describer that needs no language model. examples: of all parts it will be asked about, on discovery texts.

    predicts: names of the quantities that a rule is claimed to predict (those of `LEAST`). The first decides whether
    anything is said; of the others those are claimed that hold on discovery.
    """

    examples: ActivatingExamples
    seed: int = 0
    name: str = LABEL
    needs: tuple[str, ...] = ()
    predicts: tuple[str, ...] = (FIRES_WHERE.name,)
    _learned: dict[Part, Learned | None] = field(default_factory=dict, repr=False)
    _fired: dict[Part, Sampled] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        unknown = next((name for name in self.predicts if name not in LEAST), None)
        if unknown is not None or not self.predicts:
            raise UnknownNameError("quantity that a rule predicts", str(unknown), LEAST)

    def prepare(self, discovery: Discovery, parts: Sequence[Part]) -> None:
        """Values of all parts with a rule, and of their neighbours, in one pass over the discovery texts."""
        known = [part for part in parts if self.rule(part) is not None]
        asked = [self.neighbour(part) for part in known] if TOLD_APART.name in self.predicts else []
        token_values(discovery.runs, [*known, *(one for one in asked if one is not None)])

    def rule(self, part: Part) -> Learned | None:
        """The rule of a part; None where it fires too rarely, or no rule holds."""
        found = self.learned(part)
        return found if found is not None and found.holds else None

    def learned(self, part: Part) -> Learned | None:
        """What was learned of a part, whether it holds or not; None where it fires too rarely."""
        if part not in self._learned:
            self._learned[part] = learn(self.examples[part], self.seed)
        return self._learned[part]

    def recall(self, part: Part, found: Learned | None) -> None:
        """Take what was learned of a part before, instead of learning it again."""
        self._learned[part] = found

    def describe(self, discovery: Discovery, part: Part) -> Description | None:
        found = self.rule(part)
        if found is None:
            return None
        said, note = [], ""
        for number, name in enumerate(self.predicts):
            parameters = self._parameters(discovery, part, found, name)
            prediction = None if parameters is None else _predicted(discovery, part, found, name, parameters)
            if prediction is not None and (number == 0 or prediction.strength >= FITS):
                said.append(prediction)
            elif prediction is not None and name == TOLD_APART.name:
                note = f"; the rule fits {prediction.parameters['neighbour_name']} about as well"
        note += "".join(map(_given_up, found.revised))
        rivals = tuple({"rule": rule} for rule in found.rivals)
        return Description(part, self.name, tuple(said), note, "", found.revised, rivals) if said else None

    def _parameters(self, discovery: Discovery, part: Part, found: Learned, name: str) -> dict[str, Any] | None:
        """What a quantity needs to know; None where it has nothing to say about the part."""
        parameters: dict[str, Any] = {"rule": found.rule}
        if name in (FUZZING.name, DETECTION.name, TOLD_APART.name):
            parameters["threshold"] = self.examples[part].threshold
        if name == TOLD_APART.name:
            neighbour = self.neighbour(part)
            if neighbour is None:
                return None
            parameters |= {"neighbour": neighbour.ref, "neighbour_name": str(neighbour)}
            parameters["neighbour_threshold"] = self.examples[neighbour].threshold
        if name == STANDS_IN.name:
            some = picked(discovery.runs, found.rule)
            parameters |= dict(zip(("on", "off", "mean"), levels(discovery.runs, part, some), strict=True))
        if name == PROMOTES.name:
            return self._output(discovery.runs, part, found)
        return parameters

    def _output(self, runs: Runs, part: Part, found: Learned) -> dict[str, Any] | None:
        """The tokens that a part promotes directly, and what it is compared with: 0 for latents, else its mean."""
        model = runs.model
        tokens = promoted_ids(model, part)
        if not tokens or model.tokenizer is None:
            return None
        rest = 0.0 if self.examples[part].threshold == 0 else levels(runs, part, picked(runs, found.rule))[2]
        words = list(map(speller(model.tokenizer), tokens))
        return {"rule": found.rule, "tokens": tokens, "words": words, "rest": rest}

    def neighbour(self, part: Part) -> Part | None:
        """Of the other parts of the examples, the one on whose tokens the part's rule fires most; None without any.

        Directions are not looked at: a claim names its neighbour by a reference, and they have none to be found by.
        """
        found = self.rule(part)
        others = [other for other in self.examples.parts if other != part and not isinstance(other, Direction)]
        if found is None or not others:
            return None
        return max(others, key=lambda other: self._share(found.rule, other))

    def _share(self, rule: Rule, part: Part) -> float:
        """Of the tokens that a part was seen to fire on, the share that a rule picks."""
        if part not in self._fired:
            self._fired[part] = sampled(self.examples[part], [(one, "fires") for one in self.examples[part].sample])
        fired = self._fired[part]
        return float(fired.picked(rule).double().mean()) if len(fired.at) else 0.0


def _given_up(before: Mapping[str, Any]) -> str:
    broke, made = before["silent"] + before["firing"], before["placed"] + before["taken"]
    return f"; it was said to fire {in_words(before['rule'])} until {broke} of {made} made inputs broke that"


def _predicted(discovery: Discovery, part: Part, found: Learned, name: str, parameters: dict[str, Any]) -> Prediction:
    """Half of what discovery shows is claimed. The strength is that of the whole of it."""
    of, runs = quantity(name), discovery.runs
    mean, scale = runs.mean(of.measure(runs, part, parameters)), of.scale_of(runs, part, parameters)
    said, least = of.phrase(parameters), LEAST[name]
    f1 = f"; F1 {found.held_out:.2f} on held-out examples" if of is FIRES_WHERE else ""
    if of is STANDS_IN:
        least *= max(scale or 0.0, 0.0)
    return Prediction(
        name,
        parameters,
        mean,
        above(mean, least) if least > 0 else 0.0,
        f"{said} ({mean:.2g} {of.unit(runs)}{f1})",
        said,
        size=abs(mean) / 2 or None,
        scale=scale,
        nulls=(("shuffled", abs(mean) / 4),),
    )
