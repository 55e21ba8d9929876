"""`quality`: from a dictionary and activations to everything that can be said of how good it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vesalius.concepts import ConceptScores, concept_scores
from vesalius.data import ActivationStore, Labelled, Source, as_source
from vesalius.data.packing import Context
from vesalius.dictionaries.coder import SparseCoder
from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.evaluation.baselines import WORDS, baselines
from vesalius.dictionaries.evaluation.figures import Figure, row_figures
from vesalius.dictionaries.evaluation.geometry import Geometry, geometry, shared
from vesalius.dictionaries.evaluation.result import Compared, Quality, Seed
from vesalius.dictionaries.evaluation.sample import Drawn, Sample, draw
from vesalius.dictionaries.evaluation.splice import Losses, losses_of
from vesalius.dictionaries.evaluation.totals import CoderReconstructor, Reconstructor, Totals, totals_of
from vesalius.dictionaries.held_out import EvaluationRows, evaluation_rows, was_trained_on
from vesalius.errors import InputError
from vesalius.jobs import Event, Sink, track
from vesalius.jobs.progress import shown
from vesalius.model import Model

TASK = "quality"
OWN = "dictionary"


@torch.no_grad()
def quality(
    coder: SparseCoder,
    data: Any,
    *,
    model: Model | None = None,
    others: Sequence[SparseCoder] = (),
    concepts: Sequence[Labelled] = (),
    n: int = 16_384,
    contexts: int = 32,
    seed: int = 0,
    batch_tokens: int = 1024,
    sink: Sink | None = None,
) -> Quality:
    """How good a dictionary is, and how good what it is compared with: `Quality.figures` says what is measured.

    data: a store, or another Source, or tensors as for `train`. Of a store only documents are used that the dictionary
    was not trained on, when the two can tell; `Quality.data` says what they could. model: splices the dictionary into
    it, on some of the contexts that the rows are of; needs a store, and one site that is reconstructed. others:
    dictionaries of the same sites, such as the same training from other seeds; what the first shares with each is
    counted. concepts: texts with labels, which need a model; `concept_scores` says what is measured on them, over all
    the dictionaries.

    n: rows. contexts: run through the model. Baselines store as many numbers per row as the dictionary has latents
    active. Intervals are 95 % bootstrap intervals over documents. sink: hears cost and progress; None shows both on
    standard error.

    Raises InputError for data without the dictionary's sites, too few rows, rows that don't vary, or a model that the
    activations are not of; UnknownNameError for a model without the sites.
    """
    if min(n, contexts, batch_tokens) < 1:
        raise InputError(f"n, contexts and batch_tokens must be positive; got {n}, {contexts} and {batch_tokens}")
    with shown(sink) as progress:
        effort = Effort(n, contexts, seed, batch_tokens, progress)
        return _measured(coder, data, model, tuple(others), tuple(concepts), effort)


@dataclass(frozen=True)
class Effort:
    """How much is looked at: rows, contexts, the seed of their choice, tokens in a forward pass; who hears of it."""

    n: int
    contexts: int
    seed: int
    batch_tokens: int
    sink: Sink


def _measured(
    coder: SparseCoder,
    data: Any,
    model: Model | None,
    others: Sequence[SparseCoder],
    concepts: Sequence[Labelled],
    effort: Effort,
) -> Quality:
    """Everything that `quality` says."""
    seed, sink = effort.seed, effort.sink
    source = as_source(data)
    rows = evaluation_rows(source, _metadata(coder))
    drawn = draw(coder, rows, source, effort.n, seed)
    own = totals_of(CoderReconstructor(coder), drawn.test)
    sink(Event("note", TASK, message=f"{len(drawn.test):,} rows of {drawn.test.n_groups} {drawn.test.unit}"))
    beside = baselines(coder, drawn.fit, own.l0, seed)
    losses = None
    if model is not None:
        losses = _spliced(model, coder, source, drawn, [CoderReconstructor(coder), *beside], effort)
    totals = [totals_of(reconstructor, drawn.test) for reconstructor in track(beside, "baselines", sink=sink)]
    compared = tuple(
        Compared(one.name, WORDS[one.name], _figures(of, losses, one.name, seed))
        for one, of in zip(beside, totals, strict=True)
    )
    seeds = [_seed(coder, own, other, source, drawn.test, seed) for other in track(others, "seeds", sink=sink)]
    return Quality(
        dictionary=_described(coder),
        data=_described_data(rows, source, drawn.test, losses, seed),
        model=None if model is None else {"name": model.name, "hash": model.content_hash, "note": model.note},
        figures=_figures(own, losses, OWN, seed),
        sites=_per_site(coder, own, seed),
        density=own.density,
        geometry=_geometry(coder, own, seed),
        baselines=compared,
        seeds=tuple(seeds),
        concepts=_concepts([coder, *others], concepts, model, seed, sink),
    )


def _metadata(coder: SparseCoder) -> Mapping[str, Any]:
    """Where a coder comes from; layers that stay on disk have none of their own."""
    return getattr(coder, "metadata", {})


def _figures(totals: Totals, losses: Losses | None, name: str, seed: int) -> dict[str, Figure]:
    found = row_figures(totals, seed)
    return found if losses is None else found | losses.figures(name, seed)


def _per_site(coder: SparseCoder, totals: Totals, seed: int) -> dict[str, dict[str, Figure]]:
    """Of each site, when there are several."""
    if len(coder.out_sites) == 1:
        return {}
    return {str(site): row_figures(totals.of_site(number), seed) for number, site in enumerate(coder.out_sites)}


def _alive(totals: Totals) -> list[bool] | None:
    """Which latents fired; None (all) when hardly any did, so that there is something to look at."""
    # Dead latents have directions too, and random ones would drown what the others are like.
    alive: list[bool] = (totals.density > 0).tolist()
    return alive if sum(alive) > 1 else None


def _concepts(
    coders: Sequence[SparseCoder], concepts: Sequence[Labelled], model: Model | None, seed: int, sink: Sink
) -> tuple[ConceptScores, ...]:
    """Scores on every concept. Raises InputError without a model, or for coders of several layers."""
    if not concepts:
        return ()
    known = [coder for coder in coders if isinstance(coder, Dictionary)]
    if model is None or len(known) < len(coders):
        raise InputError("concepts are read in a model (model=), with dictionaries that have one set of latents")
    return tuple(score for one in concepts for score in concept_scores(known, one, model, seed=seed, sink=sink))


def _geometry(coder: SparseCoder, own: Totals, seed: int) -> Geometry | None:
    """None for a coder of several layers, and when fewer than two latents write anything."""
    if not isinstance(coder, Dictionary):
        return None
    alive = _alive(own)
    writing = torch.cat(coder.decoders, 1).abs().sum(1).cpu() > 0
    if alive is not None:
        writing &= torch.tensor(alive)
    return geometry(coder, alive, seed=seed) if int(writing.sum()) > 1 else None


def _seed(coder: SparseCoder, own: Totals, other: SparseCoder, source: Source, test: Sample, seed: int) -> Seed:
    if not isinstance(coder, Dictionary) or not isinstance(other, Dictionary):
        raise InputError("what two seeds share is counted for dictionaries with one set of latents")
    if (other.in_sites, other.out_sites) != (coder.in_sites, coder.out_sites):
        raise InputError(f"{other!r} is of other sites than {coder!r}")
    totals = totals_of(CoderReconstructor(other), test)
    words = f"{other!r}, seed {other.metadata.get('config', {}).get('seed', 'not known')}"
    documents = {context.document for context in test.contexts}
    if isinstance(source, ActivationStore) and was_trained_on(other.metadata, source, documents):
        words += "; it was trained on some of these rows, which flatters it"
    pair = [(coder, _alive(own)), (other, _alive(totals))]
    # One to one, so the smaller set of latents is matched to the larger one.
    (a, alive_a), (b, alive_b) = sorted(pair, key=lambda item: sum(item[1] or [True] * item[0].n_latents))
    return Seed(Compared("seed", words, row_figures(totals, seed)), shared(a, b, alive_a, alive_b, seed=seed))


def _spliced(
    model: Model,
    coder: SparseCoder,
    source: Source,
    drawn: Drawn,
    reconstructors: Sequence[Reconstructor],
    effort: Effort,
) -> Losses:
    """Losses on some of the contexts that the rows are of. Raises InputError when that cannot be done."""
    if len(coder.out_sites) != 1 or not isinstance(source, ActivationStore):
        raise InputError(
            "a dictionary is spliced into a model at the one site that it reconstructs, on contexts of a store; this "
            f"one reconstructs {len(coder.out_sites)} sites, from a {type(source).__name__}. Leave model= out"
        )
    _check_model(model, source)
    # Of the same contexts that the rows are of: both are of documents that were not trained on.
    chosen = _spread(drawn.test.contexts, effort.contexts)
    documents = np.unique([context.document for context in chosen], return_inverse=True)[1].tolist()
    groups = documents if max(documents) > 0 else list(range(len(chosen)))
    return losses_of(
        model,
        coder.in_sites,
        coder.out_sites[0],
        chosen,
        groups,
        reconstructors,
        drawn.fit[1][0].double().mean(0).float(),
        effort.batch_tokens,
        effort.sink,
    )


def _spread(contexts: Sequence[Context], wanted: int) -> list[Context]:
    """Some of the contexts, evenly over all of them, which are in the order of the texts."""
    places = np.unique(np.linspace(0, len(contexts) - 1, min(wanted, len(contexts))).round().astype(int))
    return [contexts[place] for place in places]


def _check_model(model: Model, store: ActivationStore) -> None:
    hashes = [entry["sha256"] for entry in store.manifest.plan["models"]]
    if model.content_hash not in hashes:
        names = ", ".join(str(entry["name"]) for entry in store.manifest.plan["models"])
        raise InputError(f"the activations are of {names} with other weights than {model.name} has; give that model")


def _described(coder: SparseCoder) -> dict[str, Any]:
    return {
        "name": repr(coder),
        "hash": coder.content_hash,
        "latents": coder.n_latents,
        "in_sites": [str(site) for site in coder.in_sites],
        "out_sites": [str(site) for site in coder.out_sites],
        "trained": _trained(_metadata(coder).get("config", {})),
    }


def _trained(config: Mapping[str, Any]) -> str | None:
    """How it was trained, in words; None when that is not known."""
    if "steps" not in config:
        return None
    k = f" with k = {config['k']}" if config.get("kind") in ("topk", "batchtopk", "matryoshka") else ""
    return (
        f"{config.get('kind')}{k}: {config['steps']:,} steps of {config.get('batch_size', 0):,} rows, "
        f"learning rate {config.get('lr')}, seed {config.get('seed')}"
    )


def _described_data(
    rows: EvaluationRows, source: Source, test: Sample, losses: Losses | None, seed: int
) -> dict[str, Any]:
    return {
        "words": rows.words,
        "seen": rows.trained_on,
        "rows": len(test),
        "groups": test.n_groups,
        "unit": test.unit,
        "hash": source.content_hash,
        "seed": seed,
        "tokens": 0 if losses is None else losses.n_tokens,
    }
