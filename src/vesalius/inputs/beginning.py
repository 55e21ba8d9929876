"""What stands at the beginning of a text: one policy, for everything that turns text into tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor

from vesalius.errors import InputError, TokenizerError

# They begin and end a chat turn. What follows `<|im_start|>` is the name of a role, so that it must not stand before
# plain text: on the demo model, names in the first position were no longer recognised behind it.
CHAT_MARKERS = ("<|im_start|>", "<|im_end|>")
DOCUMENT_SEPARATOR = "<|endoftext|>"


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Special and added tokens, in the order of their ids."""
    added = getattr(tokenizer, "added_tokens_encoder", {})
    known = dict.fromkeys([*tokenizer.all_special_tokens, *added])
    return tuple(sorted(known, key=tokenizer.convert_tokens_to_ids))


def bos_token(tokenizer: Any, bos: str = "auto") -> str:
    """The token put before every text, or "none".

    "tokenizer": what the tokenizer itself puts there (Gemma, Llama 3; nothing in GPT-2). "auto": the same, and where
    that is nothing its bos token, else its eos token, else `<|endoftext|>`, else none; chat markers are passed over.
    "none": nothing. Otherwise the text of a special token. Raises TokenizerError for a token that is not one.
    """
    special = special_tokens(tokenizer)
    own = _own(tokenizer)
    if bos == "tokenizer" or (bos == "auto" and own != "none"):
        return own
    if bos == "auto":
        candidates = (tokenizer.bos_token, tokenizer.eos_token, DOCUMENT_SEPARATOR)
        return next((token for token in candidates if token in special and token not in CHAT_MARKERS), "none")
    if bos != "none" and bos not in special:
        raise TokenizerError(
            f"bos {bos!r} is not a special token of this tokenizer. It has: "
            f"{', '.join(special) or '(none)'}. Give one of these, 'tokenizer', 'auto' or 'none'"
        )
    return bos


def listed_texts(texts: Any) -> list[str]:
    """One text or several as a list. Raises InputError for what is no text, such as tokens."""
    listed = [texts] if isinstance(texts, str) else list(texts) if isinstance(texts, Sequence) else [texts]
    bad = next((item for item in listed if not isinstance(item, str)), None)
    if bad is None:
        return listed
    hint = "; tokens need no tokenizer: give them to run()" if isinstance(bad, Tensor | Mapping) else ""
    raise InputError(f"texts must be a str or a list of str; got {type(bad).__name__}{hint}")


def begun(ids: Sequence[int], first: int | None) -> list[int]:
    """Token ids with the bos token in front; one that is there already is not doubled."""
    return list(ids) if first is None or list(ids[:1]) == [first] else [first, *ids]


def encoded(tokenizer: Any, text: str, bos: str) -> list[int]:
    """Token ids of a text. "tokenizer": as it encodes texts, what it puts behind them too (BERT, T5); see `bos_token`.

    Raises TokenizerError for an unknown bos.
    """
    plain = [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    name = bos_token(tokenizer, bos)
    first = None if name == "none" else int(tokenizer.convert_tokens_to_ids(name))
    if bos != "tokenizer" or not plain:
        return plain and begun(plain, first)
    ids = [int(token) for token in tokenizer.encode(text, add_special_tokens=True)]
    # A text that begins with the token already would have it twice.
    return ids[1:] if first is not None and ids[:2] == [first, first] and plain[:1] == [first] else ids


def speller(tokenizer: Any) -> Callable[[int], str]:
    """From a token to its text, each decoded once; without a tokenizer to its number."""
    return cache(lambda token: str(token) if tokenizer is None else str(tokenizer.decode([token])))


def _own(tokenizer: Any) -> str:
    """The one token that the tokenizer puts before a text by itself, or "none"."""
    if not tokenizer.encode("", add_special_tokens=True):
        return "none"
    plain, full = (list(tokenizer.encode("a", add_special_tokens=added)) for added in (False, True))
    if not plain or full[: len(plain)] == plain or not full:
        return "none"
    return str(tokenizer.convert_ids_to_tokens(full[0]))
