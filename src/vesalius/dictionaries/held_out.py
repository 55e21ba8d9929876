"""Which rows a dictionary was trained on, and which not: training leaves the last documents of a store out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vesalius.data import ActivationStore, Source, Stream
from vesalius.errors import InputError
from vesalius.protocol import content_hash

KEY = "trained_on"
"""In a dictionary's `metadata`."""


def for_training(source: Source, share: float) -> Source:
    """The source without its last documents, with about this share of the rows, if it is a whole store of several.

    Parts of stores, streams and tensors stay as they are: whoever made them chose their rows.
    """
    if share == 0 or not isinstance(source, ActivationStore) or not source.whole:
        return source
    try:
        return source.split(share)[0]
    except InputError:  # all of one document
        return source


def trained_on(source: Source) -> dict[str, Any]:
    """What identifies these rows, for a dictionary's `metadata`; empty when nothing does."""
    if not isinstance(source, ActivationStore):
        return {}
    first, last = (source.trace(row).document for row in (source.rows[0], source.rows[-1]))
    return {KEY: {**_text(source), "documents": [first, last + 1], "rows": source.n_rows}}


def models_of(source: Source) -> dict[str, Any]:
    """The models that activations are of, with hashes of their weights, and how text was cut, where that is known."""
    if isinstance(source, ActivationStore):
        models, context = source.manifest.plan["models"], source.manifest.plan["context"]
    elif isinstance(source, Stream):
        models, context = source.models, source.context
    else:
        return {}
    return {"models": list(models), "bos": dict(source.bos), "context": context}


@dataclass(frozen=True)
class EvaluationRows:
    """Rows to evaluate a dictionary on. trained_on: whether it was trained on them; None when it cannot be told.

    words: the same in a sentence.
    """

    source: Source
    trained_on: bool | None
    words: str


def evaluation_rows(source: Source, metadata: Mapping[str, Any]) -> EvaluationRows:
    """The part of a source that a dictionary was not trained on, as far as the two can tell.

    When it was trained on all of it, the source as it is, with `trained_on` True.
    """
    known = metadata.get(KEY)
    if known is None and metadata.get("data") == source.content_hash:
        return EvaluationRows(source, True, "All of these rows were trained on: the figures flatter.")
    if known is None or not isinstance(source, ActivationStore):
        return EvaluationRows(source, None, "Whether these rows were trained on is not known.")
    if _text(source)["text"] != known["text"]:
        return EvaluationRows(
            source, None, "These rows are of other texts than those trained on; whether they overlap is not known."
        )
    first, stop = known["documents"]
    try:
        # Documents are numbered alike in every store of the same text, whatever the model and the sites.
        rest = source.documents(stop)
    except InputError:
        return EvaluationRows(source, True, "All of these rows were trained on: the figures flatter.")
    words = f"{rest.n_rows:,} rows of documents {stop:,} and later; those trained on were {first:,} to {stop - 1:,}."
    return EvaluationRows(rest, False, words)


def was_trained_on(metadata: Mapping[str, Any], store: ActivationStore, documents: Iterable[int]) -> bool | None:
    """Whether a dictionary was trained on any of these documents of a store; None when it cannot be told."""
    known = metadata.get(KEY)
    if known is None or _text(store)["text"] != known["text"]:
        return None
    first, stop = known["documents"]
    return any(first <= number < stop for number in documents)


def _text(store: ActivationStore) -> dict[str, str]:
    """Hash of what the documents are: of the text where it was hashed, else of the whole store."""
    text = store.manifest.plan["text"]
    known = text if "sha256" in text else {**text, "manifest": store.manifest.content_hash}
    return {"text": content_hash(known)}
