"""Challenge: inputs made to break a rule about a part before it is claimed, and the rule that they lead to.

Examples from text rarely show where a rule is wrong, because the rule was learned from them. So inputs are made that it
speaks about and that no text has: what the rule picks is written into other texts (the part should fire there), and
where it picks, a token is exchanged for a similar one, so that it picks no more (the part should be silent). Those that
break the rule are what it is learned from again. All of this is discovery: only the revised rule is claimed, and it is
tested on documents that neither rule has seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vesalius.describe.counterexamples import documents_of
from vesalius.describe.embedded import EMBED, embeddings_of
from vesalius.describe.example import Example, PartExamples
from vesalius.describe.learning import Learned, halves_of, learn
from vesalius.errors import InputError
from vesalius.inputs import Corpus, Tokens
from vesalius.inputs.beginning import speller
from vesalius.parts import Part
from vesalius.quantities import Runs
from vesalius.quantities.activation import counted, token_values
from vesalius.quantities.fires_where import picked
from vesalius.quantities.rules import Rule, Text, in_words, matches, reach
from vesalius.seeds import generator_for
from vesalius.stats import clopper_pearson

MADE = 32
"""Inputs of each kind."""
FIRST, LAST = 8, 48
"""Where in another text something is written: late enough for some context, early enough to be cheap."""
SIMILAR = 10
"""Tokens with the nearest embeddings, of which one takes the place of a token."""
TRIES = 6
SHOWN = 6


@dataclass(frozen=True, eq=False)
class Challenge:
    """How a rule stood inputs that were made to break it.

    placed: inputs that the rule picks the last token of; taken: those whose last token it no longer picks. usual: how
    often the part fires where the rule picks in text, and where it does not, beside which the shares are to be read.
    """

    part: Part
    rule: Rule
    threshold: float
    placed: tuple[Example, ...]
    taken: tuple[Example, ...]
    usual: tuple[float, float]

    @property
    def silent(self) -> tuple[Example, ...]:
        """Where the part should fire, and does not; the lowest value first."""
        return tuple(sorted((e for e in self.placed if e.value <= self.threshold), key=lambda e: e.value))

    @property
    def firing(self) -> tuple[Example, ...]:
        """Where it should not, and does; the highest value first."""
        return tuple(sorted((e for e in self.taken if e.value > self.threshold), key=lambda e: -e.value))

    @property
    def made(self) -> tuple[Example, ...]:
        return (*self.placed, *self.taken)

    @property
    def broken(self) -> tuple[Example, ...]:
        return (*self.silent, *self.firing)

    def to_json(self) -> dict[str, Any]:
        """The figures, without the inputs."""
        return {"rule": self.rule, "placed": len(self.placed), "silent": len(self.silent), "taken": len(self.taken),
                "firing": len(self.firing), "usual": list(self.usual)}  # fmt: skip

    @property
    def sentence(self) -> str:
        return (
            f"{in_words(self.rule)}: silent on {_of(self.silent, self.placed)} inputs that were given it "
            f"({1 - self.usual[0]:.0%} in text), fires on {_of(self.firing, self.taken)} from which it was taken "
            f"({self.usual[1]:.0%} in text)"
        )

    def _repr_html_(self) -> str:
        top = max((example.value for example in self.made), default=0.0)
        kinds = (("given what the rule picks, and silent", self.silent), ("robbed of it, and firing", self.firing))
        shown = "".join(f"<h4>{w}</h4>{''.join(e.html(top) for e in some[:SHOWN])}" for w, some in kinds if some)
        return f"<p>{escape(str(self.part))} {escape(self.sentence)}</p>{shown}"


def _of(some: Sequence[Example], every: Sequence[Example]) -> str:
    if not every:
        return "none of 0"
    low, high = clopper_pearson(len(some), len(every))
    return f"{len(some)} of {len(every)} [{low:.0%}, {high:.0%}]"


def challenge(
    runs: Runs, part: Part, rule: Rule, threshold: float = 0.0, *, made: int = MADE, seed: int = 0
) -> Challenge:
    """Make inputs that break a rule about a part, if there are any, from discovery texts.

    threshold: what the part fires above. made: inputs of each kind, at most: fewer where the rule picks nothing, or
    where no exchange of a token takes it away. The texts are cut behind the token in question, so this takes a model
    that reads forwards. Raises InputError for runs that are not on texts.
    """
    if not isinstance(runs.data, Corpus):
        raise InputError("a rule is challenged on texts; give vs.Runs(model, vs.Corpus(...))")
    values, here, real = token_values(runs, [part])[0], picked(runs, rule), counted(runs)
    fires = (values > threshold) & real
    maker = _Maker(runs, rule, seed)
    rows = [*maker.placed(here, made)]
    cut = len(rows)
    rows += maker.taken(here & fires if bool((here & fires).any()) else here, made)
    usual = tuple(float((fires & some).sum()) / max(int(some.sum()), 1) for some in (here, real & ~here))
    found = _read(runs, part, rows)
    return Challenge(part, rule, threshold, tuple(found[:cut]), tuple(found[cut:]), (usual[0], usual[1]))


def revise(examples: PartExamples, found: Learned, against: Challenge, seed: int = 0) -> Learned | None:
    """A rule learned from the examples and the made inputs together, where it does better than the one before.

    Both are judged on the half of documents that rules are not learned on, made inputs included. None: nothing does
    better. The rule knows what was said before: `Learned.revised`.
    """
    if not against.broken:
        return None
    better, halves = learn(examples, seed, against.made), halves_of(examples, against.made)
    if better is None or halves is None:
        return None
    before = halves[1].f1(halves[1].picked(found.rule))
    if better.rule == found.rule or better.held_out <= before:
        return None
    step: Mapping[str, Any] = {**against.to_json(), "f1": before, "f1_revised": better.held_out}
    return replace(better, revised=(*found.revised, step))


class _Maker:
    """Makes token ids whose last token a rule picks, or picks no more."""

    def __init__(self, runs: Runs, rule: Rule, seed: int) -> None:
        assert isinstance(runs.data, Corpus)
        self._runs, self._rule, self._tokens = runs, rule, runs.data.tokens
        self._spell = speller(runs.model.tokenizer)
        self._draw = generator_for("challenge", seed)
        self._window = reach(rule) + 1
        self._known = self._tokens.ids.cpu()[counted(runs)].unique()
        self._number_of = {token: number for number, token in enumerate(self._known.tolist())}

    def placed(self, here: Bool[Tensor, "text pos"], most: int) -> list[tuple[int, list[int]]]:
        """What the rule picks, with what it looks at, written into other texts. With the number of that text."""
        rows = []
        for row, at in self._some(here, most):
            other = self._other(row)
            longest = min(int(self._tokens.lengths[other]), LAST)
            first = self._number(FIRST, longest) if longest > FIRST else longest
            window = self._tokens.ids[row, max(at + 1 - self._window, 1) : at + 1].tolist()
            rows.append((other, self._tokens.ids[other, :first].tolist() + window))
        hits = self._picks([ids for _, ids in rows])
        return [row for row, hit in zip(rows, hits, strict=True) if hit]

    def taken(self, here: Bool[Tensor, "text pos"], most: int) -> list[tuple[int, list[int]]]:
        """Places that the rule picks, with a token that it looks at exchanged so that it does not."""
        found = []
        for row, at in self._some(here, most):
            start = max(1, at + 1 - LAST)
            ids = self._tokens.ids[row, [0, *range(start, at + 1)]].tolist() if at else [int(self._tokens.ids[row, 0])]
            tried = [self._exchanged(ids) for _ in range(TRIES)]
            free = [one for one, hit in zip(tried, self._picks(tried), strict=True) if not hit]
            found += [(row, free[0])] if free else []
        return found

    def _exchanged(self, ids: list[int]) -> list[int]:
        at = len(ids) - 1 - self._number(0, min(self._window, len(ids)))
        return [*ids[:at], self._instead(ids[at]), *ids[at + 1 :]]

    def _instead(self, token: int) -> int:
        """A token like this one, by embedding where the model has one for tokens, else any of the texts."""
        table = self._embeddings()
        if table is None or token not in self._number_of:
            return int(self._known[self._number(0, len(self._known))])
        near = (table @ table[self._number_of[token]]).topk(min(SIMILAR + 1, len(table))).indices
        return int(self._known[near[self._number(0, len(near))]])

    def _embeddings(self) -> Tensor | None:
        """Of the tokens of the texts, of unit length."""

        def compute() -> Tensor | None:
            try:
                found = embeddings_of(self._runs.model, Tokens(self._known[:, None]))[:, 0].float().cpu()
            except InputError:
                return None
            return torch.nn.functional.normalize(found - found.mean(0), dim=-1)

        return self._runs.once((EMBED, "of the tokens of these texts"), compute)

    def _picks(self, rows: Sequence[Sequence[int]]) -> list[bool]:
        """Whether the rule picks the last token of each."""
        if not rows:
            return []
        tokens = Tokens.from_rows(rows)
        found = matches(self._rule, Text(tokens.ids, tokens.real, self._spell))
        hits: list[bool] = found[torch.arange(len(rows)), tokens.lengths - 1].tolist()
        return hits

    def _some(self, here: Bool[Tensor, "text pos"], most: int) -> Int[Tensor, "place 2"]:
        places = here.nonzero()
        return places[torch.randperm(len(places), generator=self._draw)[:most]]

    def _other(self, row: int) -> int:
        """The number of another text, where there is one."""
        n = len(self._tokens)
        return int(row) if n == 1 else (int(row) + 1 + self._number(0, n - 1)) % n

    def _number(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=self._draw))


def _read(runs: Runs, part: Part, rows: Sequence[tuple[int, list[int]]]) -> list[Example]:
    """The part's value on the last token of each, as examples; each is of the document of its text."""
    if not rows:
        return []
    made = Runs(runs.model, Corpus(Tokens.from_rows([ids for _, ids in rows])), seed=runs.seed, sink=runs.sink)
    values, spell = token_values(made, [part])[0], speller(runs.model.tokenizer)
    documents = documents_of(runs)
    return [
        Example(
            value=float(values[number, len(ids) - 1]),
            tokens=tuple(map(spell, ids)),
            ids=tuple(ids),
            values=tuple(values[number, : len(ids)].tolist()),
            at=len(ids) - 1,
            document=documents[row],
            offset=len(ids) - 1,
        )
        for number, (row, ids) in enumerate(rows)
    ]
