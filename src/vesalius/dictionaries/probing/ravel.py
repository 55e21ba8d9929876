"""RAVEL: do some latents hold one attribute of an entity and no other? (Huang et al. 2024, arXiv:2402.17700.)

The latents chosen for an attribute are given, at the entity's last token, the values they have for another entity.
Cause: the model then gives the other entity's attribute. Isolation: asked for another attribute, it still gives the
first entity's. Disentanglement is the mean of both, for both attributes. Changing nothing scores .5, and so does
changing everything: only above that does a choice of latents say anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vesalius.data import Entities
from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.probing.readings import Floats, random_order
from vesalius.dictionaries.probing.scores import Score, Scores
from vesalius.dictionaries.probing.swaps import Change, Swaps, rows_at, says_after, slopes, swaps_for
from vesalius.errors import InputError
from vesalius.jobs import Sink, track
from vesalius.jobs.progress import shown
from vesalius.model import Model
from vesalius.stats import bootstrap_of_sums

KS = (1, 4, 16, 64, 256)
WORDS = {
    "latents": "latents chosen by their effect on the attribute, less their effect on the other",
    "random": "as many of the active latents at random",
    "coordinates": "the site's own coordinates, chosen in the same way",
    "everything": "all of the activations at the entity's last token",
}
Hits = dict[tuple[str, str], Floats]
"""(attribute whose latents are changed, attribute asked for) -> [pair] whether the model said what it should."""


@dataclass(frozen=True, eq=False)
class Coding:
    """A way to write activations as numbers: an encoder, and what one unit of each adds."""

    encode: Callable[[Tensor], Tensor]
    rows: Tensor


@dataclass(frozen=True, eq=False)
class Sides:
    """Swaps of one attribute with the activations of both entities, and gradients where they were taken."""

    swaps: Swaps
    base: Tensor
    source: Tensor
    slope: Tensor | None = None


def disentanglement(cause: Sequence[float], isolation: Sequence[float]) -> float:
    """Mean of the causes and isolations of both attributes: (cause_A + cause_B + iso_AB + iso_BA) / 4."""
    return float(np.mean([*cause, *isolation]))


def ravel(
    coders: Dictionary | Sequence[Dictionary], entities: Entities, attributes: tuple[str, str], model: Model, *,
    n: int = 128, ks: Sequence[int] = KS, seed: int = 0, sink: Sink | None = None,
) -> Scores:  # fmt: skip
    """Cause, isolation and disentanglement of two attributes, on pairs of test entities that the model knows them of.

    Latents are ranked on training entities by attribution (difference of their values, times the gradient along their
    decoder row, of the other entity's answer over the own one), less the absolute attribution on the other attribute; k
    is chosen on the training entities as well. SAEBench trains a mask instead, so its values do not compare. The
    dictionary's error is kept. Intervals are by bootstrap over base entities.

    Raises InputError when the model knows too little, UnknownNameError for an unknown attribute.
    """
    listed = (coders,) if isinstance(coders, Dictionary) else tuple(coders)
    with shown(sink) as told:
        sides = {split: _both(model, listed[0], entities, attributes, split, n, seed)
                 for split in track(("train", "test"), "ravel", sink=told)}  # fmt: skip
    found: dict[str, list[tuple[Hits, int]]] = {"latents": [], "random": []}
    for coder in listed:
        coding = Coding(coder.encode, (coder.decoders[0] / coder.out_scale[0]).cpu())
        found["latents"].append(_best(model, listed[0], sides, coding, _ranks(sides["train"], coding), ks))
        k = found["latents"][-1][1]
        drawn = dict.fromkeys(attributes, _active(sides["train"], coding, seed)[:k])
        found["random"].append((_hits(model, listed[0], sides["test"], coding, drawn), k))
    width = sides["test"][attributes[0]].base.shape[1]
    plain = Coding(lambda x: x, torch.eye(width))
    found["coordinates"] = [_best(model, listed[0], sides, plain, _ranks(sides["train"], plain), ks)]
    every = dict.fromkeys(attributes, torch.arange(width))
    found["everything"] = [(_hits(model, listed[0], sides["test"], plain, every), width)]
    lines = [line for method, each in found.items() for line in _lines(method, each, sides["test"], seed)]
    train, test = (sum(len(side.swaps) for side in sides[split].values()) for split in ("train", "test"))
    return Scores(
        "RAVEL", f"{entities.kind}: {' and '.join(attributes)}", train, test, tuple(lines),
        "Changing nothing scores .5, and so does changing everything. SAEBench trains a mask; here latents are ranked.",
    )  # fmt: skip


def _both(
    model: Model, coder: Dictionary, entities: Entities, attributes: Sequence[str], split: str, n: int, seed: int
) -> dict[str, Sides]:
    """Swaps of every attribute, with what is needed of the activations."""
    return {name: _sides(model, coder, swaps_for(model, entities, name, split, n, seed), split) for name in attributes}


def _sides(model: Model, coder: Dictionary, swaps: Swaps, split: str) -> Sides:
    if len(coder.in_sites) != 1 or coder.in_sites != coder.out_sites:
        raise InputError("latents are swapped in dictionaries that read and rebuild one site")
    site = coder.in_sites[0]
    base = rows_at(model, site, swaps.base, swaps.base_at)
    source = rows_at(model, site, swaps.source, swaps.source_at)
    return Sides(swaps, base, source, slopes(model, site, swaps) if split == "train" else None)


@torch.no_grad()
def _ranks(sides: Mapping[str, Sides], coding: Coding) -> dict[str, Tensor]:
    """Attribute -> numbers of its latents, best first."""
    effects = {}
    for name, side in sides.items():
        assert side.slope is not None
        apart = (coding.encode(side.source) - coding.encode(side.base)).cpu()
        effects[name] = (apart * (side.slope @ coding.rows.T)).mean(0)
    total = torch.stack([effect.abs() for effect in effects.values()]).sum(0)
    return {name: (effect - (total - effect.abs())).argsort(descending=True) for name, effect in effects.items()}


@torch.no_grad()
def _active(sides: Mapping[str, Sides], coding: Coding, seed: int) -> Tensor:
    """Numbers of latents that are active for any entity, in random order."""
    both = torch.cat([coding.encode(side.base).cpu().abs().sum(0)[None] for side in sides.values()]).sum(0)
    active = (both > 0).nonzero()[:, 0]
    return active[torch.from_numpy(random_order(len(active), "ravel", seed))]


def _best(
    model: Model, coder: Dictionary, sides: Mapping[str, Mapping[str, Sides]], coding: Coding,
    ranks: Mapping[str, Tensor], ks: Sequence[int],
) -> tuple[Hits, int]:  # fmt: skip
    """What the test pairs say for the k that does best on training ones, and that k."""
    trials = {k: _total(_hits(model, coder, sides["train"], coding, {a: r[:k] for a, r in ranks.items()})) for k in ks}
    k = max(trials, key=trials.__getitem__)
    return _hits(model, coder, sides["test"], coding, {a: r[:k] for a, r in ranks.items()}), k


def _total(hits: Hits) -> float:
    """Disentanglement."""
    cause, isolation = ([float(v.mean()) for (a, b), v in hits.items() if (a == b) == own] for own in (True, False))
    return disentanglement(cause, isolation)


@torch.no_grad()
def _hits(
    model: Model, coder: Dictionary, sides: Mapping[str, Sides], coding: Coding, chosen: Mapping[str, Tensor]
) -> Hits:
    """For every attribute's choice and every attribute asked for, whether the model says what it should."""
    site, found = coder.in_sites[0], {}
    for changed, numbers in chosen.items():
        for asked, side in sides.items():
            said = says_after(model, site, side.swaps, _change(coding, side, numbers))
            wanted = side.swaps.source_says if changed == asked else side.swaps.base_says
            found[changed, asked] = (said == wanted).double().numpy()
    return found


def _change(coding: Coding, side: Sides, numbers: Tensor) -> Change:
    """What giving these latents the source's values adds to the base's activations."""
    apart = (coding.encode(side.source) - coding.encode(side.base)).cpu()[:, numbers]
    change: Tensor = apart @ coding.rows[numbers]
    return change


def _lines(method: str, each: Sequence[tuple[Hits, int]], sides: Mapping[str, Sides], seed: int) -> list[Score]:
    """Disentanglement with its interval, cause and isolation, of one method."""
    means = {pair: np.mean([hits[pair] for hits, _ in each], axis=0) for pair in each[0][0]}
    k = each[0][1] if method != "everything" else None
    score = lambda own: tuple(  # noqa: E731
        float(np.mean([hits[pair].mean() for pair in hits if (pair[0] == pair[1]) == own])) for hits, _ in each
    )
    low, high = _interval(means, sides, seed)
    return [
        Score(f"{method}: disentanglement", WORDS[method], tuple(_total(hits) for hits, _ in each), low, high, k),
        Score(f"{method}: cause", WORDS[method], score(True), k=k),
        Score(f"{method}: isolation", WORDS[method], score(False), k=k),
    ]


def _interval(means: Hits, sides: Mapping[str, Sides], seed: int) -> tuple[float | None, float | None]:
    """Of the mean of the four shares, resampling base entities."""
    names = sorted({name for side in sides.values() for name in side.swaps.entities})
    place = {name: number for number, name in enumerate(names)}
    sums = np.zeros((len(names), 2 * len(means)))
    for column, ((_, asked), values) in enumerate(means.items()):
        rows = [place[name] for name in sides[asked].swaps.entities]
        np.add.at(sums[:, 2 * column], rows, values)
        np.add.at(sums[:, 2 * column + 1], rows, 1.0)
    if len(names) < 2:
        return None, None
    # An entity may be in few pairs: a draw without any of an attribute's is 0 / 0, and is kept from being.
    statistic = lambda t: (t[..., ::2] / np.maximum(t[..., 1::2], 1e-9)).mean(-1)  # noqa: E731
    low, high = bootstrap_of_sums(sums, statistic, draws=500, seed=seed, method="percentile")
    return low, high
