"""Learning a rule: which statement about a token and those before it best picks the tokens that a part fires on.

It is learned on half of the examples (by document) and scored on the other half, beside the best rule for shuffled
labels. No language model is asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vesalius.describe.example import Example, PartExamples
from vesalius.quantities.rules import CLASSES, Rule, Text, matches, word_of
from vesalius.seeds import generator_for

LEAST_F1 = 0.2
"""On the examples that were held out, what a rule must reach to be worth a claim."""
CLAUSES, GAIN = 3, 0.03
WITHIN, WORDS, RUNNING = 16, 8, 12
"""How far back a word is looked for; words of each place that are tried; rules kept from round to round."""
FEWEST, SUPPORT = 8, 3
"""Examples on each half that a rule takes; times that a word must be fired on to be in a list of words."""
RIVALS, AS_GOOD, ALIKE = 3, 0.03, 0.9
"""Rules that are kept beside the best: how many, how much less F1 they may have, and the overlap above which two are
the same."""


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
    shuffled labels, on the other half. rivals: other rules that do about as well on both halves, and pick other tokens.
    revised: what was said before and how it was broken, the oldest first; see `describe.challenge`."""

    rule: Rule
    learned: float
    held_out: float
    shuffled: float
    rivals: tuple[Rule, ...] = ()
    revised: tuple[Mapping[str, Any], ...] = ()

    @property
    def holds(self) -> bool:
        return self.held_out >= LEAST_F1 and self.held_out > self.shuffled

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Learned:
        """What `to_json` gave."""
        return cls(**{**data, "rivals": tuple(data["rivals"]), "revised": tuple(data["revised"])})


def learn(examples: PartExamples, seed: int = 0, made: Sequence[Example] = ()) -> Learned | None:
    """The best rule for a part's examples; None for fewer than eight on either half.

    made: generated inputs that a rule has to be right on as well; their values tell whether the part fires there.
    """
    halves = halves_of(examples, made)
    if halves is None:
        return None
    first, second = halves
    rule, f1, others = _best(first, first.fires)
    mixed = first.fires[torch.randperm(len(first.fires), generator=generator_for("learned", seed))]
    other = _best(first, mixed)[0]
    held_out = second.f1(second.picked(rule))
    rivals = _rivals(second, rule, held_out, others)
    return Learned(rule, f1, held_out, second.f1(second.picked(other)), rivals)


def _rivals(second: Sampled, rule: Rule, held_out: float, others: Sequence[Rule]) -> tuple[Rule, ...]:
    """Of other rules those that do as well on the other half, and pick other tokens there than those before them."""
    chosen, kept = [second.picked(rule)], list[Rule]()
    for other in others:
        picked = second.picked(other)
        overlaps = (float((picked & one).sum()) / max(int((picked | one).sum()), 1) for one in chosen)
        if second.f1(picked) >= held_out - AS_GOOD and max(overlaps) < ALIKE:
            chosen, kept = [*chosen, picked], [*kept, other]
    return tuple(kept[:RIVALS])


def halves_of(examples: PartExamples, made: Sequence[Example] = ()) -> tuple[Sampled, Sampled] | None:
    """Examples of even and of odd documents; None where either has too few that fire."""
    every = [*_all(examples), *((one, "made") for one in made)]
    first, second = (sampled(examples, [e for e in every if e[0].document % 2 == half]) for half in (0, 1))
    few = min(int(half.fires.sum()) for half in (first, second)) < FEWEST
    return None if few else (first, second)


def _all(examples: PartExamples) -> list[tuple[Example, str]]:
    kinds = (("fires", examples.sample), ("near", examples.near), ("usual", examples.background))
    return [(example, kind) for kind, some in kinds for example in some]


def sampled(examples: PartExamples, chosen: Sequence[tuple[Example, str]]) -> Sampled:
    """Rows for these examples. The sample stands for all tokens fired on; random tokens without activation for the
    rest, and near misses count as much as all that fires: they are what a rule about single tokens gets wrong. So do
    generated inputs."""
    rows = [(e, kind) for e, kind in chosen if kind != "usual" or e.value <= examples.threshold]
    counts = Counter(kind for _, kind in rows)
    share = dict.fromkeys(("fires", "near", "made"), examples.density) | {"usual": 1 - examples.density}
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
        torch.tensor(
            [kind == "fires" or (kind == "made" and e.value > examples.threshold) for e, kind in rows], dtype=torch.bool
        ),
        torch.tensor([share[kind] / counts[kind] for _, kind in rows], dtype=torch.float64),
        tuple(words),
    )


# The same few thousand tokens come again and again.
_word = lru_cache(2**17)(word_of)


def _best(sampled: Sampled, fires: Bool[Tensor, " row"]) -> tuple[Rule, float, list[Rule]]:
    """Clauses of one or two tests, one added after the other for as long as F1 rises; its F1; and the clauses that did
    about as well as the first, the best first."""
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
    alone = sampled.scores(picked, fires)
    others = alone.argsort(descending=True, stable=True)[: 10 * RIVALS].tolist()
    while len(chosen) < CLAUSES:
        scores = sampled.scores(picked | union, fires) if chosen else alone
        # Of equal ones the first, which is the simpler.
        at = int((scores == scores.max()).nonzero()[0])
        if float(scores[at]) < best + GAIN:
            break
        chosen, union, best = [*chosen, clauses[at]], union | picked[at], float(scores[at])
    near = [clauses[at] for at in others if float(alone[at]) >= best - AS_GOOD]
    return (chosen[0] if len(chosen) == 1 else {"any": chosen or [clauses[0]]}), best, near


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
