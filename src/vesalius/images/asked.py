"""Descriptions of channels by a model that sees: it is shown crops, and answers with a kind of image that can be wrong.

Any server of OpenAI's chat protocol that takes images will do (`describe.ServerChat`). What it says is held to the same
as a kind that was found by search: claims on fresh images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vesalius.describe import Chat, Description, Discovery
from vesalius.errors import InputError, UnknownNameError
from vesalius.images.describing import predicted
from vesalius.images.pictures import Scaling
from vesalius.images.pixels import data_address
from vesalius.images.responses import Exciting
from vesalius.jobs.untrusted import parse_json
from vesalius.quantities.selects import in_words, labels_of, picked

LABEL = "kind by a model that sees"
SHOWN = 8
_PROMPT = """Below are pictures that excite one unit of a network most, and after them pictures that do not.
Say which kind of picture excites it. Answer with JSON only: {{"sentence": "...", "some": {{label: [values]}}}}.
Use these labels and values, and as few as will do:
{labels}"""


def ask_kind(chat: Chat, found: Exciting, discovery: Discovery, scaling: Scaling) -> Description:
    """Ask what excites a channel; its pictures are shown as crops of what it saw.

    discovery: images with the labels that may be named. Raises InputError when the answer names no kind among them.
    """
    known = {name: sorted(set(values)) for name, values in labels_of(discovery.runs).items()}
    answer = chat.complete([{"role": "user", "content": question(found, known, scaling)}])
    sentence, some = understood(answer, known)
    if not 0 < int(picked(labels_of(discovery.runs), some).sum()) < discovery.runs.n:
        raise InputError(f"the answer names {in_words(some)}, which are all of the images or none")
    said = sentence or f"larger on {in_words(some)}"
    made = predicted(discovery.runs, found.channel, some, {}, said, f"is larger on {in_words(some)}")
    return Description(found.channel, LABEL, (made,), name=str(found.channel))


def question(found: Exciting, known: Mapping[str, Sequence[str]], scaling: Scaling) -> list[dict[str, Any]]:
    """The parts of the message: words, then exciting crops, then near misses."""
    labels = "\n".join(f"- {name}: {', '.join(values)}" for name, values in known.items())
    parts: list[dict[str, Any]] = [{"type": "text", "text": _PROMPT.format(labels=labels)}]
    for words, kind in (("These excite it:", "top"), ("These do not:", "near miss")):
        parts.append({"type": "text", "text": words})
        for one in found.of(kind)[:SHOWN]:
            url = data_address(scaling.bytes_of(found.crop(one)))
            parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts


def understood(answer: str, known: Mapping[str, Sequence[str]]) -> tuple[str, dict[str, list[str]]]:
    """The sentence and the kind of an answer. Raises InputError for one without, UnknownNameError for a label or value
    that is not known."""
    start, end = answer.find("{"), answer.rfind("}")
    try:
        found: Any = parse_json(answer[start : end + 1])
        some = {str(name): [str(value) for value in values] for name, values in found["some"].items()}
        sentence = str(found.get("sentence", ""))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"no JSON object with a kind of image in the answer {answer[:80]!r}") from error
    if not some:
        raise InputError(f"the answer names no kind of image: {answer[:80]!r}")
    for name, values in some.items():
        if name not in known:
            raise UnknownNameError("label of images", name, known)
        for value in values:
            if value not in known[name]:
                raise UnknownNameError(f"value of {name}", value, known[name])
    return sentence, some
