"""Readings: of every text of a concept, the activations at a site and the latents of some dictionaries there.

Everything in this room takes any `Coder` of one site: it asks for latents, and for what one unit of each adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from vesalius.coder import Coder
from vesalius.data import Labelled
from vesalius.data.forward import captured
from vesalius.data.outliers import MAX_NORM
from vesalius.data.packing import Tally, bos_for, tokenized
from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Tokens
from vesalius.inputs.beginning import begun
from vesalius.jobs import Sink, track
from vesalius.jobs.progress import shown
from vesalius.model import Model
from vesalius.model.products import computing
from vesalius.seeds import generator_for
from vesalius.site import Site

At = Literal["mean", "last"]
AT = ("mean", "last")
_ROWS = 512
Floats = NDArray[np.float64]
Matrix = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Readings:
    """rows: [text, width] activations. latents: per dictionary, [text, latent]. Both over the same tokens of a text.

    test: share of the texts that is tested on; seed: which.
    """

    coders: tuple[Coder, ...]
    concept: Labelled
    rows: Floats
    latents: tuple[Matrix, ...]
    at: str = "last"
    test: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        each: tuple[NDArray[Any], ...] = (self.rows, *self.latents)
        for values in each:
            if len(values) != len(self.concept):
                raise InputError(f"{len(values)} readings for the {len(self.concept)} texts of {self.concept.name}")

    @classmethod
    def of(
        cls,
        coders: Sequence[Coder],
        concept: Labelled,
        rows: Float[Tensor, "text width"],
        *,
        test: float = 0.25,
        seed: int = 0,
    ) -> Readings:
        """Readings of one row of activations per text."""
        _one_site(coders)
        latents = tuple(coder.encode(rows).cpu().float().numpy() for coder in coders)
        return cls(tuple(coders), concept, rows.cpu().double().numpy(), latents, "last", test, seed)

    @cached_property
    def halves(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Numbers of the texts to fit on and of those to test on; no group is in both."""
        return self.concept.halves(self.test, self.seed)

    def directions(self, number: int) -> Floats:
        """[latent, width] what one unit of each latent of a dictionary adds to the activations."""
        return self.coders[number].decoder_rows().detach().cpu().double().numpy()


@torch.no_grad()
def read_concept(
    coders: Coder | Sequence[Coder],
    concept: Labelled,
    model: Model,
    *,
    at: At = "mean",
    context: int = 128,
    bos: str = "auto",
    test: float = 0.25,
    seed: int = 0,
    batch_tokens: int = 2048,
    sink: Sink | None = None,
) -> Readings:
    """Run a model over the texts of a concept and read a dictionary, or several trained alike, at its site.

    at: "mean" over the tokens of a text, as SAEBench's sparse probing does, or the "last" token. A first token is put
    before each text (`bos`, as in `harvest`) and not read; nor are norm outliers, which no dictionary was trained
    on. context: tokens at most; longer texts are cut for a mean, and refused for the last token.

    Raises InputError for dictionaries of several or other sites, and for texts that are too long or have no token to
    read; TokenizerError for a bos token that is no token of this model.
    """
    listed = as_tuple(coders)
    site = _one_site(listed)
    if at not in AT:
        raise UnknownNameError("way to read a text", str(at), AT)
    ids = _ids(model, concept, bos, context, cut=at == "mean")
    rows: Floats | None = None
    latents = tuple(np.zeros((len(ids), coder.n_latents), dtype=np.float32) for coder in listed)
    with computing(), shown(sink) as progress:
        for texts in track(batches(ids, batch_tokens), "read texts", sink=progress):
            x, owner = _tokens_read(model, site, [ids[text] for text in texts], at)
            rows = np.zeros((len(ids), x.shape[1])) if rows is None else rows
            rows[texts] = _means(x.double(), owner, len(texts)).numpy()
            for coder, into in zip(listed, latents, strict=True):
                parts = [coder.encode(part).cpu().float() for part in x.split(_ROWS)]
                into[texts] = _means(torch.cat(parts), owner, len(texts)).numpy()
    assert rows is not None  # a concept has texts
    return Readings(listed, concept, rows, latents, at, test, seed)


def as_tuple(coders: Coder | Sequence[Coder]) -> tuple[Coder, ...]:
    """One coder or several, as several."""
    # Not isinstance of Coder: that would look every property up, and hash what may be gigabytes.
    return tuple(coders) if isinstance(coders, Sequence) else (coders,)


def random_order(n: int, *key: object) -> NDArray[np.intp]:
    """The numbers under n in an order that the key decides."""
    return np.asarray(torch.randperm(n, generator=generator_for("probing", *key)).numpy(), dtype=np.intp)


def _one_site(coders: Sequence[Coder]) -> Site:
    """The site that all of them read and reconstruct. Raises InputError when there is no such."""
    sites = {coder.in_sites for coder in coders} | {coder.out_sites for coder in coders}
    if len(sites) != 1 or len(next(iter(sites))) != 1:
        raise InputError("concepts are read with dictionaries that read and reconstruct one site, all of them the same")
    return coders[0].in_sites[0]


def _ids(model: Model, concept: Labelled, bos: str, context: int, cut: bool) -> list[list[int]]:
    """Token ids of every text, the bos token in front."""
    first = bos_for(model.tokenizer, bos, False)
    found = []
    for number, ids in enumerate(tokenized(concept.texts, model.tokenizer, Tally())):
        whole = begun(ids.tolist(), first.id)
        if len(whole) > context and not cut:
            raise InputError(f"{concept.name}: text {number} has {len(whole)} tokens, more than context ({context})")
        if len(whole) < 2:
            raise InputError(f"{concept.name}: text {number} has no token to read after the first position")
        found.append(whole[:context])
    return found


def batches(ids: Sequence[Sequence[int]], batch_tokens: int) -> list[list[int]]:
    """Numbers of texts that are run together, by length."""
    # Texts of like length together, so that little is padding.
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    found: list[list[int]] = []
    for number in order:
        if found and (len(found[-1]) + 1) * len(ids[number]) <= batch_tokens:
            found[-1].append(number)
        else:
            found.append([number])
    return found


def _tokens_read(
    model: Model, site: Site, ids: Sequence[Sequence[int]], at: str
) -> tuple[Float[Tensor, "token width"], Int[Tensor, " token"]]:
    """Rows of the tokens that are read, and the number of the text of each."""
    tokens = Tokens.from_rows(ids)
    whole = captured(model, tokens, [site])[site].flatten(2).cpu()
    kept = tokens.real.clone()
    # The first position is a norm outlier in most models, whatever token stands there.
    kept[:, 0] = False
    if at == "last":
        kept = torch.zeros_like(kept)
        kept[torch.arange(len(ids)), tokens.lengths - 1] = True
    else:
        norms = whole.float().norm(dim=-1)
        # Dictionaries are trained without these rows, so that their latents say nothing there.
        usual = kept & (norms <= MAX_NORM * norms[kept].median())
        # A text that would have no token left is read as it is.
        kept = torch.where(usual.any(1, keepdim=True), usual, kept)
    owner, position = kept.nonzero(as_tuple=True)
    return whole[owner, position].float(), owner


def _means(values: Float[Tensor, "token d"], owner: Int[Tensor, " token"], n: int) -> Float[Tensor, "text d"]:
    """Mean of the rows of each text."""
    totals = torch.zeros(n, values.shape[1], dtype=values.dtype).index_add_(0, owner, values)
    return totals / torch.bincount(owner, minlength=n)[:, None]
