"""Rows: what a model has at some sites for every example of a concept, from one pass over its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from vesalius.concepts.concept import Concept
from vesalius.concepts.readings import batches
from vesalius.data.forward import captured
from vesalius.data.packing import bos_for
from vesalius.errors import InputError, TokenizerError, UnknownNameError
from vesalius.inputs import Tokens
from vesalius.inputs.beginning import begun
from vesalius.intervention import Intervention
from vesalius.jobs import Sink, track
from vesalius.jobs.progress import shown
from vesalius.model import Model
from vesalius.model.products import computing
from vesalius.parts import Unit
from vesalius.site import Site

PLACES = ("last", "mean", "span", "tokens")
IMAGES = 32
"""Inputs that are no texts are run so many at a time."""
Matrix = NDArray[np.float32]
Numbers = NDArray[np.intp]


@dataclass(frozen=True, eq=False, repr=False)
class Rows:
    """Activations [row, width] by site, for the examples of a concept.

    owner: [row] number of each row's example; one row an example, in order, unless every token was read. tokens: the
    texts as they were run, an example each.
    """

    concept: Concept
    values: Mapping[Site, Matrix]
    owner: Numbers
    at: str
    model: str = ""
    tokens: Tokens | None = field(default=None)

    def __getitem__(self, site: Site | str) -> Matrix:
        """[row, width] at a site. Raises UnknownNameError for one that was not read."""
        where = Site.parse(site)
        if where not in self.values:
            raise UnknownNameError("site that was read", str(where), [str(one) for one in self.values])
        return self.values[where]

    def __repr__(self) -> str:
        return f"Rows({len(self.owner)} of {self.concept.name} at {len(self.values)} sites, {self.at})"

    @property
    def sites(self) -> tuple[Site, ...]:
        """Sites that were read, in the order of the pass."""
        return tuple(self.values)

    def of(self, split: str) -> Numbers:
        """Numbers of the rows of a split."""
        found: Numbers = np.flatnonzero(np.isin(self.owner, self.concept.rows(split)))
        return found


@torch.no_grad()
def read_sites(
    model: Model,
    concept: Concept,
    sites: Sequence[Site | str] | Site | str,
    *,
    at: str = "last",
    bos: str = "auto",
    context: int = 512,
    interventions: Sequence[Intervention] = (),
    batch_tokens: int = 2048,
    sink: Sink | None = None,
) -> Rows:
    """Activations of every example at some sites (names, globs), from one pass that ends at the last of them.

    at: the "last" token, the "mean" over a text's tokens, the mean over the marked "span", or all "tokens", a row each.
    The bos token that is put before each text is not read, nor is the first position otherwise. Of images a site's
    positions, or its height and width, are averaged, or the last one is taken. context: tokens a text may have.

    Raises UnknownNameError for a site or place that is not there, InputError for texts that are too long or leave no
    token to read, TokenizerError for spans with a tokenizer that does not say where its tokens are.
    """
    if at not in PLACES:
        raise UnknownNameError("place to read", at, PLACES)
    wanted = sites_named(model, sites)
    if concept.of_floats:
        return _of_floats(model, concept, wanted, at, sink)
    ids, spans, of_text = _distinct(model, concept, at, bos, context)
    found: dict[Site, list[Tensor]] = {site: [] for site in wanted}
    owners: list[Tensor] = []
    with computing(), shown(sink) as progress:
        for some in track(batches(ids, batch_tokens), f"read {concept.name}", sink=progress):
            tokens = Tokens.from_rows([ids[text] for text in some])
            owner, row, position = _places(concept, of_text, some, tokens, at, spans)
            seen = captured(model, tokens, wanted, interventions=interventions)
            for site in wanted:
                rows = Unit(site).read(seen[site.whole]).flatten(2)[row, position].float().cpu()
                found[site].append(rows if at == "tokens" else _means(rows, owner))
            owners.append(owner if at == "tokens" else owner.unique_consecutive())
    return _gathered(model, concept, found, torch.cat(owners), at, _of_examples(ids, of_text))


def tokens_of_concept(model: Model, concept: Concept, bos: str = "auto", context: int = 512) -> Tokens:
    """The texts as `read_sites` runs them, an example each. Raises as that."""
    ids, _, of_text = _distinct(model, concept, "last", bos, context)
    return Tokens.from_rows(_of_examples(ids, of_text))


def sites_named(model: Model, sites: Sequence[Site | str] | Site | str) -> list[Site]:
    """Sites by name or glob, in the order of the pass; heads and neurons by their number. Raises UnknownNameError."""
    found: dict[Site, None] = {}
    for one in [sites] if isinstance(sites, str | Site) else sites:
        name = str(one)
        exact = Site.parse(name) if "*" not in name else None
        known = model.sites(str(exact.whole) if exact is not None else name)
        found |= dict.fromkeys([exact] if exact is not None else known)
    return sorted(found, key=lambda site: site.order)


def _gathered(
    model: Model, concept: Concept, found: Mapping[Site, list[Tensor]], owner: Tensor, at: str, ids: Any
) -> Rows:
    """In the order of the examples."""
    order = owner.argsort(stable=True)
    values = {site: torch.cat(parts)[order].numpy() for site, parts in found.items()}
    return Rows(concept, values, owner[order].numpy(), at, model.content_hash, Tokens.from_rows(ids))


def _distinct(
    model: Model, concept: Concept, at: str, bos: str, context: int
) -> tuple[list[list[int]], list[list[tuple[int, int]]], dict[int, list[int]]]:
    """Token ids of each different text, the characters of its tokens, and the examples that are of it."""
    if isinstance(concept.inputs, Tensor):
        rows = concept.inputs.tolist()
        return rows, [[] for _ in rows], {row: [row] for row in range(len(rows))}
    unique = list(dict.fromkeys(concept.texts))
    number = {text: place for place, text in enumerate(unique)}
    of_text: dict[int, list[int]] = {}
    for example, text in enumerate(concept.texts):
        of_text.setdefault(number[text], []).append(example)
    return *_encoded(model, concept, unique, at, bos, context), of_text


def _of_examples(ids: Sequence[list[int]], of_text: Mapping[int, list[int]]) -> list[list[int]]:
    text_of = {example: text for text, examples in of_text.items() for example in examples}
    return [ids[text_of[example]] for example in range(len(text_of))]


def _encoded(
    model: Model, concept: Concept, texts: Sequence[str], at: str, bos: str, context: int
) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Token ids of each text, the bos token in front, and the characters that each token stands for."""
    tokenizer = model.tokenizer
    first = bos_for(tokenizer, bos, False)
    if tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer: texts cannot be read")
    if at == "span" and (not concept.spans or not getattr(tokenizer, "is_fast", False)):
        raise (TokenizerError if concept.spans else InputError)(
            f"{concept.name}: reading a span takes spans, and a tokenizer that tells where its tokens are in a text"
        )
    coded = tokenizer(list(texts), add_special_tokens=False, verbose=False, return_offsets_mapping=at == "span")
    ids = [begun(row, first.id) for row in coded["input_ids"]]
    for number, row in enumerate(ids):
        if not 2 <= len(row) <= context:
            raise InputError(
                f"{concept.name}: text {texts[number][:60]!r} has {len(row)} tokens with the one that is put before "
                f"it; between 2 and context ({context}) can be read"
            )
    added = [len(row) - len(own) for row, own in zip(ids, coded["input_ids"], strict=True)]
    offsets = coded["offset_mapping"] if at == "span" else [[] for _ in ids]
    return ids, [[(0, 0)] * more + list(map(tuple, own)) for more, own in zip(added, offsets, strict=True)]


def _places(
    concept: Concept, of_text: Mapping[int, list[int]], some: Sequence[int], tokens: Tokens, at: str, offsets: Any
) -> tuple[Int[Tensor, " read"], Int[Tensor, " read"], Int[Tensor, " read"]]:
    """What is read in a batch of texts: the example, the text's number in the batch, and the position."""
    read = []
    for row, text in enumerate(some):
        length = int(tokens.lengths[row])
        for example in of_text[text]:
            if at == "last":
                positions = [length - 1]
            elif at == "span":
                positions = _in_span(concept, example, offsets[text])
            else:
                # The first position is an outlier in most models, whatever token stands there.
                positions = list(range(1, length))
            read += [(example, row, position) for position in positions]
    owner, text_of, position = torch.tensor(read, dtype=torch.long).T
    return owner, text_of, position


def _in_span(concept: Concept, example: int, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Tokens that share a character with an example's span."""
    start, end = concept.spans[example]
    found = [place for place, (first, last) in enumerate(offsets) if first < end and last > start]
    if not found:
        raise InputError(f"{concept.name}: no token lies in the span {(start, end)} of example {example}")
    return found


def _means(rows: Float[Tensor, "read width"], owner: Int[Tensor, " read"]) -> Float[Tensor, "example width"]:
    """Of each owner in turn; rows of one stand together."""
    _, place, count = owner.unique_consecutive(return_inverse=True, return_counts=True)
    totals = torch.zeros(len(count), rows.shape[1], dtype=torch.float64).index_add_(0, place, rows.double())
    return (totals / count[:, None]).float()


def _of_floats(model: Model, concept: Concept, sites: Sequence[Site], at: str, sink: Sink | None) -> Rows:
    """Rows of inputs that are no texts."""
    if at not in ("last", "mean"):
        raise InputError(f"{concept.name} is made of floats, which are read at 'mean' or 'last'; got {at!r}")
    found: dict[Site, list[Tensor]] = {site: [] for site in sites}
    assert isinstance(concept.inputs, Tensor)
    with shown(sink) as progress:
        for some in track(concept.inputs.split(IMAGES), f"read {concept.name}", sink=progress):
            run = model.run(some, capture=list(sites))
            for site in sites:
                found[site].append(_pooled(Unit(site).read(run[site.whole]), at).float().cpu())
    values = {site: torch.cat(parts).numpy() for site, parts in found.items()}
    return Rows(concept, values, np.arange(len(concept)), at, model.content_hash)


def _pooled(whole: Tensor, at: str) -> Float[Tensor, "example width"]:
    """[example, width] of [example, width], [example, position, width] or [example, channel, height, width]."""
    if whole.ndim == 2:
        return whole
    if whole.ndim == 4:
        return whole.mean((2, 3))
    return whole[:, -1] if at == "last" else whole.mean(1)
