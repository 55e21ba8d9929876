"""A language model as answerer and reasoner of `reasoning_faithfulness`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vesalius.describe.reasoning import Question
from vesalius.errors import InputError
from vesalius.model import Model

LETTERS = "ABCDEFGH"
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class ModelAnswerer:
    """Probabilities of a question's choices, by their letters; `reason` writes reasoning, `wrap` fits it to a chat.

    The prompt is the question, its choices by letter, the reasoning and "The answer is (". Raises InputError for more
    than 8 choices, and for a tokenizer in which a letter is not one token.
    """

    model: Model
    new_tokens: int = 64
    ask: str = "Let's think step by step."
    end: str = "The answer is ("

    def __call__(self, question: Question, reasoning: Sequence[str]) -> list[float]:
        """As `Answerer`."""
        letters = self._letters(question)
        text = f"{self._prompt(question)} {' '.join(reasoning)}\n{self.end}" if reasoning else self._direct(question)
        with torch.no_grad():
            logits = self.model.run(text, last_logits=True).logits[0, -1].float()
        return [float(share) for share in logits[letters].softmax(0)]

    def reason(self, question: Question, beginning: Sequence[str] = ()) -> tuple[str, ...]:
        """As `Reasoner`: sentences after the beginning, up to the first line break. Greedy."""
        begun = " ".join([self._prompt(question), *beginning])
        text = self.model.generate(begun, self.new_tokens).texts[0].strip().split("\n")[0]
        return tuple(filter(None, map(str.strip, _SENTENCE.split(text))))

    def _prompt(self, question: Question) -> str:
        return f"{self._asked(question)}\n{self.ask}"

    def _direct(self, question: Question) -> str:
        return f"{self._asked(question)}\n{self.end}"

    def _asked(self, question: Question) -> str:
        listed = "\n".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False))
        return f"{question.text}\n{listed}"

    def _letters(self, question: Question) -> list[int]:
        if len(question.choices) > len(LETTERS):
            raise InputError(f"at most {len(LETTERS)} choices; {question.text!r} has {len(question.choices)}")
        if self.model.tokenizer is None:
            raise InputError(f"{self.model.name} has no tokenizer to be asked with")
        ids = [
            self.model.tokenizer.encode(letter, add_special_tokens=False) for letter in LETTERS[: len(question.choices)]
        ]
        if any(len(one) != 1 for one in ids):
            raise InputError(f"the letters of choices are not single tokens for {self.model.name}")
        return [int(one[0]) for one in ids]
