"""Origin: where a row of activations comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Origin:
    """Where a row comes from.

    document: number of the text, from 0, empty ones counted. token: number of the row's token in its document; -1 for
    the bos token. ids: the context as the model saw it, the bos token included. at: the row's position in
    it: no later token had any influence on a causal model's activation.
    """

    document: int
    token: int
    ids: tuple[int, ...]
    at: int

    def text(self, tokenizer: Any) -> tuple[str, str, str]:
        """What stands before the token, the token, and what comes after it, in this context."""
        pieces = (self.ids[: self.at], self.ids[self.at : self.at + 1], self.ids[self.at + 1 :])
        before, token, after = (str(tokenizer.decode(list(piece))) for piece in pieces)
        return before, token, after
