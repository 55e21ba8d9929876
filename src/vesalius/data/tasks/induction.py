"""Repeated random words: after "x1 .. xP x1 .. xk" comes x(k+1) again.

The test for induction heads of Elhage et al. 2021 ("A Mathematical Framework for Transformer Circuits") and Olsson et
al. 2022 (arXiv:2209.11895), with a random period, so that no fixed offset solves it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from math import perm
from typing import Any

import torch

from vesalius.data.tasks.base import (
    SPLITS,
    Encoded,
    HasTokenizer,
    assemble,
    continuation,
    shuffled,
    single_tokens,
    split_sizes,
    tokenizer_of,
    words,
)
from vesalius.errors import InputError
from vesalius.inputs import Pairs
from vesalius.seeds import generator_for

CORRUPTIONS = ("token",)
SHORTEST_PERIOD = 8
LEAST_REPEATED = 2

WORDS: Mapping[str, tuple[str, ...]] = {
    "discovery": words(
        "water green seven paper river quick music glass north wheel bread cloud laugh stone brown train "
        "field light horse clean sugar table eight metal voice plant heavy night chair round smile black "
        "mouth storm early floor grass sweet truck white knife ocean dance eagle small radio sheep apple "
        "angry tower fresh beach quiet thumb court happy island silver window thirty"
    ),
    "validation": words(
        "fire yellow three letter mountain slow song bottle south engine butter sky whisper iron red boat "
        "garden shadow rabbit dirty salt desk twelve wood sound tree gentle morning bench square tears "
        "blue finger wind late roof leaf bitter bus pink spoon lake jump bird large phone goat orange "
        "proud bridge warm coast loud elbow judge sad forest golden door forty"
    ),
}


def induction(
    model: HasTokenizer,
    n: int = 32,
    seed: int = 0,
    corruption: str = "token",
    bos: str = "auto",
    length: int = 40,
    n_validation: int | None = None,
) -> Pairs:
    """n pairs in the split "discovery" and n_validation (default n) in "validation": no shared word or period.

    A prompt is P different random words and the first k of them again, 2 <= k < P; the answer is word k + 1. P goes
    from 8 to length - 2, even periods in discovery and odd ones in validation; P + k <= length (the bos token
    comes on top). corrupted: the answer's one earlier occurrence is another word, the distractor. groups: "template"
    ("period P").

    Raises InputError for an n or a length that cannot be made, TokenizerError for a tokenizer with too few single-token
    words.
    """
    tokenizer = tokenizer_of(model)
    periods = {split: _periods(parity, length) for parity, split in enumerate(SPLITS)}
    ids = {split: _word_ids(tokenizer, split, 1 + max(periods[split])) for split in SPLITS}
    most = {split: len(periods[split]) * perm(len(ids[split]), min(periods[split])) for split in SPLITS}
    sizes = split_sizes(n, n_validation, most, "induction", corruption, CORRUPTIONS)
    rows = [row for split in SPLITS for row in _rows(split, periods[split], ids[split], sizes[split], seed, length)]
    return assemble(rows, tokenizer, bos=bos, corruption=corruption, task="induction")


def _periods(parity: int, length: int) -> list[int]:
    longest = min(len(listed) for listed in WORDS.values()) - 1
    if not SHORTEST_PERIOD + 3 <= length <= longest + LEAST_REPEATED:
        raise InputError(f"length is {length}; give {SHORTEST_PERIOD + 3} to {longest + LEAST_REPEATED} tokens")
    # Even periods in one split and odd ones in the other, so that they share none.
    return [p for p in range(SHORTEST_PERIOD, length - LEAST_REPEATED + 1) if p % 2 == parity]


def _word_ids(tokenizer: Any, split: str, need: int) -> list[int]:
    usable = single_tokens(tokenizer, WORDS[split], need, "words")
    return [(continuation(tokenizer, "and", f" {word}") or [])[0] for word in usable]


def _rows(split: str, periods: Sequence[int], ids: Sequence[int], n: int, seed: int, length: int) -> list[Encoded]:
    draw = generator_for("induction", split, seed)
    order = cycle(shuffled(periods, draw))
    seen: set[tuple[int, ...]] = set()
    rows: list[Encoded] = []
    while len(rows) < n:
        period = next(order)
        again = int(torch.randint(LEAST_REPEATED, min(period - 1, length - period) + 1, (), generator=draw))
        # One word more than the period: the corrupted prompt has it in place of the answer.
        *first, other = shuffled(ids, draw)[: period + 1]
        clean = (*first, *first[:again])
        if clean in seen:
            continue
        seen.add(clean)
        corrupted = [*clean[:again], other, *clean[again + 1 :]]
        rows.append(Encoded(clean, corrupted, [first[again]], [other], {"template": f"period {period}"}, split))
    return rows
