"""Prompts on which a model should fail, if what is said of one of its parts is right, and others to compare with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vesalius.errors import InputError
from vesalius.inputs import Corpus, Pairs
from vesalius.parts import Part
from vesalius.quantities import Runs
from vesalius.quantities.activation import counted, token_values
from vesalius.quantities.fires_where import picked
from vesalius.quantities.rules import Rule
from vesalius.seeds import generator_for

PLANTED, MATCHED = "planted", "matched"


def foretold(
    runs: Runs, part: Part, rule: Rule, pairs: Pairs, *, threshold: float = 0.0, length: int = 8, seed: int = 0
) -> Pairs:
    """Each prompt twice: behind a piece of text on which the part fires, and behind one of equal length on which it
    does not.

    runs: on texts, from which the pieces of `length` tokens come; the first kind ends on a token that the rule picks
    and that the part fires on, in the second the rule picks nothing and the part is silent. Pieces are put behind the
    first token of each prompt where that is its bos, else before it. Returns all prompts of the first kind, then all of
    the second; the group "prompt" tells which belong together. Whether the model fails more often on the first is the
    quantity `fails_where`, with {"rule": rule, "until": length + 1}. Raises InputError for runs without texts, pairs
    that are no prompts of token ids, and texts without pieces of both kinds.
    """
    if not isinstance(runs.data, Corpus):
        raise InputError("pieces of text are taken from a corpus; give vs.Runs(model, vs.Corpus(...))")
    if pairs.raw or pairs.decoder is not None or pairs.named_positions:
        raise InputError(
            "these pairs cannot be lengthened: give prompts of one sequence, with no positions of their own"
        )
    values, here, real = token_values(runs, [part])[0], picked(runs, rule), counted(runs)
    fires = (values > threshold) & real
    quiet = ~_within(here | fires, length)
    kinds = {PLANTED: here & fires, MATCHED: quiet}
    generator = generator_for("foretold", seed)
    pieces = [_pieces(runs.data, mask, real, length, len(pairs), name, generator) for name, mask in kinds.items()]
    first = int(bool(pairs.bos and pairs.bos != "none"))
    return _joined(*(_behind(pairs, piece, first) for piece in pieces))


def _within(mask: Bool[Tensor, "text pos"], length: int) -> Bool[Tensor, "text pos"]:
    """Whether any of the last so many tokens is marked."""
    counts = torch.nn.functional.pad(mask.long().cumsum(1), (length, 0))
    return counts[:, length:] > counts[:, : mask.shape[1]]


def _pieces(
    corpus: Corpus, ends: Tensor, real: Tensor, length: int, count: int, kind: str, generator: torch.Generator
) -> Int[Tensor, "prompt length"]:
    """Token ids of pieces that end at marked tokens, at random."""
    at = torch.arange(ends.shape[1])
    places = (ends & real & (at >= length)).nonzero()
    if not len(places):
        raise InputError(f"the texts hold no piece of {length} tokens of the kind {kind!r}; give more texts")
    drawn = places[torch.randint(len(places), (count,), generator=generator)]
    columns = drawn[:, 1:] - length + 1 + torch.arange(length)
    return corpus.tokens.ids.cpu()[drawn[:, :1], columns]


def _behind(pairs: Pairs, pieces: Tensor, first: int) -> Pairs:
    sides: dict[str, Any] = {
        side: torch.cat([ids[:, :first], pieces, ids[:, first:]], 1)
        for side, ids in (("clean", pairs.clean), ("corrupted", pairs.corrupted))
    }
    groups = {**pairs.groups, "prompt": tuple(map(str, range(len(pairs))))}
    longer = pieces.shape[1]
    return replace(pairs, **sides, lengths=pairs.size + longer, read=pairs.at + longer, groups=groups, rows_of=None)


def _joined(one: Pairs, other: Pairs) -> Pairs:
    tensors = ("clean", "corrupted", "answer", "distractor", "lengths", "read")
    whole: dict[str, Any] = {name: torch.cat([getattr(one, name), getattr(other, name)]) for name in tensors}
    groups = {name: (*labels, *other.groups[name]) for name, labels in one.groups.items()}
    return replace(one, **whole, groups=groups, splits=(*one.splits, *other.splits))
