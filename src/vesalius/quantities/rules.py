"""Rules: statements about a token and the tokens before it that can be checked on any text.

    {"word": ["king", "queen"], "at": -1}    the token, or the one so far before it, is one of these words
    {"class": "digits", "at": 0}             ... is of a class: see `CLASSES`
    {"seen": ["invoice"], "within": 16}      one of these words is among the so many tokens before it
    {"all": [...]}   {"any": [...]}   {"not": {...}}

Words are tokens without the spaces around them, in lower case. A rule looks at text alone, never at a model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vesalius.errors import InputError, UnknownNameError

CLASSES: Mapping[str, re.Pattern[str]] = {
    "digits": re.compile(r"\s*\d+\s*"),
    "capitalised": re.compile(r"\s*[A-ZÀ-Þ][a-zß-ÿ]+"),
    "capitals": re.compile(r"\s*[A-ZÀ-Þ]{2,}"),
    "punctuation": re.compile(r"\s*[^\w\s]+\s*"),
    "line break": re.compile(r"\s*\n\s*"),
    "start of a word": re.compile(r"\s\w+"),
    "rest of a word": re.compile(r"\w+"),
}
FARTHEST, DEEPEST = 64, 8
Rule = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Text:
    """Tokens that rules are checked on. ids: [text, pos]; real: False on padding; decode: from a token to its text."""

    ids: Int[Tensor, "text pos"]
    real: Bool[Tensor, "text pos"]
    decode: Callable[[int], str]

    def of_words(self, words: Collection[str], back: int = 0) -> Bool[Tensor, "text pos"]:
        """Where the token, or the one `back` before it, is one of these words; False where there is none."""
        return self._where(torch.tensor([word in words for word in self._known[1]], dtype=torch.bool), back)

    def of_class(self, name: str, back: int = 0) -> Bool[Tensor, "text pos"]:
        """Where it is of a class (`CLASSES`)."""
        if name not in self._classes:
            fits = [CLASSES[name].fullmatch(token) is not None for token in self._known[0]]
            self._classes[name] = torch.tensor(fits, dtype=torch.bool)
        return self._where(self._classes[name], back)

    def _where(self, fits: Bool[Tensor, " token"], back: int) -> Bool[Tensor, "text pos"]:
        found = fits[self._known[2]] & self.real
        return torch.nn.functional.pad(found, (back, 0))[:, : found.shape[1]] if back else found

    @cached_property
    def _known(self) -> tuple[list[str], list[str], Int[Tensor, "text pos"]]:
        """The tokens that occur, each decoded once, their words, and which of them stands where."""
        known, place = self.ids.clamp_min(0).unique(return_inverse=True)
        tokens = [self.decode(token) for token in known.tolist()]
        return tokens, list(map(word_of, tokens)), place

    @cached_property
    def _classes(self) -> dict[str, Bool[Tensor, " token"]]:
        return {}


def word_of(token: str) -> str:
    """A token without the spaces around it, in lower case."""
    return token.strip().lower()


def matches(rule: Rule, text: Text) -> Bool[Tensor, "text pos"]:
    """The tokens that a rule picks. Raises InputError or UnknownNameError for what is no rule."""
    check_rule(rule)
    return _matches(rule, text) & text.real


def _matches(rule: Rule, text: Text) -> Tensor:
    kind = _kind(rule)
    if kind == "word":
        return text.of_words(set(rule["word"]), -int(rule.get("at", 0)))
    if kind == "class":
        return text.of_class(rule["class"], -int(rule.get("at", 0)))
    if kind == "seen":
        here = text.of_words(set(rule["seen"]))
        counts = torch.nn.functional.pad(here.long().cumsum(1), (1, 0))
        at = torch.arange(here.shape[1])
        return counts[:, at] > counts[:, (at - int(rule["within"])).clamp_min(0)]
    if kind == "not":
        return ~_matches(rule["not"], text)
    each = torch.stack([_matches(one, text) for one in rule[kind]])
    return each.all(0) if kind == "all" else each.any(0)


_FIELDS = {"word": {"word", "at"}, "class": {"class", "at"}, "seen": {"seen", "within"}}
_FIELDS |= {name: {name} for name in ("all", "any", "not")}


def _kind(rule: Rule) -> str:
    return next((name for name in _FIELDS if name in rule), "")


def check_rule(rule: Any, depth: int = 0) -> None:
    """Raises InputError or UnknownNameError, naming what is wrong, for what is no rule."""
    if not isinstance(rule, Mapping) or not _kind(rule):
        raise InputError(f"a rule is one of {', '.join(_FIELDS)}; got {rule!r:.100}")
    kind = _kind(rule)
    extra = set(rule) - _FIELDS[kind]
    if extra:
        raise UnknownNameError(f"field of a rule {kind!r}", min(extra), sorted(_FIELDS[kind]))
    if depth > DEEPEST:
        raise InputError(f"a rule of more than {DEEPEST} levels")
    if kind == "class" and rule["class"] not in CLASSES:
        raise UnknownNameError("class of tokens", str(rule["class"]), CLASSES)
    if kind in ("word", "seen") and (not rule[kind] or not all(isinstance(word, str) for word in rule[kind])):
        raise InputError(f"a rule {kind!r} lists words, at least one; got {rule[kind]!r:.100}")
    step = rule.get("within", -int(rule.get("at", 0)) if isinstance(rule.get("at", 0), int) else None)
    if not isinstance(step, int) or not 0 <= step <= FARTHEST:
        raise InputError(
            f"a rule looks at the token (at 0) or up to {FARTHEST} before it (-1, -2, ...); got {rule!r:.100}"
        )
    parts: Sequence[Any] = [rule["not"]] if kind == "not" else rule[kind] if kind in ("all", "any") else ()
    if kind in ("all", "any") and (not isinstance(parts, Sequence) or isinstance(parts, str) or not parts):
        raise InputError(f"a rule {kind!r} lists rules, at least one; got {parts!r:.100}")
    for part in parts:
        check_rule(part, depth + 1)


def reach(rule: Rule) -> int:
    """How many tokens before the one in question a rule looks at, at most."""
    kind = _kind(rule)
    if kind in ("word", "class"):
        return -int(rule.get("at", 0))
    if kind == "seen":
        return int(rule["within"])
    return max(map(reach, [rule["not"]] if kind == "not" else rule[kind]))


def in_words(rule: Rule) -> str:
    """A rule as a phrase, such as `on "king" after "the"`."""
    kind = _kind(rule)
    if kind in ("word", "class"):
        said = _listed(rule["word"]) if kind == "word" else _CLASS_WORDS[rule["class"]]
        at = int(rule.get("at", 0))
        return f"{_PLACE.get(at, f'{-at} tokens after')} {said}"
    if kind == "seen":
        return f"with {_listed(rule['seen'])} among the {rule['within']} tokens before"
    if kind == "not":
        return f"but not {in_words(rule['not'])}"
    return (", " if kind == "all" else ", or ").join(map(in_words, rule[kind]))


_PLACE = {0: "on", -1: "after", -2: "two tokens after"}
_CLASS_WORDS = {
    "digits": "digits",
    "capitalised": "a capitalised word",
    "capitals": "a word in capitals",
    "punctuation": "punctuation",
    "line break": "a line break",
    "start of a word": "the start of a word",
    "rest of a word": "the rest of a word",
}


def _listed(words: Sequence[str]) -> str:
    quoted = [f'"{word}"' for word in words]
    more = f" and {len(quoted) - 6} more" if len(quoted) > 6 else ""
    return ", ".join(quoted[:6]) + more
