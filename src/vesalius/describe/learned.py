"""Learned rules: for each part, the rule about text that best picks the tokens it fires on.

The rule is learned on half of the examples (by document), and has to hold on the other half; where no rule does better
there than on shuffled labels, nothing is said. A description is a sentence and a prediction about fresh texts, so it
can be wrong, whatever its examples look like. No language model is asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vesalius.describe.description import FITS, Description, Discovery, Prediction
from vesalius.describe.example import Example, PartExamples
from vesalius.describe.examples import ActivatingExamples
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
from vesalius.quantities.rules import CLASSES, Rule, Text, matches, word_of
from vesalius.seeds import generator_for

LABEL = "rule"
LEAST_F1 = 0.2
"""On the examples that were held out, what a rule must reach to be worth a claim."""
LEAST = {
    FIRES_WHERE.name: 0.5, AUROC.name: 0.1, AUPRC.name: 0.05, AUPRC_BALANCED.name: 0.1, SIMULATION.name: 0.1,
    FUZZING.name: 0.2, DETECTION.name: 0.1, TOLD_APART.name: 0.2, STANDS_IN.name: 0.2, PROMOTES.name: 0.02,
}  # fmt: skip
"""What a rule must reach on discovery texts, by quantity; `stands_in` as a share of what ablation to the mean costs."""
CLAUSES, GAIN = 3, 0.03
WITHIN, WORDS, RUNNING = 16, 8, 12
"""How far back a word is looked for; words of each place that are tried; rules kept from round to round."""
FEWEST, SUPPORT = 8, 3
"""Examples on each half that a rule takes; times that a word must be fired on to be in a list of words."""


@dataclass(frozen=True, eq=False)
class Sampled:
    """Tokens with what comes before them, one a row; weight: how many tokens of the text each stands for."""

    text: Text
    at: Int[Tensor, " row"]
    fires: Bool[Tensor, " row"]
    weight: Float[Tensor, " row"]
    words: tuple[tuple[str, ...], ...]

    def picked(self, rule: Rule) -> Bool[Tensor, " row"]:
        return matches(rule, self.text)[torch.arange(len(self.at)), self.at]

    def f1(self, picked: Bool[Tensor, " row"]) -> float:
        """Harmonic mean of precision and recall at the frequency that tokens have in the text."""
        return float(self.scores(picked[None], self.fires)[0])

    def scores(self, picked: Bool[Tensor, "rule row"], fires: Bool[Tensor, " row"]) -> Float[Tensor, " rule"]:
        """The same of many rules, for these labels."""
        some = picked.double()
        hits = some @ (self.weight * fires)
        return 2 * hits / (some @ self.weight + self.weight[fires].sum()).clamp_min(1e-12)


@dataclass(frozen=True)
class Learned:
    """A rule. learned, held_out: its F1 on the half it was learned on and on the other; shuffled: of the best rule for
    shuffled labels, on the other half."""

    rule: Rule
    learned: float
    held_out: float
    shuffled: float

    @property
    def holds(self) -> bool:
        return self.held_out >= LEAST_F1 and self.held_out > self.shuffled


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
        return Description(part, self.name, tuple(said), note) if said else None

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
            self._fired[part] = _sampled(self.examples[part], [(one, "fires") for one in self.examples[part].sample])
        sampled = self._fired[part]
        return float(sampled.picked(rule).double().mean()) if len(sampled.at) else 0.0


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


def learn(examples: PartExamples, seed: int = 0) -> Learned | None:
    """The best rule for a part's examples; None for fewer than eight on either half."""
    halves = halves_of(examples)
    if halves is None:
        return None
    first, second = halves
    rule, f1 = _best(first, first.fires)
    mixed = first.fires[torch.randperm(len(first.fires), generator=generator_for("learned", seed))]
    other, _ = _best(first, mixed)
    return Learned(rule, f1, second.f1(second.picked(rule)), second.f1(second.picked(other)))


def halves_of(examples: PartExamples) -> tuple[Sampled, Sampled] | None:
    """Examples of even and of odd documents; None where either has too few that fire."""
    first, second = (_sampled(examples, [e for e in _all(examples) if e[0].document % 2 == half]) for half in (0, 1))
    few = min(int(half.fires.sum()) for half in (first, second)) < FEWEST
    return None if few else (first, second)


def _all(examples: PartExamples) -> list[tuple[Example, str]]:
    kinds = (("fires", examples.sample), ("near", examples.near), ("usual", examples.background))
    return [(example, kind) for kind, some in kinds for example in some]


def _sampled(examples: PartExamples, chosen: Sequence[tuple[Example, str]]) -> Sampled:
    """Rows for these examples. The sample stands for all tokens fired on; random tokens without activation for the
    rest, and near misses count as much as all that fires: they are what a rule about single tokens gets wrong."""
    rows = [(e, kind) for e, kind in chosen if kind != "usual" or e.value <= examples.threshold]
    counts = Counter(kind for _, kind in rows)
    share = {"fires": examples.density, "near": examples.density, "usual": 1 - examples.density}
    width = max((e.at + 1 for e, _ in rows), default=1)
    # Rules look back: the token is the last of its row.
    ids = torch.full((len(rows), width), -1)
    words = []
    texts: dict[int, str] = {}
    for row, (example, _) in enumerate(rows):
        seen = example.ids[: example.at + 1]
        ids[row, width - len(seen) :] = torch.tensor(seen)
        texts |= dict(zip(seen, example.tokens[: example.at + 1], strict=True))
        words.append(tuple(map(_word, example.tokens[: example.at + 1])))
    return Sampled(
        Text(ids, ids >= 0, lambda token: texts.get(token, "")),
        torch.full((len(rows),), width - 1),
        torch.tensor([kind == "fires" for _, kind in rows], dtype=torch.bool),
        torch.tensor([share[kind] / counts[kind] for _, kind in rows], dtype=torch.float64),
        tuple(words),
    )


# The same few thousand tokens come again and again.
_word = lru_cache(2**17)(word_of)


def _best(sampled: Sampled, fires: Bool[Tensor, " row"]) -> tuple[Rule, float]:
    """Clauses of one or two tests, one added after the other for as long as F1 rises."""
    tests = list(_tests(sampled, fires))
    hits = torch.stack([sampled.picked(test) for test in tests])
    likely = sampled.scores(hits, fires).argsort(descending=True, stable=True)[:RUNNING].tolist()
    pairs = [
        (a, b)
        for number, a in enumerate(likely)
        for b in (*likely[number + 1 :], *(other for other in range(len(tests)) if other not in likely))
    ]
    clauses: list[Rule] = [*tests, *({"all": [tests[a], tests[b]]} for a, b in pairs)]
    first, second = (
        torch.tensor(column, dtype=torch.long) for column in ([a for a, _ in pairs], [b for _, b in pairs])
    )
    picked = torch.cat([hits, hits[first] & hits[second]])
    chosen: list[Rule] = []
    union, best = torch.zeros_like(fires), 0.0
    while len(chosen) < CLAUSES:
        scores = sampled.scores(picked | union, fires)
        # Of equal ones the first, which is the simpler.
        at = int((scores == scores.max()).nonzero()[0])
        if float(scores[at]) < best + GAIN:
            break
        chosen, union, best = [*chosen, clauses[at]], union | picked[at], float(scores[at])
    return (chosen[0] if len(chosen) == 1 else {"any": chosen or [clauses[0]]}), best


def _tests(sampled: Sampled, fires: Bool[Tensor, " row"]) -> Iterator[Rule]:
    """Tests that the tokens fired on pass often."""
    firing = [words for words, fired in zip(sampled.words, fires.tolist(), strict=True) if fired]
    for name in CLASSES:
        yield from ({"class": name, "at": at} for at in (0, -1))
    for at in (0, -1, -2):
        common = Counter(words[at - 1] for words in firing if len(words) >= 1 - at and words[at - 1])
        listed = [word for word, count in common.most_common(WORDS) if count >= SUPPORT]
        yield from ({"word": [word], "at": at} for word in listed)
        # All words that are fired on more often than not, and not only the commonest.
        likely = sorted(_likely(sampled, fires, at, common))
        if len(likely) > 1:
            yield {"word": likely, "at": at}
    before = Counter(word for words in firing for word in {*words[-1 - WITHIN : -1]} if word.isalnum())
    yield from ({"seen": [word], "within": WITHIN} for word, count in before.most_common(WORDS) if count >= SUPPORT)


def _likely(sampled: Sampled, fires: Tensor, at: int, common: Counter[str]) -> list[str]:
    weight: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for words, fired, each in zip(sampled.words, fires.tolist(), sampled.weight.tolist(), strict=True):
        if len(words) >= 1 - at:
            total[words[at - 1]] += each
            weight[words[at - 1]] += each * fired
    # A word that was fired on once is no pattern yet.
    return [word for word, count in common.items() if count >= SUPPORT and weight[word] > total[word] / 2]
