"""`verify`: whether a dictionary does on a model what its file says, so that a misreading is an error.

A dictionary whose activation function, orientation, scale of inputs, site or bos token is misread still gives numbers.
On a few thousand tokens it is compared with what its file claims, with the mean activation, and with itself under the
misreadings that are known to happen: one that does far better is what the file should have said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch

from vesalius.data import ActivationStore, harvest
from vesalius.data.outliers import MAX_NORM, outliers
from vesalius.data.packing import Group, bos_for
from vesalius.dictionaries.coder import SparseCoder
from vesalius.dictionaries.evaluation.figures import Figure, row_figures
from vesalius.dictionaries.evaluation.readings import (
    NEARER,
    Reading,
    claim,
    claimed_l0,
    metadata_of,
    other_readings,
    reading,
)
from vesalius.dictionaries.evaluation.sample import Sample, groups_of
from vesalius.dictionaries.evaluation.splice import losses_of
from vesalius.dictionaries.evaluation.totals import CoderReconstructor, totals_of
from vesalius.dictionaries.unknown_sites import known_site
from vesalius.errors import FileFormatError, InputError
from vesalius.jobs import Event, Sink, silent
from vesalius.jobs.progress import shown
from vesalius.model import Model
from vesalius.site import Site

TASK = "verify"
FACTOR = 2.0
"""How far from what is claimed the number of active latents may be: claims are of other text."""
WORSE = 0.1
"""How much worse than twice what is claimed the variance unexplained may be."""
_BATCH_TOKENS = 1024
_STREAM = ("resid_pre", "resid_post", "attn_out", "mlp_in", "mlp_out")


@dataclass(frozen=True, eq=False)
class Verified:
    """A dictionary that does what its file says. figures: as in `Quality`, by name. claimed_l0: None when the file does
    not say. others: what it does when it is read in other ways, each worse or hardly better.
    """

    figures: Mapping[str, Figure]
    claimed_l0: float | None
    rows: int
    others: tuple[Reading, ...]

    def __repr__(self) -> str:
        claim = "" if self.claimed_l0 is None else f" (claimed {self.claimed_l0:g})"
        shown = [f"{name} {self.figures[name].value:.3g}" for name in ("fvu", "ce_increase") if name in self.figures]
        return f"Verified(l0 {self.figures['l0'].value:.1f}{claim}, {', '.join(shown)}; {self.rows:,} rows)"


@torch.no_grad()
def verify(
    coder: SparseCoder,
    model: Model,
    texts: Any = "stdlib",
    *,
    tokens: int = 4096,
    context: int = 128,
    sink: Sink | None = None,
) -> Verified:
    """Run a model over some text and compare a dictionary with what its file claims.

    What is claimed: the number of active latents (k, average_l0), sites, and whether contexts begin with a token
    (prepend_bos; default: yes). Raises FileFormatError saying what does not fit, and which other reading would: sites
    or widths that the model does not have, more or fewer latents active than claimed by a factor of two, an error no
    smaller than that of the mean activation, a loss in the model no smaller than the mean activation's, or less than
    half of the error with another activation function, input scale, bias or bos, four fifths at another site.
    """
    for site in (*coder.in_sites, *coder.out_sites):
        if known_site(site).tag:
            raise InputError(f"{coder!r} is of several models ({site}); verify takes one of a single model")
    with shown(sink) as progress, TemporaryDirectory() as folder:
        trial = _Trial(coder, model, texts, tokens, context, Path(folder), progress)
        found = trial.figures()
        others = tuple(trial.others())
    claimed = claimed_l0(coder)
    _check(coder, found, claimed, others)
    result = Verified(found, claimed, trial.rows, others)
    progress(Event("note", TASK, message=repr(result)))
    return result


def _check(coder: SparseCoder, found: Mapping[str, Figure], claimed: float | None, others: Sequence[Reading]) -> None:
    """Raises FileFormatError for the first thing that does not fit."""
    fvu, l0 = found["fvu"].value, found["l0"].value
    fits = lambda number: claimed is None or claimed / FACTOR <= number <= claimed * FACTOR  # noqa: E731
    better = [one for one in others if one.fvu < one.enough * fvu or (one.fvu < 1 and fits(one.l0) and not fits(l0))]
    # Of several better readings the likeliest: one with as many active latents as claimed, then the smallest error.
    best = min(better, key=lambda one: (not fits(one.l0), one.fvu), default=None)
    hint = ""
    if best is not None:
        hint = f". With {best.words} it would be {best.fvu:.3g}, with {best.l0:.1f} latents active"
    what = f"{coder!r} leaves {fvu:.3g} of the variance unexplained, with {l0:.1f} latents active per row"
    if not fits(l0):
        raise FileFormatError(f"{what}, where its file speaks of {claimed:.3g}: it is misread{hint}")
    claimed_fvu = claim(coder, ("fvu",))
    if claimed_fvu is not None and fvu > FACTOR * claimed_fvu + WORSE:
        raise FileFormatError(f"{what}, where its file speaks of {claimed_fvu:.3g}: it is misread{hint}")
    if fvu >= 1:
        raise FileFormatError(f"{what}: no better than the mean activation, so it is misread{hint}")
    if "ce_increase" in found and found["ce_increase"].value >= found["ce_increase_mean"].value > 0:
        raise FileFormatError(
            f"{what}, and in the model adds {found['ce_increase'].value:.3g} nats, no less than the mean activation "
            f"({found['ce_increase_mean'].value:.3g}): it is misread{hint}"
        )
    if hint:
        raise FileFormatError(f"{what}{hint}: its file says something else than it was trained with")


@dataclass(eq=False)
class _Trial:
    """Activations of a model over some text, at a dictionary's sites and at those it could be mistaken for."""

    coder: SparseCoder
    model: Model
    texts: Any
    tokens: int
    context: int
    folder: Path
    sink: Sink

    def __post_init__(self) -> None:
        claim = str(metadata_of(self.coder).get("prepend_bos")).lower()
        self.bos = ("none", "auto") if claim == "false" else ("auto", "none")
        self.store = self._store(self.bos[0], (*self._own, *self._near))
        other = None if self.model.tokenizer is None else self._store(self.bos[1], self._own)
        # A tokenizer without such a token has only one way to begin.
        self.other = None if other is None or other.bos["id"] == self.store.bos["id"] else other
        stores = [self.store] if self.other is None else [self.store, self.other]
        self.same = _same_rows(stores)
        if not self.same:
            raise InputError(
                f"of {self.tokens} tokens no row is left to judge {self.coder!r} on; give more or other texts"
            )
        self.sample = self._sample(self.store, self.coder.in_sites, self.coder.out_sites)

    @property
    def rows(self) -> int:
        return len(self.sample)

    @property
    def _own(self) -> tuple[Site, ...]:
        return tuple(dict.fromkeys((*self.coder.in_sites, *self.coder.out_sites)))

    @property
    def _near(self) -> tuple[Site, ...]:
        """Sites that one which is read and reconstructed could be mistaken for."""
        # Other sites have widths of their own, and cannot be confused with these.
        if not self._alone or self.coder.in_sites[0].kind not in _STREAM:
            return ()
        site = self.coder.in_sites[0]
        assert site.layer is not None
        layers = range(max(0, site.layer - 1), site.layer + 2)
        wanted = {replace(site, layer=layer, kind=kind) for layer in layers for kind in _STREAM}
        return tuple(found for found in self.model.sites() if found in wanted - {site})

    @property
    def _begins(self) -> bool:
        """Whether contexts can begin with a token at all."""
        tokenizer = self.model.tokenizer
        return tokenizer is not None and bos_for(tokenizer, "auto", False).id is not None

    @property
    def _alone(self) -> bool:
        return len(self._own) == 1

    def _store(self, bos: str, sites: Sequence[Site]) -> ActivationStore:
        try:
            store = harvest(
                self.model,
                self.texts,
                sites=list(sites),
                out=self.folder / bos,
                tokens=self.tokens,
                # Without a token at the start one less, so that texts are cut at the same places.
                context=self.context - (bos == "none" and self._begins),
                bos=bos,
                # Outliers of any site and either way to begin are dropped for all readings alike.
                max_norm=None,
                sink=silent,
            )
        except InputError as error:
            raise FileFormatError(f"{self.coder!r} does not fit {self.model.name}: {error}") from error
        widths = dict(zip(store.sites, store.widths, strict=True))
        for site, width in _widths(self.coder).items():
            if widths[site] != width:
                raise FileFormatError(
                    f"{self.coder!r} is of {width} numbers at {site}, where {self.model.name} has {widths[site]}: it "
                    "is of another model, or of another site"
                )
        return store

    def _sample(self, store: ActivationStore, ins: Sequence[Site], outs: Sequence[Site]) -> Sample:
        """The rows that all readings are judged on, as this store has them."""
        mask = np.array([key in self.same for key in _keys(store)])
        known, rows = list(store.sites), store.at(range(store.rows.start, store.rows.stop))
        found = Group(tuple(context for _, context in store.contexts())).only(mask).contexts
        contexts = tuple(context for context in found if context.rows)
        groups, unit = groups_of(contexts)
        chosen = torch.from_numpy(mask.nonzero()[0])
        read, written = (tuple(rows[known.index(site)][chosen] for site in sites) for sites in (ins, outs))
        return Sample(read, written, groups, unit, contexts)

    def figures(self) -> dict[str, Figure]:
        """Of the dictionary as it was read."""
        own = CoderReconstructor(self.coder)
        found = row_figures(totals_of(own, self.sample))
        if len(self.coder.out_sites) > 1:
            return found
        numbers = {document: n for n, document in enumerate(dict.fromkeys(c.document for c in self.sample.contexts))}
        groups = [numbers[context.document] for context in self.sample.contexts]
        losses = losses_of(
            self.model,
            self.coder.in_sites,
            self.coder.out_sites[0],
            self.sample.contexts,
            groups,
            [own],
            self.sample.outputs[0].double().mean(0).float(),
            _BATCH_TOKENS,
            self.sink,
        )
        return found | losses.figures(own.name)

    def others(self) -> Iterator[Reading]:
        """The dictionary read in other ways."""
        for words, reconstructor in other_readings(self.coder, self.sample):
            yield reading(words, reconstructor, self.sample)
        for site in self._near:
            if self.store.widths[self.store.sites.index(site)] == _widths(self.coder)[self.coder.in_sites[0]]:
                there = self._sample(self.store, (site,), (site,))
                found = reading(f"activations of {site}", CoderReconstructor(self.coder), there)
                yield replace(found, enough=NEARER)
        if self.other is not None:
            other = self._sample(self.other, self.coder.in_sites, self.coder.out_sites)
            words = "no token" if self.bos[1] == "none" else "a token"
            yield reading(f"{words} at the start of contexts", CoderReconstructor(self.coder), other)


Key = tuple[int, int]
"""Document, and number of a token in it."""


def _keys(store: ActivationStore) -> list[Key]:
    """Which token of which document each row is of, in order."""
    before = 0 if store.bos["id"] is None else 1
    return [
        (context.document, context.offset + int(at) - before)
        for _, context in store.contexts()
        for at in context.kept.nonzero()[0]
    ]


def _same_rows(stores: Sequence[ActivationStore]) -> set[Key]:
    """Tokens that have a row in every store, and are a norm outlier at no site of any.

    A figure of squared errors hangs on such rows: where they are left out of one reading and not of another, the two
    cannot be compared.
    """
    sets = []
    for store in stores:
        rows = store.at(range(store.rows.start, store.rows.stop))
        far = outliers(rows, torch.zeros(store.n_rows, dtype=torch.bool), MAX_NORM)
        sets.append({key for key, dropped in zip(_keys(store), far.tolist(), strict=True) if not dropped})
    return set.intersection(*sets)


def _widths(coder: SparseCoder) -> dict[Site, int]:
    """Numbers at each site, as far as the coder tells."""
    known = cast(Any, coder)
    sides = ((coder.in_sites, known.in_widths), (coder.out_sites, known.out_widths))
    return {site: width for sites, widths in sides for site, width in zip(sites, widths, strict=True)}
