"""Asking a language model: any server that speaks OpenAI's chat protocol, or a model in this process.

Answers are kept by the content of the question, so that a second run asks nothing twice and costs nothing. What goes
wrong is an error that says so, and never an answer.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from vesalius.errors import FileFormatError, InputError
from vesalius.inputs import Tokens
from vesalius.jobs import write_atomic
from vesalius.jobs.untrusted import parse_json, read_json
from vesalius.model import Model
from vesalius.protocol import content_hash

Messages = Sequence[Mapping[str, Any]]
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
# Too many requests, and what servers say when they are busy or starting.
_AGAIN = frozenset([408, 409, 425, 429, 500, 502, 503, 504])
_MOST_BYTES = 1 << 22


@runtime_checkable
class Chat(Protocol):
    """Answers a conversation. Raises InputError when there is no answer."""

    def complete(self, messages: Messages) -> str:
        """messages: each with `role` ("system", "user", "assistant") and `content`: text, or for models that see a list
        of parts of the protocol."""
        ...


@dataclass
class Usage:
    """What was asked so far: answers from the server, answers that were known, tokens, and tries that failed."""

    requests: int = 0
    known: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failures: int = 0

    def __str__(self) -> str:
        return (
            f"{self.requests} requests ({self.failures} failed tries), {self.known} answers known before, "
            f"{self.prompt_tokens:,} tokens asked and {self.completion_tokens:,} answered"
        )


@dataclass(frozen=True, eq=False)
class ServerChat:
    """A server of OpenAI's chat protocol (OpenAI, vLLM, llama.cpp, Ollama ...).

    url: up to and with its version, such as "http://localhost:8000/v1". key: sent as a bearer token; never stored.
    per_minute: requests at most. retries: further tries when the server is busy, down, or answers with junk; waits
    double from one second, or are as long as the server asks. cache: folder of the answers. Raises InputError when the
    server cannot be reached or gives no answer.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    temperature: float = 0.0
    max_tokens: int = 512
    timeout: float = 120.0
    retries: int = 4
    per_minute: float | None = None
    cache: str | Path | None = None
    usage: Usage = field(default_factory=Usage)
    wait: Callable[[float], None] = field(default=time.sleep, repr=False)
    _last: list[float] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise InputError(f"url must begin with http:// or https://; got {self.url!r}")

    def complete(self, messages: Messages) -> str:
        asked = {
            "model": self.model,
            "messages": [dict(one) for one in messages],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        kept = None if self.cache is None else Path(self.cache) / f"{content_hash(asked)}.json"
        if kept is not None and kept.exists():
            self.usage.known += 1
            return _answer(_known(kept))
        found = self._asked(asked)
        self.usage.requests += 1
        for name in ("prompt_tokens", "completion_tokens"):
            used = (found.get("usage") or {}).get(name, 0)
            setattr(self.usage, name, getattr(self.usage, name) + (used if isinstance(used, int) else 0))
        if kept is not None:
            write_atomic(kept, json.dumps({"asked": asked, "choices": found["choices"][:1]}))
        return _answer(found)

    def _asked(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The server's answer, after as many tries as it takes."""
        pause = FIRST_WAIT
        for left in range(self.retries, -1, -1):
            self._keep_to_the_rate()
            try:
                return self._tried(asked)
            except _BusyError as error:
                self.usage.failures += 1
                if not left:
                    raise InputError(
                        f"{self.url} gave no answer in {self.retries + 1} tries: {error}. Is the server up, and is "
                        f"{self.model!r} a model of it?"
                    ) from error
                self.wait(min(error.seconds or pause, LONGEST_WAIT))
                pause *= 2
        raise AssertionError

    def _tried(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        request = urllib.request.Request(  # noqa: S310 - http and https only, see __post_init__
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(asked).encode(), headers
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:  # noqa: S310
                raw = response.read(_MOST_BYTES + 1)
        except urllib.error.HTTPError as error:
            said = error.read(300).decode(errors="replace")
            if error.code in _AGAIN:
                raise _BusyError(f"status {error.code}", _seconds(error.headers.get("Retry-After"))) from error
            raise InputError(f"{self.url} refused the request with status {error.code}: {said}") from error
        except OSError as error:
            raise _BusyError(str(getattr(error, "reason", error))) from error
        try:
            found = parse_json(raw[:_MOST_BYTES].decode())
            _answer(found)
        except (ValueError, FileFormatError) as error:
            raise _BusyError(f"it answered with something else than a chat completion: {raw[:80]!r}") from error
        return dict(found)

    def _keep_to_the_rate(self) -> None:
        if self.per_minute is None:
            return
        now = time.monotonic()
        if self._last and now - self._last[0] < 60 / self.per_minute:
            self.wait(60 / self.per_minute - (now - self._last[0]))
        self._last[:] = [time.monotonic()]


class _BusyError(Exception):
    """Worth another try, after so many seconds if the server says how many."""

    def __init__(self, message: str, seconds: float | None = None) -> None:
        super().__init__(message)
        self.seconds = seconds


@dataclass(frozen=True, eq=False)
class ModelChat:
    """A model in this process, which answers with its likeliest tokens. Raises InputError without a chat template."""

    model: Model
    max_tokens: int = 256

    def complete(self, messages: Messages) -> str:
        tokenizer = self.model.tokenizer
        if any(not isinstance(one["content"], str) for one in messages):
            raise InputError(f"{self.model.name} takes text only; ask a server whose model sees")
        if getattr(tokenizer, "chat_template", None) is None:
            raise InputError(f"{self.model.name} has no chat template: it was not trained to answer")
        text = tokenizer.apply_chat_template(list(map(dict, messages)), tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        made = self.model.generate(Tokens(ids), self.max_tokens, stop=tokenizer.eos_token_id)
        return str(tokenizer.decode(list(made.new[0]), skip_special_tokens=True))


def _answer(found: Any) -> str:
    """The text of a chat completion. Raises ValueError for anything else."""
    try:
        text = found["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError("no choices[0].message.content") from error
    if not isinstance(text, str) or not text.strip():
        raise ValueError("an empty answer")
    return text


def _known(path: Path) -> Any:
    try:
        found = read_json(path)
        _answer(found)
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} is no kept answer ({error}); delete it, and it is asked again") from error
    return found


def _seconds(told: str | None) -> float | None:
    return float(told) if told and told.replace(".", "", 1).isdigit() else None
