"""Tests of a circuit as a hypothesis (Shi et al. 2024, "Hypothesis Testing the Circuit Hypothesis in LLMs").

Equivalence, independence and minimality as in their sections 3.1 to 3.3, sufficiency against random circuits as in
their section 3.4. Exact binomial p-values; minimality is corrected for the number of edges. Not to reject equivalence
is no proof of it: read the interval of the faithfulness beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from vesalius.circuits.cutting import Ablation
from vesalius.circuits.graph import Graph
from vesalius.circuits.masked import with_only
from vesalius.errors import InputError
from vesalius.seeds import generator_for
from vesalius.stats import IndependenceTest, binomial_test, even_odds_test, hsic_test

RANDOM, QUANTILE = 100, 0.9
_TRIES = 200


@dataclass(frozen=True)
class Counted:
    """A test by counting: hits of n, the p-value, and how many ties were left out."""

    hits: int
    n: int
    p: float
    ties: int = 0


def equivalence(cut: Ablation, circuit: Bool[Tensor, " edge"], epsilon: float = 0.1) -> Counted:
    """H0: circuit and model are above one another equally often. A small p: they are not equivalent.

    Prompts on which both give the same are left out; p is 1 where no others are.
    """
    difference = with_only(cut, circuit[None])[0] - cut.plain()[0]
    return counted(difference, epsilon)


def counted(difference: Float[Tensor, " example"], epsilon: float = 0.1) -> Counted:
    """The equivalence test of per-example differences; those up to rounding are ties."""
    tied = difference.abs() <= 1e-6 * max(1.0, float(difference.abs().max()))
    rest = difference[~tied]
    wins, n = int((rest > 0).sum()), len(rest)
    return Counted(wins, n, even_odds_test(wins, n, epsilon) if n else 1.0, int(tied.sum()))


def independence(cut: Ablation, circuit: Bool[Tensor, " edge"], *, draws: int = 999, seed: int = 0) -> IndependenceTest:
    """H0: what the rest of the model does without the circuit has nothing to do with what the model does.

    A small p: the circuit left something out. Raises InputError where the rest gives the same on all prompts, which is
    as independent as can be.
    """
    rest = with_only(cut, (~circuit)[None])[0]
    return hsic_test(rest.double().numpy(), cut.plain()[0].double().numpy(), draws=draws, seed=seed)


def sufficiency(cut: Ablation, circuit: Bool[Tensor, " edge"], *, n: int = RANDOM, seed: int = 0) -> Counted:
    """H0: the circuit is no closer to the model than 90 % of random circuits of its size. A small p: it is.

    hits: random circuits that are further away. Distance: mean absolute difference of the metric.
    """
    others = random_circuits(cut.wired.graph, int(circuit.sum()), n, seed)
    distance = (with_only(cut, [circuit, *others]) - cut.plain()[0]).abs().mean(1)
    hits = int((distance[1:] > distance[0]).sum())
    return Counted(hits, n, binomial_test(hits, n, QUANTILE, "greater"))


def minimality(
    cut: Ablation, circuit: Bool[Tensor, " edge"], *, n: int = RANDOM, seed: int = 0
) -> tuple[tuple[int, ...], Float[Tensor, " member"], Float[Tensor, " member"]]:
    """H0, for each edge: cutting it changes the circuit more than 90 % of cuts of a random edge beside it would.

    A random path is added to the circuit and one of its edges cut again, n times. Returns the edges' numbers, how much
    cutting each changes the metric (mean absolute), and the p-values, corrected for the number of edges (Bonferroni). A
    small p: the edge is not needed. Raises InputError for a circuit without edges.
    """
    graph, generator = cut.wired.graph, generator_for("minimality", seed)
    numbers = circuit.nonzero()[:, 0].tolist()
    if not numbers:
        raise InputError("minimality is of a circuit with edges; this one has none")
    inflated, reduced = [], []
    for _ in range(n):
        path = _path_beside(graph, circuit, generator)
        new = [number for number in path if not bool(circuit[number])]
        larger = circuit.clone()
        larger[path] = True
        smaller = larger.clone()
        smaller[new[int(torch.randint(len(new), (1,), generator=generator))]] = False
        inflated.append(larger)
        reduced.append(smaller)
    without = []
    for number in numbers:
        one = circuit.clone()
        one[number] = False
        without.append(one)
    values = with_only(cut, [circuit, *without, *inflated, *reduced])
    knocked = (values[1 : 1 + len(numbers)] - values[0]).abs().mean(1)
    start = 1 + len(numbers)
    null = (values[start : start + n] - values[start + n :]).abs().mean(1)
    hits = (null[None] < knocked[:, None]).sum(1).tolist()
    p = [min(1.0, binomial_test(count, n, QUANTILE, "less") * len(numbers)) for count in hits]
    return tuple(numbers), knocked, torch.tensor(p)


def random_circuits(graph: Graph, size: int, n: int, seed: int = 0) -> list[Bool[Tensor, " edge"]]:
    """Circuits of `size` edges made of random paths from the embeddings to the logits, all of them connected.

    Where the last path does not fit, one of fewer edges is looked for; after many tries the circuit stays smaller.
    Raises InputError for a size that no circuit has.
    """
    if not 0 < size <= len(graph):
        raise InputError(f"a random circuit has 1 to {len(graph):,} edges; got {size}")
    generator, found = generator_for("random circuits", size, seed), []
    for _ in range(n):
        mask = torch.zeros(len(graph), dtype=torch.bool)
        for _ in range(_TRIES + size):
            room = size - int(mask.sum())
            if not room:
                break
            path = random_path(graph, generator)
            if sum(not bool(mask[number]) for number in path) <= room:
                mask[path] = True
        found.append(mask)
    return found


def random_path(graph: Graph, generator: torch.Generator) -> list[int]:
    """Edges of a path from the logits back to the embeddings: a random writer, and a random reader of its node."""
    path, reader = [], len(graph.readers) - 1
    while True:
        writer = int(torch.randint(int(graph.counts[reader]), (1,), generator=generator))
        path.append(int(graph.starts[reader]) + writer)
        if writer < graph.outside:
            return path
        own = graph.readers_of[writer]
        reader = own[int(torch.randint(len(own), (1,), generator=generator))]


def _path_beside(graph: Graph, circuit: Bool[Tensor, " edge"], generator: torch.Generator) -> list[int]:
    """A random path that is not all in the circuit. Raises InputError where there is none to be found."""
    for _ in range(_TRIES):
        path = random_path(graph, generator)
        if not bool(circuit[path].all()):
            return path
    raise InputError("the circuit holds every path there is, so there is nothing to compare its edges with")


def jaccard_null(share: float) -> float:
    """Expected overlap (intersection over union) of two random circuits that each hold this share of the edges."""
    return share / (2 - share)


def stability(
    effects: Float[Tensor, "edge example"], size: int, *, draws: int = 20, seed: int = 0
) -> tuple[float, float]:
    """Mean overlap of circuits found again from bootstrapped examples, and what random ones would have.

    effects: per example, as `Scores.effects`. size: edges of each circuit, the highest by absolute mean effect.
    Overlap: intersection over union of each pair of circuits. Raises InputError for fewer than two draws.
    """
    if draws < 2:
        raise InputError(f"stability compares at least two draws; got {draws}")
    generator, examples = generator_for("stability", seed), effects.shape[1]
    rows = [torch.randint(examples, (examples,), generator=generator) for _ in range(draws)]
    return float(_overlaps(effects, rows, size).mean()), jaccard_null(size / len(effects))


def _overlaps(effects: Float[Tensor, "edge example"], rows: Sequence[Tensor], size: int) -> NDArray[np.float64]:
    """Of each pair of circuits, one for each set of rows."""
    masks = torch.zeros(len(rows), len(effects))
    for mask, some in zip(masks, rows, strict=True):
        mask[effects[:, some].mean(1).abs().argsort(descending=True, stable=True)[:size]] = 1
    shared = masks @ masks.T
    return np.asarray((shared / (2 * size - shared)).double().numpy()[np.triu_indices(len(rows), 1)])


def paraphrase_stability(
    effects: Float[Tensor, "edge example"], wordings: Sequence[str], size: int
) -> tuple[float, float, float]:
    """Mean and lowest overlap of circuits found from each wording of the question, and what random ones would have.

    effects: per example, as `Scores.effects`. wordings: of each example, such as `pairs.groups["template"]`. size: as
    for `stability`. A mean near the null k / (2 - k) says that the wording decides which edges are found (Méloux et al.
    2025). Raises InputError for fewer than two wordings, or other labels than examples.
    """
    kinds = sorted(set(wordings))
    if len(wordings) != effects.shape[1] or len(kinds) < 2:
        raise InputError(f"give the wording of each of the {effects.shape[1]} examples, at least two; got {len(kinds)}")
    labels = np.array(wordings)
    overlaps = _overlaps(effects, [torch.from_numpy(np.flatnonzero(labels == kind)) for kind in kinds], size)
    return float(overlaps.mean()), float(overlaps.min()), jaccard_null(size / len(effects))


def prompt_clusters(effects: Float[Tensor, "edge example"], count: int) -> tuple[tuple[int, ...], float]:
    """Prompts that use the same edges: a cluster for each, and how far the clusters are apart (mean silhouette).

    By average linkage over one minus the correlation of the prompts' effects. A silhouette near 0 says that there are
    no clusters. Raises InputError for a count that is not between 2 and the number of examples less one.
    """
    # Late, because it is heavy and needed here only.
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform
    from sklearn.metrics import silhouette_score

    examples = effects.shape[1]
    if not 2 <= count < examples:
        raise InputError(f"{examples} examples make 2 to {examples - 1} clusters; got {count}")
    distance = (1 - np.corrcoef(effects.double().numpy().T)).clip(0)
    np.fill_diagonal(distance, 0)
    distance = (distance + distance.T) / 2
    labels = fcluster(linkage(squareform(distance, checks=False), "average"), count, "maxclust")
    apart = silhouette_score(distance, labels, metric="precomputed") if len(set(labels)) > 1 else 0.0
    return tuple(int(label) for label in labels), float(apart)
