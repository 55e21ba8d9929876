"""Rules from a language model: it is shown examples, and answers with a rule that can be wrong.

What it says is held to the same as a learned rule: its F1 on examples that it was not shown, shuffled labels, and then
claims on fresh texts. An answer that is no rule is counted as that, and is never a score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template
from typing import Any

import torch

from vesalius.describe.client import Chat
from vesalius.describe.example import Example, PartExamples
from vesalius.describe.examples import ActivatingExamples
from vesalius.describe.learned import LearnedRules
from vesalius.describe.learning import Learned, halves_of
from vesalius.errors import InputError
from vesalius.jobs import Sink, track
from vesalius.jobs.progress import shown
from vesalius.jobs.untrusted import parse_json
from vesalius.parts import Part
from vesalius.quantities import FIRES_WHERE
from vesalius.quantities.rules import CLASSES, Rule, check_rule
from vesalius.seeds import generator_for

LABEL = "rule of a language model"
SHOWN = 12
"""Examples of each kind that it is shown, of those on one half of the documents."""


@dataclass(frozen=True, eq=False)
class Asked:
    """rules: a describer that claims what was answered. sentences: what the model says of a part, in words. unusable:
    part -> why its answer is no rule."""

    rules: LearnedRules
    sentences: Mapping[Part, str]
    unusable: Mapping[Part, str]

    def __repr__(self) -> str:
        return f"Asked({len(self.sentences)} answers, {len(self.unusable)} unusable)"


def ask_rules(
    chat: Chat,
    examples: ActivatingExamples,
    parts: Sequence[Part] | None = None,
    *,
    predicts: Sequence[str] = (FIRES_WHERE.name,),
    seed: int = 0,
    sink: Sink | None = None,
) -> Asked:
    """Ask for a rule for each part that fires often enough; the others are asked nothing about.

    parts: default all of the examples. predicts: see `LearnedRules`. Raises InputError when the chat gives no answer at
    all; with a `cache`, what was answered before is not asked again.
    """
    rules = LearnedRules(examples, seed, LABEL, predicts=tuple(predicts))
    sentences, unusable = {}, {}
    with shown(sink) as screen:
        for part in track(list(parts or examples.parts), "ask about parts", None, screen):
            halves = halves_of(examples[part])
            rules.recall(part, None)
            if halves is None:
                continue
            answer = chat.complete([{"role": "user", "content": prompt_for(examples[part])}])
            try:
                sentences[part], rule = understood(answer)
            except InputError as error:
                unusable[part] = str(error)
                continue
            first, second = halves
            mixed = second.fires[torch.randperm(len(second.fires), generator=generator_for("asked", seed))]
            picked = second.picked(rule)
            rules.recall(
                part,
                Learned(
                    rule,
                    first.f1(first.picked(rule)),
                    second.f1(picked),
                    float(second.scores(picked[None], mixed)[0]),
                ),
            )
    return Asked(rules, sentences, unusable)


def prompt_for(examples: PartExamples) -> str:
    """The question about a part, with examples of the half of the documents that it is not held to."""
    text = Template(files("vesalius.describe").joinpath("prompts/rule.txt").read_text(encoding="utf-8"))
    seen = [one for one in examples.sample if one.document % 2 == 0]
    step = max(1, len(seen) // SHOWN)
    silent = [one for one in (*examples.near, *examples.background) if one.document % 2 == 0]
    quiet = [one for one in silent if one.value <= examples.threshold]
    return text.substitute(
        classes=", ".join(CLASSES),
        fires="\n".join(map(_marked, seen[::step][:SHOWN])),
        silent="\n".join(map(_marked, quiet[:SHOWN])) or "(none)",
    )


def understood(answer: str) -> tuple[str, Rule]:
    """The sentence and the rule of an answer. Raises InputError for one that holds no rule."""
    start, end = answer.find("{"), answer.rfind("}")
    try:
        found: Any = parse_json(answer[start : end + 1])
        rule, sentence = found["rule"], found.get("sentence", "")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"no JSON object with a rule in the answer {answer[:80]!r}") from error
    check_rule(rule)
    return str(sentence), rule


def _marked(example: Example) -> str:
    before = "".join(example.tokens[: example.at]).replace("\n", " ")
    token = example.token.strip() or repr(example.token)
    return f"{before}«{token}»"
