"""A language model behind a real local server is asked, waited for, remembered and never believed."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import vesalius as vs
from test_learned import PLANTED, planted
from vesalius.describe.asked import ask_rules, prompt_for, understood
from vesalius.describe.client import Chat, ModelChat, ServerChat
from vesalius.errors import FileFormatError, InputError, UnknownNameError

QUESTION = [{"role": "user", "content": "why?"}]
Reply = tuple[int, bytes, dict[str, str]]


def completion(text: str) -> Reply:
    body = {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}
    return 200, json.dumps(body).encode(), {}


@dataclass
class Server:
    """Gives these replies one after the other, the last one again and again."""

    replies: list[Reply] = field(default_factory=list)
    seen: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.seen.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            status, raw, headers = state.replies.pop(0) if len(state.replies) > 1 else state.replies[0]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: Any) -> None:
            """Quietly."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def chat_of(server: Server, waits: list[float] | None = None, **more: Any) -> ServerChat:
    return ServerChat(server.url, "tiny", wait=(waits if waits is not None else []).append, **more)


def test_a_question_reaches_the_server_and_its_answer_comes_back(server: Server) -> None:
    server.replies = [completion("because")]
    chat = chat_of(server, key="secret")
    assert isinstance(chat, Chat)
    assert chat.complete(QUESTION) == "because"
    (asked,) = server.seen
    assert (asked["path"], asked["key"], asked["model"]) == ("/v1/chat/completions", "Bearer secret", "tiny")
    assert (asked["messages"], asked["temperature"]) == (QUESTION, 0.0)
    assert (chat.usage.requests, chat.usage.prompt_tokens, chat.usage.completion_tokens) == (1, 7, 2)
    assert "secret" not in repr(chat)


@pytest.mark.parametrize(
    "reply", [(503, b"busy", {}), (429, b"", {"Retry-After": "3"}), (200, b"<html>", {}), (200, b'{"choices": []}', {}),
              completion("  ")]
)  # fmt: skip
def test_a_busy_server_and_junk_are_tried_again_and_an_answer_ends_it(server: Server, reply: Reply) -> None:
    server.replies = [reply, reply, completion("yes")]
    waits: list[float] = []
    chat = chat_of(server, waits)
    assert chat.complete(QUESTION) == "yes"
    assert waits == ([3.0, 3.0] if reply[0] == 429 else [1.0, 2.0])
    assert (chat.usage.requests, chat.usage.failures) == (1, 2)


def test_no_answer_is_an_error_and_never_an_answer(server: Server) -> None:
    server.replies = [(500, b"", {})]
    with pytest.raises(InputError, match=r"gave no answer in 3 tries: status 500. Is the server up, and is 'tiny' a"):
        chat_of(server, retries=2).complete(QUESTION)
    server.replies = [(401, b"no such key", {})]
    with pytest.raises(InputError, match="refused the request with status 401: no such key"):
        chat_of(server).complete(QUESTION)
    with pytest.raises(InputError, match="gave no answer in 1 tries"):
        ServerChat("http://127.0.0.1:9/v1", "tiny", retries=0).complete(QUESTION)
    with pytest.raises(InputError, match="url must begin with http"):
        ServerChat("file:///etc/passwd", "tiny")


def test_what_was_answered_is_not_asked_again_and_the_key_is_not_kept(server: Server, tmp_path: Path) -> None:
    server.replies = [completion("one"), completion("two")]
    chat = chat_of(server, cache=tmp_path, key="secret")
    assert [chat.complete(QUESTION) for _ in range(3)] == ["one"] * 3
    assert (len(server.seen), chat.usage.requests, chat.usage.known) == (1, 1, 2)
    assert replace(chat, temperature=1.0).complete(QUESTION) == "two"
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 2
    assert all(b"secret" not in path.read_bytes() for path in kept)
    kept[0].write_text("{}")
    kept[1].write_text("{}")
    with pytest.raises(FileFormatError, match="is no kept answer"):
        chat.complete(QUESTION)


def test_requests_keep_to_their_rate(server: Server) -> None:
    server.replies = [completion("yes")]
    waits: list[float] = []
    chat = chat_of(server, waits, per_minute=30)
    for _ in range(3):
        chat.complete(QUESTION)
    assert len(waits) == 2
    assert all(1.0 < pause <= 2.0 for pause in waits)


def test_a_model_in_this_process_needs_a_chat_template() -> None:
    with pytest.raises(InputError, match="has no chat template"):
        ModelChat(vs.toys.text_network([])).complete(QUESTION)


@pytest.mark.demo_model
def test_the_demo_model_answers() -> None:
    chat = ModelChat(vs.load("smollm2-135m-instruct"), max_tokens=8)
    assert "Paris" in chat.complete([{"role": "user", "content": "What is the capital of France?"}])


# --- rules


@dataclass
class Says:
    answer: str
    asked: list[str] = field(default_factory=list)

    def complete(self, messages: Any) -> str:
        self.asked.append(messages[0]["content"])
        return self.answer


KING = '{"sentence": "fires on king", "rule": {"word": ["king"], "at": 0}}'


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [(KING, "fires on king"), (f"Sure!\n```json\n{KING}\n```", "fires on king"), (KING.replace("sentence", "x"), "")],
)
def test_a_rule_is_found_in_the_answer(answer: str, sentence: str) -> None:
    assert understood(answer) == (sentence, {"word": ["king"], "at": 0})


@pytest.mark.parametrize(
    ("answer", "kind"),
    [("I think it is kings", InputError), ("{}", InputError), ('{"rule": {"words": ["a"]}}', InputError),
     ('{"rule": {"class": "royals"}}', UnknownNameError), ("[1]", InputError), ('{"rule": "king"}', InputError)],
)  # fmt: skip
def test_what_is_no_rule_is_refused(answer: str, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        understood(answer)


def test_a_right_rule_holds_a_wrong_one_does_not_and_junk_is_counted() -> None:
    seen = planted(PLANTED["a word"])
    part = seen.parts[0]
    right = Says(KING)
    asked = ask_rules(right, seen, sink=vs.silent)
    found = asked.rules.learned(part)
    assert found is not None
    assert found.holds and found.held_out > 0.95
    assert asked.sentences[part] == "fires on king"
    assert "«king»" in right.asked[0] and "It does not fire on" in right.asked[0]
    wrong = ask_rules(Says(KING.replace("king", "the")), seen, sink=vs.silent)
    assert wrong.rules.rule(part) is None
    junk = ask_rules(Says("no idea"), seen, sink=vs.silent)
    assert junk.rules.rule(part) is None
    assert list(junk.unusable) == [part] and repr(junk) == "Asked(0 answers, 1 unusable)"


def test_the_half_that_a_rule_is_held_to_is_not_shown() -> None:
    seen = planted(PLANTED["a word"])[0]
    even = replace(seen, sample=tuple(one for one in seen.sample if one.document % 2 == 0), background=(), near=())
    assert prompt_for(even).count("«") - 1 == prompt_for(replace(seen, background=(), near=())).count("«") - 1 > 3


def test_a_part_that_hardly_fires_is_not_asked_about() -> None:
    nobody = Says(KING)
    silent: Callable[[list[str], int], bool] = lambda _text, _at: False  # noqa: E731
    asked = ask_rules(nobody, planted(silent), sink=vs.silent)
    assert not nobody.asked and not asked.sentences
    assert asked.rules.rule(vs.neuron(0, 0)) is None
