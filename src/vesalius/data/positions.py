"""Named positions of prompts, found from the token ids alone: where the answer is, where the distractor is."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vesalius.inputs import Pairs

Positions = Int[Tensor, "example"]


def named_positions(pairs: Pairs, tokenizer: Any = None) -> dict[str, Positions]:
    """Positions [example] that any pair has; -1 where there is none.

    "end": where the metric reads. "answer": first position of the answer token in the clean prompt.
    "distractor_first", "distractor_last": first position of the distractor token, and its last one when it is
    repeated. "changed", "changed_last": first and last position where clean and corrupted differ. Only positions up to
    "end" count.

    With a tokenizer, a word is the same word with and without its leading space ("Anna" at the very start of a text).
    """
    within = torch.arange(pairs.clean.shape[1], device=pairs.clean.device)[None] <= pairs.at[:, None]
    answer = _holds(pairs, pairs.answer, tokenizer) & within
    distractor = _holds(pairs, pairs.distractor, tokenizer) & within
    return {
        "end": pairs.at.clone(),
        "answer": _first(answer),
        "distractor_first": _first(distractor),
        "distractor_last": torch.where(distractor.sum(1) > 1, _last(distractor), -1),
        "changed": _first(pairs.differs & within),
        "changed_last": _last(pairs.differs & within),
    }


def _holds(pairs: Pairs, token: Int[Tensor, example * token], tokenizer: Any) -> Bool[Tensor, "example pos"]:
    if token.ndim > 1:
        return _holds_sequence(pairs, token)
    found = pairs.clean == token[:, None]
    if tokenizer is None:
        return found
    # "Anna" at the start of a text and " Anna" elsewhere are two tokens of one word.
    other = {int(t): _respaced(tokenizer, int(t)) for t in token.unique()}
    return found | (pairs.clean == torch.tensor([other[int(t)] for t in token], device=token.device)[:, None])


def _holds_sequence(pairs: Pairs, tokens: Int[Tensor, "example token"]) -> Bool[Tensor, "example pos"]:
    """Where an answer of several tokens begins that ends where the metric reads, or before."""
    past_end = torch.arange(pairs.clean.shape[1], device=pairs.clean.device)[None] > pairs.at[:, None]
    # What lies past the end may be padding, and is no part of an answer.
    padded = torch.nn.functional.pad(pairs.clean.masked_fill(past_end, -2), (0, tokens.shape[1]), value=-2)
    windows = padded.unfold(1, tokens.shape[1], 1)[:, : pairs.clean.shape[1]]
    return ((windows == tokens[:, None]) | (tokens < 0)[:, None]).all(2)


def _respaced(tokenizer: Any, token: int) -> int:
    """The same word without its leading space (or with one), if that is a single token; else the token itself."""
    text = tokenizer.decode([token])
    other = text[1:] if text.startswith(" ") else f" {text}"
    ids = tokenizer.encode(other, add_special_tokens=False) if other.strip() else []
    return int(ids[0]) if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else token


def _first(where: Bool[Tensor, "example pos"]) -> Positions:
    # argmax gives the first of equal values.
    return torch.where(where.any(1), where.int().argmax(1), -1)


def _last(where: Bool[Tensor, "example pos"]) -> Positions:
    return torch.where(where.any(1), where.shape[1] - 1 - where.flip(1).int().argmax(1), -1)
