"""The task of the planted network: "... A B ... D C ... A" has the answer B and the distractor C.

swap      A and D change places before B and C: the same tokens, but now C is right
shuffle   the first A, B, D and C become four other tokens: nothing answers the last A any more
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, permutations

import torch

from vesalius.errors import InputError
from vesalius.inputs import Pairs, pad_rows
from vesalius.toys.planted import VOCAB

SPLITS = ("discovery", "validation")
CORRUPTIONS = ("swap", "shuffle")
TEMPLATES = 12
"""Layouts of a split."""
NAMES = 24
"""Pairs of answer and distractor of a split: 12 pairs of tokens, in both orders."""
FILLERS = tuple(range(len(SPLITS) * NAMES, VOCAB))
SHORTEST, LONGEST = 10, 18


@dataclass(frozen=True)
class Layout:
    """Where the pairs "A B" and "D C" begin in a prompt of `length` tokens."""

    length: int
    first: int
    other: int

    def __str__(self) -> str:
        return f"length {self.length}, A B at {self.first}, D C at {self.other}"


@dataclass(frozen=True)
class _Row:
    """One clean prompt and its corruptions."""

    clean: tuple[int, ...]
    corrupted: tuple[tuple[int, ...], ...]
    answer: int
    distractor: int
    template: str
    names: str
    split: str


def planted_pairs(n: int = 24, seed: int = 0) -> dict[str, Pairs]:
    """n prompts in each of the splits "discovery" and "validation", under each corruption: name -> Pairs.

    groups: "template" (12 layouts per split) and "names" (12 pairs of tokens per split, each in both orders); the
    splits share neither, nor any answer or distractor token. Raises InputError for n below 2.
    """
    if n < 2:
        raise InputError(f"n is {n}; give at least 2 prompts per split")
    generator = torch.Generator().manual_seed(seed)
    layouts = _layouts(generator)
    rows = []
    for number, split in enumerate(SPLITS):
        some = layouts[number * TEMPLATES : (number + 1) * TEMPLATES]
        rows += _rows(n, split, some, range(number * NAMES, (number + 1) * NAMES), generator)
    return {name: _pairs(rows, number, name) for number, name in enumerate(CORRUPTIONS)}


def _layouts(generator: torch.Generator) -> list[Layout]:
    """Layouts for both splits, all different; each with its mirror image, so that order carries no information."""
    possible = [
        Layout(length, first, other)
        for length in range(SHORTEST, LONGEST + 1)
        for first, other in permutations(range(1, length - 3), 2)
        if other - first >= 3
    ]
    drawn = [possible[int(i)] for i in torch.randperm(len(possible), generator=generator)[:TEMPLATES]]
    return [twin for one in drawn for twin in (one, Layout(one.length, one.other, one.first))]


def _rows(
    n: int, split: str, layouts: Sequence[Layout], tokens: Sequence[int], generator: torch.Generator
) -> list[_Row]:
    mixed = [tokens[int(i)] for i in torch.randperm(len(tokens), generator=generator)]
    names = [pair for one in zip(mixed[::2], mixed[1::2], strict=True) for pair in (one, one[::-1])]
    # All pairs of tokens before any comes in its other order, and one layout after the other.
    order = cycle([*names[::2], *names[1::2]])
    seen: set[tuple[int, ...]] = set()
    rows: list[_Row] = []
    for layout in cycle(layouts):
        row = _row(layout, next(order), split, generator)
        if row.clean not in seen:
            rows.append(row)
            seen.add(row.clean)
        if len(rows) == n:
            break
    return rows


def _row(layout: Layout, names: tuple[int, int], split: str, generator: torch.Generator) -> _Row:
    answer, distractor = names
    draw = [FILLERS[int(i)] for i in torch.randperm(len(FILLERS), generator=generator)]
    (a, d, *others), fill = draw[:6], draw[6:]
    body = [fill[int(i)] for i in torch.randint(len(fill), (layout.length,), generator=generator)]
    clean = _filled(body, layout, (a, answer), (d, distractor), a)
    swap = _filled(body, layout, (d, answer), (a, distractor), a)
    shuffle = _filled(body, layout, (others[0], others[1]), (others[2], others[3]), a)
    label = "{} and {}".format(*sorted(names))
    return _Row(clean, (swap, shuffle), answer, distractor, str(layout), label, split)


def _filled(
    body: Sequence[int], layout: Layout, first: tuple[int, int], other: tuple[int, int], last: int
) -> tuple[int, ...]:
    filled = list(body)
    filled[layout.first : layout.first + 2] = first
    filled[layout.other : layout.other + 2] = other
    filled[-1] = last
    return tuple(filled)


def _pairs(rows: Sequence[_Row], number: int, corruption: str) -> Pairs:
    clean, lengths = pad_rows([row.clean for row in rows])
    corrupted, _ = pad_rows([row.corrupted[number] for row in rows])
    return Pairs(
        clean=clean,
        corrupted=corrupted,
        answer=torch.tensor([row.answer for row in rows]),
        distractor=torch.tensor([row.distractor for row in rows]),
        lengths=lengths,
        groups={"template": tuple(row.template for row in rows), "names": tuple(row.names for row in rows)},
        splits=tuple(row.split for row in rows),
        corruption=corruption,
        task="planted induction",
        bos="none",
    )
