"""`verify`: whether a dictionary does on a model what its file says, so that a misreading is an error.

A dictionary whose activation function, orientation, scale of inputs, site or bos token is misread still gives numbers.
On a few thousand tokens it is compared with what its file claims, with the mean activation, and with itself under the
misreadings that are known to happen: one that does far better is what the file should have said.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor

from vesalius.data import ActivationStore, harvest
from vesalius.dictionaries.coder import SparseCoder
from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.evaluation.figures import Figure, row_figures
from vesalius.dictionaries.evaluation.sample import Sample, groups_of
from vesalius.dictionaries.evaluation.splice import losses_of
from vesalius.dictionaries.evaluation.totals import CoderReconstructor, Reconstructed, Reconstructor, totals_of
from vesalius.dictionaries.unknown_sites import known_site
from vesalius.errors import FileFormatError, InputError
from vesalius.jobs import Event, Sink, silent
from vesalius.jobs.progress import shown
from vesalius.model import Model
from vesalius.site import Site

TASK = "verify"
BETTER, NEARER = 0.5, 0.8
"""A misreading that leaves less than this share of the error is taken for the truth; so is a neighbouring site that
leaves less than the second: neighbours of the right site are never that much easier."""
FACTOR = 2.0
"""How far from what is claimed the number of active latents may be: claims are of other text."""
WORSE = 0.1
"""How much worse than twice what is claimed the variance unexplained may be."""
_BATCH_TOKENS = 1024
_STREAM = ("resid_pre", "resid_post", "attn_out", "mlp_in", "mlp_out")
_CLAIM = re.compile(r"(?:average_)?l0_(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Reading:
    """The dictionary read in one way: fraction of variance unexplained, and latents active per row. enough: the share
    of the error at which it counts as the truth.
    """

    words: str
    fvu: float
    l0: float
    enough: float = BETTER


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


def claimed_l0(coder: SparseCoder) -> float | None:
    """Active latents per row that the file of a dictionary speaks of; None when it does not."""
    if getattr(coder, "activation", "") == "topk":
        return float(cast(Any, coder).k)
    found = _claim(coder, ("l0", "average_l0", "k"))
    in_path = _CLAIM.search(str(_metadata(coder).get("folder") or ""))
    return float(in_path[1]) if found is None and in_path else found


def _claim(coder: SparseCoder, names: Sequence[str]) -> float | None:
    """The first positive number under one of these names, in all that a file says of training."""
    known = _metadata(coder)
    get = lambda where, name: where.get(name) if isinstance(where, Mapping) else None  # noqa: E731
    saelens = get(known.get("cfg"), "metadata")
    details = get(saelens, "training_architecture_details")
    for where in (known.get("summary"), saelens, details, known.get("cfg"), known.get("trainer"), known.get("config")):
        for name in names:
            value = get(where, name)
            if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                return float(value)
    return None


def _metadata(coder: SparseCoder) -> Mapping[str, Any]:
    return getattr(coder, "metadata", {})


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
    claimed_fvu = _claim(coder, ("fvu",))
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
        claim = str(_metadata(self.coder).get("prepend_bos")).lower()
        self.bos = ("none", "auto") if claim == "false" else ("auto", "none")
        self.store = self._store(self.bos[0], (*self._own, *self._near))
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
                context=self.context,
                bos=bos,
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
        known, rows = list(store.sites), store.at(range(store.rows.start, store.rows.stop))
        contexts = tuple(context for _, context in store.contexts())
        groups, unit = groups_of(contexts)
        read, written = (tuple(rows[known.index(site)] for site in sites) for sites in (ins, outs))
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
        for words, reconstructor in _other_readings(self.coder, self.sample):
            yield _reading(words, reconstructor, self.sample)
        for site in self._near:
            if self.store.widths[self.store.sites.index(site)] == _widths(self.coder)[self.coder.in_sites[0]]:
                there = self._sample(self.store, (site,), (site,))
                found = _reading(f"activations of {site}", CoderReconstructor(self.coder), there)
                yield replace(found, enough=NEARER)
        if self.model.tokenizer is not None:
            bos = self.bos[1]
            other = self._sample(self._store(bos, self._own), self.coder.in_sites, self.coder.out_sites)
            words = "no token" if bos == "none" else "a token"
            yield _reading(f"{words} at the start of contexts", CoderReconstructor(self.coder), other)


def _widths(coder: SparseCoder) -> dict[Site, int]:
    """Numbers at each site, as far as the coder tells."""
    known = cast(Any, coder)
    sides = ((coder.in_sites, known.in_widths), (coder.out_sites, known.out_widths))
    return {site: width for sites, widths in sides for site, width in zip(sites, widths, strict=True)}


def _reading(words: str, reconstructor: Reconstructor, sample: Sample) -> Reading:
    totals = totals_of(reconstructor, sample)
    return Reading(words, row_figures(totals)["fvu"].value, totals.l0)


def _other_readings(coder: SparseCoder, sample: Sample) -> Iterator[tuple[str, Reconstructor]]:
    """Inputs in other units, another activation function, the decoder's bias subtracted from inputs or not."""
    # Rows that are normalised anyway have no units that could be misread.
    if len(coder.in_sites) == 1 and getattr(coder, "row_norm", "none") == "none":
        size = float(sample.inputs[0].double().norm(dim=1).mean()) / sample.inputs[0].shape[1] ** 0.5
        yield f"inputs divided by {size:.4g} (mean norm sqrt(width))", _Scaled(coder, 1 / size)
        yield f"inputs multiplied by {size:.4g}", _Scaled(coder, size)
    if not isinstance(coder, Dictionary):
        return
    if coder.activation in ("topk", "batchtopk", "jumprelu"):
        yield (
            "ReLU as its activation function",
            CoderReconstructor(replace(coder, activation="relu", k=None, extras={})),
        )
    claimed = claimed_l0(coder)
    if coder.activation in ("relu", "jumprelu", "batchtopk") and claimed is not None and claimed >= 1:
        k = min(round(claimed), coder.n_latents)
        yield f"TopK with k = {k}", CoderReconstructor(replace(coder, activation="topk", k=k, extras={}))
    if coder.in_sites == coder.out_sites:
        other = replace(coder, apply_b_dec_to_input=not coder.apply_b_dec_to_input)
        words = "b_dec subtracted from inputs" if other.apply_b_dec_to_input else "b_dec not subtracted from inputs"
        yield words, CoderReconstructor(other)


@dataclass(frozen=True, eq=False)
class _Scaled:
    """A dictionary of activations in other units."""

    coder: SparseCoder
    factor: float
    name: str = "scaled"

    def reconstruct(self, inputs: Sequence[Tensor]) -> Reconstructed:
        """As `Reconstructor.reconstruct`."""
        found = CoderReconstructor(self.coder).reconstruct([rows * self.factor for rows in inputs])
        return Reconstructed([rows / self.factor for rows in found.outputs], found.active, found.latents)
