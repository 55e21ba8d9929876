"""RAVEL: do some latents, or a subspace, hold one attribute of an entity and no other? (Huang et al. 2024,
arXiv:2402.17700.)

What is chosen for an attribute is given, at the entity's last token, the values that it has for another entity.
Cause: the model then gives the other entity's attribute. Isolation: asked for another attribute, it still gives the
first entity's. Disentanglement is the mean of both, for both attributes. Changing nothing scores .5, and so does
changing everything: only above that does a choice say anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vesalius.coder import Coder
from vesalius.concepts.entities import Entities, PromptPairs, Rows, prompt_pairs, rows_at, says_after, slopes
from vesalius.concepts.readings import Floats, as_tuple, random_order
from vesalius.concepts.scores import ConceptScores, ScoreLine, line_of_dictionaries
from vesalius.errors import InputError
from vesalius.jobs import Sink, track
from vesalius.jobs.progress import shown
from vesalius.model import Model
from vesalius.site import Site
from vesalius.stats import Measurement, interval_of_sums
from vesalius.stats.resampling import FEWEST_GROUPS

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
class Code:
    """A way to write activations as numbers: an encoder, and what one unit of each number adds, [number, width]."""

    encode: Callable[[Tensor], Tensor]
    rows: Tensor


@dataclass(frozen=True, eq=False)
class AttributePairs:
    """Pairs of prompts for one attribute, with activations at both entities, and gradients where they were taken."""

    pairs: PromptPairs
    base: Rows
    source: Rows
    slope: Rows | None = None


OfAttribute = Mapping[str, AttributePairs]
Change = Callable[[AttributePairs], Rows]
"""What is added to the base's activations of some pairs."""


def disentanglement(cause: Sequence[float], isolation: Sequence[float]) -> float:
    """Mean of the causes and isolations of both attributes: (cause_A + cause_B + iso_AB + iso_BA) / 4."""
    return float(np.mean([*cause, *isolation]))


def ravel(
    coders: Coder | Sequence[Coder],
    entities: Entities,
    attributes: tuple[str, str],
    model: Model,
    *,
    n: int = 128,
    ks: Sequence[int] = KS,
    seed: int = 0,
    sink: Sink | None = None,
) -> ConceptScores:
    """Cause, isolation and disentanglement of two attributes, on pairs of test entities that the model knows them of.

    Latents are ranked on training entities by attribution (difference of their values, times the gradient along their
    decoder row, of the other entity's answer over the own one), less the absolute attribution on the other attribute; k
    is chosen on the training entities as well. SAEBench trains a mask instead, so its values do not compare. The
    dictionary's error is kept. Intervals are by bootstrap over base entities.

    Raises InputError when the model knows too little, UnknownNameError for an unknown attribute.
    """
    listed = as_tuple(coders)
    site = _site_of(listed[0])
    with shown(sink) as progress:
        train, test = (
            pairs_of(model, site, entities, attributes, split, n, seed)
            for split in track(("train", "test"), "ravel", sink=progress)
        )
    found: dict[str, list[tuple[Hits, int]]] = {"latents": [], "random": []}
    for coder in listed:
        code = Code(coder.encode, coder.decoder_rows().cpu())
        found["latents"].append(_best(model, site, train, test, code, ks))
        # As many random latents as were found to be best, so that the two differ in the choice alone.
        k = found["latents"][-1][1]
        drawn = _changes(code, dict.fromkeys(attributes, _active(train, code, seed)[:k]))
        found["random"].append((hits_of(model, site, test, drawn), k))
    width = test[attributes[0]].base.shape[1]
    coordinates = Code(lambda x: x, torch.eye(width))
    found["coordinates"] = [_best(model, site, train, test, coordinates, ks)]
    found["everything"] = [(hits_of(model, site, test, dict.fromkeys(attributes, apart_of)), width)]
    note = "SAEBench trains a mask; here latents are ranked."
    return scores_of(found, entities, attributes, train, test, seed, note)


def scores_of(
    found: Mapping[str, list[tuple[Hits, int]]],
    entities: Entities,
    attributes: tuple[str, str],
    train: OfAttribute,
    test: OfAttribute,
    seed: int,
    note: str,
    words: Mapping[str, str] = WORDS,
) -> ConceptScores:
    """Of every method its lines. found: method -> what the test pairs say, and how many numbers were changed."""
    lines = [line for method, each in found.items() for line in _lines(method, each, test, seed, words)]
    n_train, n_test = (sum(len(one.pairs) for one in split.values()) for split in (train, test))
    said = f"{entities.kind}: {' and '.join(attributes)}"
    same = "Changing nothing scores .5, and so does changing everything."
    return ConceptScores("RAVEL", said, n_train, n_test, tuple(lines), f"{same} {note}")


def pairs_of(
    model: Model, site: Site, entities: Entities, attributes: tuple[str, str], split: str, n: int, seed: int
) -> dict[str, AttributePairs]:
    return {
        name: _pairs(model, site, prompt_pairs(model, entities, name, split, n, seed), split) for name in attributes
    }


def _site_of(coder: Coder) -> Site:
    if len(coder.in_sites) != 1 or coder.in_sites != coder.out_sites:
        raise InputError("latents are swapped in dictionaries that read and reconstruct one site")
    return coder.in_sites[0]


def _pairs(model: Model, site: Site, pairs: PromptPairs, split: str) -> AttributePairs:
    """Pairs of prompts with what is needed of the activations; gradients to rank latents by, in training only."""
    base = rows_at(model, site, pairs.base, pairs.base_at)
    source = rows_at(model, site, pairs.source, pairs.source_at)
    return AttributePairs(pairs, base, source, slopes(model, site, pairs) if split == "train" else None)


@torch.no_grad()
def _ranks(train: OfAttribute, code: Code) -> dict[str, Tensor]:
    """Attribute -> numbers of its latents, best first."""
    effects = {}
    for name, one in train.items():
        assert one.slope is not None
        apart = (code.encode(one.source) - code.encode(one.base)).cpu()
        effects[name] = (apart * (one.slope @ code.rows.T)).mean(0)
    total = torch.stack([effect.abs() for effect in effects.values()]).sum(0)
    return {name: (effect - (total - effect.abs())).argsort(descending=True) for name, effect in effects.items()}


@torch.no_grad()
def _active(train: OfAttribute, code: Code, seed: int) -> Tensor:
    """Numbers of latents that are active for any entity, in random order."""
    strength = torch.cat([code.encode(one.base).cpu().abs().sum(0)[None] for one in train.values()]).sum(0)
    active = (strength > 0).nonzero()[:, 0]
    return active[torch.from_numpy(random_order(len(active), "ravel", seed))]


def _best(
    model: Model, site: Site, train: OfAttribute, test: OfAttribute, code: Code, ks: Sequence[int]
) -> tuple[Hits, int]:
    """What the test pairs say for the k that does best on training ones, and that k."""
    ranks = _ranks(train, code)
    chosen = {k: {attribute: rank[:k] for attribute, rank in ranks.items()} for k in ks}
    # k is a choice too, so it is made on training entities.
    trials = {k: _disentanglement(hits_of(model, site, train, _changes(code, some))) for k, some in chosen.items()}
    k = max(trials, key=trials.__getitem__)
    return hits_of(model, site, test, _changes(code, chosen[k])), k


def _disentanglement(hits: Hits) -> float:
    cause, isolation = ([float(v.mean()) for (a, b), v in hits.items() if (a == b) == own] for own in (True, False))
    return disentanglement(cause, isolation)


@torch.no_grad()
def hits_of(model: Model, site: Site, split: OfAttribute, changes: Mapping[str, Change]) -> Hits:
    """For every attribute's choice and every attribute asked for, whether the model says what it should."""
    found = {}
    for changed, change in changes.items():
        for asked, one in split.items():
            said = says_after(model, site, one.pairs, change(one))
            right = one.pairs.source_says if changed == asked else one.pairs.base_says
            found[changed, asked] = (said == right).double().numpy()
    return found


def _changes(code: Code, chosen: Mapping[str, Tensor]) -> dict[str, Change]:
    """For each attribute, giving its latents the source's values."""

    def of(numbers: Tensor) -> Change:
        return lambda one: (code.encode(one.source) - code.encode(one.base)).cpu()[:, numbers] @ code.rows[numbers]

    return {attribute: of(numbers) for attribute, numbers in chosen.items()}


def apart_of(one: AttributePairs) -> Rows:
    return one.source - one.base


def _lines(
    method: str, each: Sequence[tuple[Hits, int]], test: OfAttribute, seed: int, words: Mapping[str, str]
) -> list[ScoreLine]:
    """Disentanglement with its interval, cause and isolation, of one method."""
    k = each[0][1] if method != "everything" else None
    score = lambda own: [  # noqa: E731
        float(np.mean([hits[pair].mean() for pair in hits if (pair[0] == pair[1]) == own])) for hits, _ in each
    ]
    values = tuple(_disentanglement(hits) for hits, _ in each)
    means = {pair: np.mean([hits[pair] for hits, _ in each], axis=0) for pair in each[0][0]}
    name = f"{method}: disentanglement"
    measurement = _measured(name, float(np.mean(values)), means, test, seed)
    return [
        ScoreLine(name, words[method], values, measurement, k),
        line_of_dictionaries(f"{method}: cause", words[method], score(True), k=k),
        line_of_dictionaries(f"{method}: isolation", words[method], score(False), k=k),
    ]


def _measured(name: str, estimate: float, means: Hits, test: OfAttribute, seed: int) -> Measurement:
    """The mean of the four shares, one value per base entity that is in pairs of all four, and its interval from
    resampling base entities.
    """
    names = sorted({entity for one in test.values() for entity in one.pairs.entities})
    row_of = {entity: number for number, entity in enumerate(names)}
    totals = np.zeros((len(names), 2 * len(means)))
    for column, ((_, asked), values) in enumerate(means.items()):
        rows = [row_of[entity] for entity in test[asked].pairs.entities]
        np.add.at(totals[:, 2 * column], rows, values)
        np.add.at(totals[:, 2 * column + 1], rows, 1.0)
    # An entity may be in few pairs: a draw without any of an attribute's is 0 / 0, and is kept from being.
    statistic = lambda t: (t[..., ::2] / np.maximum(t[..., 1::2], 1e-9)).mean(-1)  # noqa: E731
    low = high = None
    if len(names) >= FEWEST_GROUPS:
        low, high = interval_of_sums(totals, statistic, draws=500, seed=seed, method="percentile")
    complete = np.asarray((totals[:, 1::2] > 0).all(1))
    return Measurement(
        name=name,
        values=tuple(statistic(totals[complete]).tolist()),
        estimate=estimate,
        low=low,
        high=high,
        n=int(complete.sum()),
        n_groups=len(names),
        groups={"entity": tuple(entity for entity, of_all in zip(names, complete, strict=True) if of_all)},
        seed=seed,
    )
