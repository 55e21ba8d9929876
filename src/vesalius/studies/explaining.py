"""What is to be explained, and on which texts: some parts, and documents in two halves that share none.

One half is for discovery: examples are collected and descriptions made there. The other is for validation, and is only
opened when every claim is sealed. A document that comes twice is taken once, and so is a context that does.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from numpy.typing import NDArray

from vesalius.coder import Coder
from vesalius.data.forward import captured
from vesalius.data.packing import Packing, Tally, bos_for, groups, special_ids, tokenized
from vesalius.data.texts import Texts, texts_from
from vesalius.dictionaries import Dictionary, Latent, untrained
from vesalius.directions import Direction
from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Corpus, Tokens
from vesalius.model import Model
from vesalius.parts import Part, Unit
from vesalius.protocol import content_hash
from vesalius.protocol.legs import ALPHA
from vesalius.protocol.verdict import GENERAL_FROM
from vesalius.quantities.values import PartValues
from vesalius.seeds import generator_for
from vesalius.validate import reinitialised

RANDOM_DIRECTIONS, RANDOM_NETWORK, UNTRAINED = "random-directions", "random-network", "untrained-dictionary"
BASELINES = (RANDOM_DIRECTIONS, RANDOM_NETWORK, UNTRAINED)
SHORTEST, MOST = 16, 8
"""Tokens that a document has at least, and contexts that are taken of one at most: verdicts count documents."""
_ALL, _TRIED = 2**62, 16


@dataclass(frozen=True, eq=False)
class Halves:
    """Texts in two halves. discovery: token ids of its documents; corpus: contexts of both, with their splits; bos: the
    token before every context; texts: what they are; counts: documents that were left out, by why."""

    discovery: tuple[NDArray[Any], ...]
    corpus: Corpus
    bos: str
    texts: Mapping[str, Any]
    counts: Mapping[str, int]

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Of each split."""
        return {name: int(self.corpus.split(name).tokens.real.sum()) for name in self.corpus.split_names}

    def read(self, context: int) -> dict[str, Any]:
        """What a summary says of them."""
        documents = {name: self.corpus.split(name).groups["document"] for name in self.corpus.split_names}
        return {
            "tokens": self.tokens,
            "documents": {name: len(set(labels)) for name, labels in documents.items()},
            "left_out": dict(self.counts),
            "context": context,
            "bos": self.bos,
            "sha256": self.texts.get("sha256"),
        }


@dataclass(frozen=True, eq=False)
class Explaining:
    """The question of a study that explains parts.

    halves: the documents. about: what else a summary says of the parts (the dictionary they are latents of).
    challenged: whether rules are revised by inputs that are made to break them before they are claimed.
    """

    name: str
    parts: tuple[Part, ...]
    halves: Halves
    context: int
    baseline: str | None = None
    seed: int = 0
    about: Mapping[str, Any] = field(default_factory=dict)
    challenged: bool = False

    @property
    def text(self) -> str:
        """The question in words."""
        return f"What do {len(self.parts):,} parts fire on, and does it hold on fresh texts?"

    @property
    def corpus(self) -> Corpus:
        """Contexts of all documents, with both splits."""
        return self.halves.corpus

    def plan(self) -> dict[str, Any]:
        """What the question is, for hashing."""
        own = {name: getattr(self, name) for name in ("name", "context", "baseline", "seed", "challenged")}
        return {
            **own,
            "bos": self.halves.bos,
            "parts": [part.ref for part in self.parts],
            "corpus": self.corpus.content_hash,
        }


def explaining(
    model: Model,
    parts: Sequence[Part],
    corpus: Any,
    *,
    tokens: int = 200_000,
    context: int = 256,
    bos: str = "auto",
    column: str = "text",
    seed: int = 0,
    baseline: str | None = None,
    about: Mapping[str, Any] | None = None,
    challenged: bool = False,
) -> tuple[Model, Explaining]:
    """The question, and the model that it is about: another than the given one for the baseline `random-network`.

    corpus: texts as for `data.harvest`. tokens: of both halves together, at most. Documents go in turns to discovery
    and to validation. baseline: `random-directions`, one at the site of each part in its place; or `random-network`,
    the same parts of the model with random weights; or `untrained-dictionary`, the latents of the same numbers of one
    that was never trained (`dictionaries.untrained`). challenged: see `describe.challenge`; costs about as
    much again as learning the rules.

    Raises InputError for parts that the model does not have or that have no single number at each position, and for a
    corpus of too few documents, saying how many tokens would do.
    """
    if baseline is not None and baseline not in BASELINES:
        raise UnknownNameError("baseline", baseline, BASELINES)
    chosen = check_parts(model, parts)
    half = halved(model, corpus, len(chosen), tokens=tokens, context=context, bos=bos, column=column)
    asked = Explaining(
        name="explain",
        parts=_compared(chosen, model, half.corpus, baseline, seed),
        halves=half,
        context=context,
        baseline=baseline,
        seed=seed,
        about=dict(about or {}),
        challenged=challenged,
    )
    return (reinitialised(model, seed) if baseline == RANDOM_NETWORK else model), asked


def halved(
    model: Model,
    corpus: Any,
    parts: int,
    *,
    tokens: int,
    context: int,
    bos: str = "auto",
    column: str = "text",
    most: int = MOST,
) -> Halves:
    """Documents, in turns for discovery and for validation. parts: how many are to be tested; most: contexts that are
    taken of one document.

    Raises InputError for too few documents for so many parts, saying how many tokens would do.
    """
    packing = Packing(context, bos_for(model.tokenizer, bos, False), special_ids(model.tokenizer), _ALL)
    texts = texts_from(corpus, column)
    halves, counts = _documents(model, texts, tokens, most * context)
    _check_enough(halves, parts, tokens, counts)
    rows, splits, labels, counts["repeated contexts"] = _rows(halves, packing)
    split = Corpus(Tokens.from_rows(rows), {"document": tuple(labels)}, tuple(splits))
    return Halves(tuple(halves[0]), split, packing.bos.token, dict(texts.description), counts)


def check_parts(model: Model, parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts, if texts can be read for them in this model. Raises InputError."""
    if model.tokenizer is None:
        raise InputError(
            f"{model.name} has no tokenizer, and what is said of parts is about text; vs.Model(tokenizer=)"
        )
    values = PartValues(tuple(parts))
    names = [str(part) for part in values.parts]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"two parts are called {twice}; explain those of one dictionary at a time")
    for site in values.sites:
        model.check_site(site)
    # How many neurons there are, only the tensor tells: two tokens are run now, and not thousands for nothing.
    at = captured(model, Tokens.from_rows([[0, 0]]), [site.whole for site in values.sites])
    for part in values.parts:
        if isinstance(part, Unit):
            part.read(at[part.site.whole])
    for coder in {id(c): c for c in (getattr(part, "coder", None) for part in values.parts) if c}.values():
        check_made_for(coder, model)
    return values.parts


def discovery_texts(asked: Explaining) -> Texts:
    """The documents for discovery, as token ids."""
    digest = content_hash([hashlib.sha256(ids.tobytes()).hexdigest() for ids in asked.halves.discovery])
    known = {"kind": "discovery half", "texts": len(asked.halves.discovery), "sha256": digest}
    return Texts(lambda: (ids.tolist() for ids in asked.halves.discovery), known, sum(map(len, asked.halves.discovery)))


def check_made_for(coder: Coder, model: Model) -> None:
    """Raises InputError for a dictionary of another model, as far as its file tells, or of sites that fit no more."""
    known = [one for one in getattr(coder, "metadata", {}).get("models", []) if one.get("sha256")]
    hashes = [one["sha256"] for one in known]
    if hashes and model.content_hash not in hashes:
        raise InputError(
            f"the dictionary was made for {known[0].get('name', 'another model')} (weights {hashes[0][:12]}), and "
            f"{model.name} has the weights {model.content_hash[:12]}; give --model the model that it was made for"
        )
    for site in (*coder.in_sites, *coder.out_sites):
        model.check_site(site)


def _documents(model: Model, texts: Texts, tokens: int, longest: int) -> tuple[list[list[Any]], dict[str, int]]:
    """Token ids of the documents, of each at most the `longest` first, those of discovery and of validation; and how
    many were left out."""
    halves: list[list[Any]] = [[], []]
    seen: set[bytes] = set()
    taken, counts = 0, {"too short": 0, "repeated": 0}
    for ids in tokenized(texts.read(), model.tokenizer, Tally()):
        if len(ids) < SHORTEST:
            counts["too short"] += 1
            continue
        digest = hashlib.sha256(ids.tobytes()).digest()
        if digest in seen:
            counts["repeated"] += 1
            continue
        halves[len(seen) % 2].append(ids[:longest])
        seen.add(digest)
        taken += min(len(ids), longest)
        if taken >= tokens:
            break
    return halves, counts


def documents_needed(parts: int) -> int:
    """To test on: with fewer, no p-value can pass the correction for so many claims, or the scope is not general."""
    return max(GENERAL_FROM, math.ceil(math.log2(max(parts, 1) / ALPHA)))


def _check_enough(halves: Sequence[Sequence[Any]], parts: int, tokens: int, counts: Mapping[str, int]) -> None:
    """Raises InputError, saying how many tokens would do."""
    found, least = sum(map(len, halves)), 2 * documents_needed(parts)
    if found >= least:
        return
    taken = sum(len(ids) for half in halves for ids in half)
    of_one = taken / found if found else SHORTEST
    left_out = ", ".join(f"{n} {why}" for why, n in counts.items() if n)
    whose = f"--tokens {tokens:,} reaches" if taken >= tokens else "the corpus holds"
    raise InputError(
        f"{whose} {found} documents of {SHORTEST} tokens or more{f' ({left_out})' if left_out else ''}, {taken:,} "
        f"tokens; a test of {parts:,} parts takes {least}, half to discover on and half to test on: about "
        f"{math.ceil(of_one * least):,} tokens of such documents would do. A .txt file is one document; in .jsonl and "
        ".parquet files a row is one"
    )


def _rows(halves: Sequence[Sequence[Any]], packing: Packing) -> tuple[list[list[int]], list[str], list[str], int]:
    """Contexts, each once, with their split and document; and how many came again."""
    rows: list[list[int]] = []
    splits, labels = [], []
    seen: set[bytes] = set()
    again = 0
    for split, half in zip(("discovery", "validation"), halves, strict=True):
        for context in (context for group in groups(iter(half), packing) for context in group.contexts):
            key = context.ids.tobytes()
            if key in seen:
                again += 1
                continue
            seen.add(key)
            rows.append(context.ids.tolist())
            splits.append(split)
            labels.append(f"{split} {context.document}")
    return rows, splits, labels, again


def _compared(parts: Sequence[Part], model: Model, corpus: Corpus, baseline: str | None, seed: int) -> tuple[Part, ...]:
    """The parts that a baseline explains."""
    if baseline == RANDOM_DIRECTIONS:
        return _in_their_place(parts, model, seed)
    if baseline != UNTRAINED:
        return tuple(parts)
    known = {id(part): part.coder for part in parts if isinstance(part, Latent)}
    coders = {id(coder): coder for coder in known.values() if isinstance(coder, Dictionary)}
    if len(known) < len(parts) or len(coders) != 1 or not all(isinstance(c, Dictionary) for c in known.values()):
        raise InputError(f"the baseline {UNTRAINED} is for latents of one dictionary; for other parts take another one")
    (coder,) = coders.values()
    few = corpus.split("discovery").tokens.take(torch.arange(min(_TRIED, len(corpus.split("discovery")))))
    at, real = captured(model, few, [site.whole for site in coder.in_sites]), few.real.clone()
    real[:, 0] = False
    twin = untrained(coder, [Unit(site).read(at[site.whole])[real].flatten(1) for site in coder.in_sites], seed)
    return tuple(twin.latent(part.index) for part in parts if isinstance(part, Latent))


def _in_their_place(parts: Sequence[Part], model: Model, seed: int) -> tuple[Part, ...]:
    """A random direction at the site of each part; others than those that claims are compared with."""
    widths: dict[Any, int] = {}
    found = []
    for number, part in enumerate(parts):
        site = replace(part.reads[0], index=None) if part.reads[0].kind != "z" else part.reads[0]
        if site not in widths:
            at = captured(model, Tokens.from_rows([[0, 0]]), [site.whole])[site.whole]
            widths[site] = at.flatten(2).shape[-1] if site.index is None else at.shape[-1]
        vector = torch.randn(widths[site], generator=generator_for("explain", seed, number))
        found.append(Direction(site, vector, f"random direction {number}"))
    return tuple(found)
