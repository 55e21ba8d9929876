"""Places in a prompt, by name: the named_positions of a task, places beside them, and places any prompt has.

end, answer, distractor_first, distractor_last, changed, changed_last    named_positions (see `data.named_positions`)
distractor_first+1                                         the position after a named position
first                                                      position 0
earlier_end+1                                              after the last earlier occurrence of the token at the end
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from vesalius.errors import PairsError, UnknownNameError
from vesalius.quantities.runs import Runs

Positions = Int[Tensor, " example"]

_WORDS = {
    "end": "the last position",
    "answer": "the answer",
    "distractor_first": "the distractor's first mention",
    "distractor_last": "the distractor's repetition",
    "changed": "the first changed token",
    "changed_last": "the subject's last token",
    "first": "the first position",
    "earlier_end": "the earlier occurrence of the last token",
    "others": "the mean of all other positions",
    "previous": "the position before",
    "two back": "the position two back",
    "every": "each position",
}


def in_words(place: str) -> str:
    """A place as people say it."""
    name, _, after = place.partition("+")
    words = _WORDS.get(name, name)
    return f"the token after {words}" if after else words


def positions(runs: Runs, place: str) -> Positions:
    """Position [example] of a named place in every clean prompt.

    Raises UnknownNameError for an unknown name, PairsError when a prompt has no such place (or it lies past the end).
    """
    found = _marked(runs, place)
    end = runs.named_positions["end"]
    absent = (found < 0) | (found > end)
    if bool(absent.any()):
        raise PairsError(
            f"{int(absent.sum())} of {len(found)} prompts have no {place!r} ({in_words(place)}), "
            f"the first is prompt {int(absent.nonzero()[0])}"
        )
    return found


def present(runs: Runs, *places: str) -> bool:
    """Whether every prompt has all of these places."""
    end = runs.named_positions["end"]
    return all(bool(((found := _marked(runs, place)) >= 0).all() and (found <= end).all()) for place in places)


def _marked(runs: Runs, place: str) -> Positions:
    """Positions, -1 where there is none."""
    name, _, offset = place.partition("+")
    marks = runs.named_positions
    if name == "first":
        found = torch.zeros_like(marks["end"])
    elif name == "earlier_end":
        found = _earlier_end(runs)
    elif name in marks and (not offset or offset.isdigit()):
        found = marks[name]
    else:
        raise UnknownNameError(
            "place", place, [*marks, "first", "earlier_end"], "A named position may be followed by +1."
        )
    return torch.where(found >= 0, found + int(offset or 0), -1)


def _earlier_end(runs: Runs) -> Positions:
    clean, end = runs.pairs.clean, runs.named_positions["end"]
    width = clean.shape[1]
    same = clean == clean.gather(1, end[:, None])
    same &= torch.arange(width)[None] < end[:, None]
    last = width - 1 - same.flip(1).int().argmax(1)
    return torch.where(same.any(1), last, -1)
