"""Built-in tasks by name: questions with prompts of our own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vesalius.data.positions import Positions, named_positions
from vesalius.data.tasks import capitals as _capitals
from vesalius.data.tasks import gendered_pronoun as _gendered_pronoun
from vesalius.data.tasks import induction as _induction
from vesalius.data.tasks import ioi as _ioi
from vesalius.data.tasks import sva as _sva
from vesalius.data.tasks import swaps as _swaps
from vesalius.data.tasks.base import HasTokenizer, Row, build_pairs
from vesalius.errors import UnknownNameError
from vesalius.inputs import Pairs
from vesalius.inputs.beginning import bos_token

capitals = _capitals.capitals
gendered_pronoun = _gendered_pronoun.gendered_pronoun
induction = _induction.induction
ioi = _ioi.ioi
sva = _sva.sva
greater_than = _swaps.greater_than
translation = _swaps.translation
insecure_code = _swaps.insecure_code

__all__ = [
    "TASKS",
    "HasTokenizer",
    "Row",
    "Task",
    "bos_token",
    "build_pairs",
    "capitals",
    "gendered_pronoun",
    "greater_than",
    "induction",
    "insecure_code",
    "ioi",
    "sva",
    "task",
    "translation",
]


@dataclass(frozen=True)
class Task:
    """A built-in question.

    build(model, n=, seed=, corruption=, bos=, n_validation=) -> Pairs with the splits "discovery" and "validation".
    corruptions: what `corruption` may be, the default first. positions: named positions [example] of given pairs.
    """

    name: str
    question: str
    build: Callable[..., Pairs]
    corruptions: tuple[str, ...]
    positions: Callable[[Pairs], dict[str, Positions]] = named_positions


TASKS = {
    entry.name: entry
    for entry in (
        Task("capitals", "How does the model recall the capital of a country?", capitals, _capitals.CORRUPTIONS),
        Task(
            "gendered_pronoun",
            "How does the model decide which pronoun refers to a name?",
            gendered_pronoun,
            _gendered_pronoun.CORRUPTIONS,
        ),
        Task(
            "induction",
            "How does the model continue a sequence it has seen once before?",
            induction,
            _induction.CORRUPTIONS,
        ),
        Task(
            "ioi",
            "How does the model decide which of two names receives the object?",
            ioi,
            _ioi.CORRUPTIONS,
            _ioi.ioi_positions,
        ),
        Task(
            "sva",
            "How does the model make the verb agree with its subject when another noun stands between them?",
            sva,
            _sva.CORRUPTIONS,
        ),
        Task(
            "greater_than",
            "How does the model tell that what ends later has a later year?",
            greater_than,
            _swaps.CORRUPTIONS,
        ),
        Task("translation", "How does the model find a word's translation?", translation, _swaps.CORRUPTIONS),
        Task("insecure_code", "How does the model spot insecure code?", insecure_code, _swaps.CORRUPTIONS),
    )
}


def task(name: str) -> Task:
    """The built-in task of that name. Raises UnknownNameError, listing the known ones."""
    if name not in TASKS:
        raise UnknownNameError("task", name, TASKS, "Your own pairs: load_pairs('pairs.jsonl', model).")
    return TASKS[name]
