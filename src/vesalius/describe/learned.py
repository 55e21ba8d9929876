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

from vesalius.describe.description import Description, Discovery, Prediction
from vesalius.describe.example import Example, PartExamples
from vesalius.describe.examples import ActivatingExamples
from vesalius.describe.predictions import above
from vesalius.parts import Part
from vesalius.quantities import FIRES_WHERE
from vesalius.quantities.rules import CLASSES, Rule, Text, matches, word_of
from vesalius.seeds import generator_for

LABEL = "rule"
LEAST_F1 = 0.2
"""On the examples that were held out, what a rule must reach to be worth a claim."""
LEAST_DIFFERENCE = 0.5
"""Standard deviations between the tokens picked and the others, on discovery texts."""
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
    """The describer that needs no language model. examples: of all parts it will be asked about, on discovery texts."""

    examples: ActivatingExamples
    seed: int = 0
    name: str = LABEL
    needs: tuple[str, ...] = ()
    _learned: dict[Part, Learned | None] = field(default_factory=dict, repr=False)

    def prepare(self, discovery: Discovery, parts: Sequence[Part]) -> None:
        """Values of all parts with a rule, in one pass over the discovery texts."""
        known = [(part, {"rule": found.rule}) for part in parts if (found := self.rule(part)) is not None]
        FIRES_WHERE.prepare(discovery.runs, known)

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
        parameters: dict[str, Any] = {"rule": found.rule}
        mean = discovery.runs.mean(FIRES_WHERE.measure(discovery.runs, part, parameters))
        said = FIRES_WHERE.phrase(parameters)
        prediction = Prediction(
            FIRES_WHERE.name,
            parameters,
            mean,
            above(mean, LEAST_DIFFERENCE),
            f"{said} ({mean:.2f} SD; F1 {found.held_out:.2f} on held-out examples)",
            said,
            size=mean / 2,
            scale=1.0,
            nulls=(("shuffled", mean / 4),),
        )
        return Description(part, LABEL, (prediction,))


def learn(examples: PartExamples, seed: int = 0) -> Learned | None:
    """The best rule for a part's examples; None for fewer than eight on either half."""
    halves = [_sampled(examples, [e for e in _all(examples) if e[0].document % 2 == half]) for half in (0, 1)]
    if any(int(half.fires.sum()) < FEWEST for half in halves):
        return None
    first, second = halves
    rule, f1 = _best(first, first.fires)
    mixed = first.fires[torch.randperm(len(first.fires), generator=generator_for("learned", seed))]
    other, _ = _best(first, mixed)
    return Learned(rule, f1, second.f1(second.picked(rule)), second.f1(second.picked(other)))


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
