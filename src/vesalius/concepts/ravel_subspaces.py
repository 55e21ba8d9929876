"""RAVEL for subspaces: which way of finding one holds an attribute of an entity, and nothing else?

Distributed alignment search is trained to give the other entity's attribute; the multi-task search (MDAS, Huang et al.
2024, arXiv:2402.17700, section 4) is trained to leave the other attribute alone as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.concepts.das import DasConfig, Exchange, train_das
from vesalius.concepts.effect import basis_of
from vesalius.concepts.entities import Entities
from vesalius.concepts.ravel import AttributePairs, Change, Hits, OfAttribute, apart_of, hits_of, pairs_of, scores_of
from vesalius.concepts.scores import ConceptScores
from vesalius.inputs import Tokens
from vesalius.jobs import Sink, track
from vesalius.jobs.progress import shown
from vesalius.model import Model
from vesalius.patching.tail import Tail
from vesalius.seeds import generator_for
from vesalius.site import Site

WORDS = {
    "das": "a subspace trained to give the other entity's attribute",
    "multi-task das": "a subspace trained for that, and to leave the other attribute alone",
    "probe": "where the means of the attribute's values lie apart",
    "principal components": "the first principal components",
    "random subspace": "a random subspace",
    "everything": "all of the activations at the entity's last token",
}
Basis = Float[Tensor, "rank width"]


def ravel_subspaces(
    model: Model,
    site: Site | str,
    entities: Entities,
    attributes: tuple[str, str],
    *,
    config: DasConfig | None = None,
    n: int = 128,
    seed: int = 0,
    sink: Sink | None = None,
) -> ConceptScores:
    """Cause, isolation and disentanglement (see `ravel`) of subspaces at a site, found on pairs of training entities.

    config: of the searches; its rank is that of all subspaces, except that a probe's has at most one dimension less
    than there are values. Nothing about them is chosen on test entities. Raises as `ravel`, and InputError for a rank
    that is not under the width.
    """
    chosen, where = config or DasConfig(rank=16, batch_size=16, steps=100, seed=seed), Site.parse(site)
    with shown(sink) as progress:
        train, test = (
            pairs_of(model, where, entities, attributes, split, n, seed)
            for split in track(("train", "test"), "ravel", sink=progress)
        )
        bases = _bases(model, where, train, chosen, progress)
    found: dict[str, list[tuple[Hits, int]]] = {
        method: [(hits_of(model, where, test, {name: _along(basis) for name, basis in each.items()}), chosen.rank)]
        for method, each in bases.items()
    }
    width = test[attributes[0]].base.shape[1]
    found["everything"] = [(hits_of(model, where, test, dict.fromkeys(attributes, apart_of)), width)]
    note = f"Subspaces of rank {chosen.rank} at {where}."
    return scores_of(found, entities, attributes, train, test, seed, note, WORDS)


def _along(basis: Basis) -> Change:
    """Giving the base the source's coordinates."""
    return lambda one: apart_of(one) @ basis.T @ basis


def _bases(model: Model, site: Site, train: OfAttribute, config: DasConfig, sink: Sink) -> dict[str, dict[str, Basis]]:
    """Method -> attribute -> orthonormal rows."""
    found: dict[str, dict[str, Basis]] = {method: {} for method in WORDS if method != "everything"}
    rows = torch.cat([side for one in train.values() for side in (one.base, one.source)]).double()
    components = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][: config.rank].float()
    for name, one in train.items():
        others = [other for key, other in train.items() if key != name]
        found["das"][name] = _searched(model, site, one, (), config, sink)
        found["multi-task das"][name] = _searched(model, site, one, others, config, sink)
        found["probe"][name] = _between_means(one, config.rank)
        found["principal components"][name] = components
        draw = torch.randn(rows.shape[1], config.rank, generator=generator_for("ravel", config.seed, name))
        found["random subspace"][name] = torch.linalg.qr(draw)[0].T
    return found


def _searched(
    model: Model, site: Site, own: AttributePairs, others: Sequence[AttributePairs], config: DasConfig, sink: Sink
) -> Basis:
    """Trained on the attribute's own pairs; prompts for the others are to be answered as if nothing had changed."""
    parts = [own, *others]
    prompts = [
        ids[: int(length)].tolist()
        for one in parts
        for ids, length in zip(one.pairs.base.ids, one.pairs.base.lengths, strict=True)
    ]
    at = torch.cat([one.pairs.base_at for one in parts])
    tail = Tail.of(model, Tokens.from_rows(prompts), site, at)
    expected = torch.cat([own.pairs.source_says, *(one.pairs.base_says for one in others)])
    source = torch.cat([one.source for one in parts]).to(tail.values)
    return basis_of(train_das(Exchange(tail, tail.values, source, expected, torch.arange(len(at))), config, sink=sink))


def _between_means(one: AttributePairs, rank: int) -> Basis:
    """Principal axes of the means of the attribute's values, as far as there are any."""
    rows, says = torch.cat([one.base, one.source]).double(), torch.cat([one.pairs.base_says, one.pairs.source_says])
    means = torch.stack([rows[says == value].mean(0) for value in says.unique()])
    _, sizes, basis = torch.linalg.svd(means - means.mean(0), full_matrices=False)
    return basis[sizes > 1e-6 * sizes.max()][:rank].float()
