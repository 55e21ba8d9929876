"""Absorption: a concept's latent stays silent where a more specific one fires (Chanin et al. 2024, arXiv:2409.14507).

With L1 or TopK, a dictionary that has a latent for "starts with L" and one for "lion" saves an active latent by putting
the first one's direction into the second: then the first has holes that no look at its examples shows. Definitions are
those of SAEBench (Karvonen et al. 2025, section 3): on texts that have the concept by a probe of the activations, how
much of the activation along the probe's direction is carried by other latents than the concept's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vesalius.concepts.classifier import logistic
from vesalius.concepts.readings import Floats, Readings
from vesalius.concepts.scores import ConceptScores, line_of_dictionaries, line_of_texts
from vesalius.concepts.sparse import OneVsRest, one_vs_rest, ranked
from vesalius.errors import InputError

SILENT = 1e-8
LEAST_SHARE = 0.4
"""Of the projection, which absorbing latents must carry."""
FULL_COSINE, PART_COSINE = 0.025, 0.1
MOST_ABSORBING = 3
MOST_SPLIT, LEAST_GAIN = 10, 0.03
"""Latents a concept may be split into, and what each must add to the F1 of a probe on them."""
WORDS = {
    "fraction": "share of the concept's direction that other latents carry, mean over its texts",
    "full": "share of its texts where its own latents are silent and one other carries it",
    "own latents fire": "share of its texts where any of its own latents is active",
    "own latents": "how many latents count as the concept's own",
    "probe": "accuracy of the probe that says which texts have the concept",
}


def absorbed_fraction(projection: float, main: float, absorbing: float) -> float:
    """How much of a concept other latents took over in one text, between 0 and 1.

    projection: x . d of the activations on the probe's unit direction d. main: what the concept's own latents add along
    d. absorbing: what the (at most three) strongest aligned others add. 0 when the own latents carry all of it, or the
    others less than .4 of it; 1 when the own carry nothing; else m / (m + main), m = min(absorbing, projection - main).
    """
    if projection <= 0 or main >= projection or absorbing / projection < LEAST_SHARE:
        return 0.0
    if main <= 0:
        return 1.0
    taken = min(absorbing, projection - main)
    return taken / (taken + main)


@dataclass(frozen=True, eq=False)
class AlongDirection:
    """Latents of some texts along a direction. values: [text, latent]. added: what each adds along it. cosine: [latent]
    of decoder rows with it. projection: [text] of the activations. own: the concept's latents.
    """

    values: Floats
    added: Floats
    cosine: Floats
    projection: Floats
    own: NDArray[np.intp]

    def fractions(self) -> Floats:
        """[text] `absorbed_fraction`."""
        main = self.added[:, self.own].sum(1)
        others = np.where((self.cosine >= PART_COSINE) & (self.added > 0), self.added, 0.0)
        # A concept's own latents cannot absorb it.
        others[:, self.own] = 0.0
        strongest = np.sort(others, axis=1)[:, -MOST_ABSORBING:].sum(1)
        rows = zip(self.projection, main, strongest, strict=True)
        return np.array([absorbed_fraction(*map(float, row)) for row in rows])

    def full(self) -> NDArray[np.bool_]:
        """[text] whether the own latents are silent and one other, aligned, carries at least .4 of the projection."""
        top = self.added.argmax(1)
        carried = self.added[np.arange(len(top)), top]
        silent = (np.abs(self.values[:, self.own]) < SILENT).all(1)
        enough = (self.projection > 0) & (carried >= LEAST_SHARE * self.projection)
        return np.asarray(silent & enough & (self.cosine[top] >= FULL_COSINE))

    def firing(self) -> NDArray[np.bool_]:
        """[text] whether any of the own latents is active."""
        return np.asarray((np.abs(self.values[:, self.own]) >= SILENT).any(1))


def absorption(readings: Readings) -> ConceptScores:
    """How far other latents take over from a concept's own, on the test texts that the probe rightly gives the concept.

    A concept's own latents are found on the training texts: the one whose class means differ most, then the next ones
    while each adds .03 to the F1 of a probe on them, measured on a third of those texts. Decoder rows count
    with their norms. Read single tokens (`at="last"`), such as the word the concept is about.

    Raises InputError when the probe finds the concept in no test text.
    """
    tasks = one_vs_rest(readings)
    probes = [_probe(readings, task) for task in tasks]
    chosen = [probe.texts for probe in probes]
    if not sum(map(len, chosen)):
        raise InputError(f"{readings.concept.name}: the probe finds the concept in no test text; nothing is to absorb")
    groups = [readings.concept.groups[number] for numbers in chosen for number in numbers]
    labels = [task.label for task, numbers in zip(tasks, chosen, strict=True) for _ in numbers]
    found = [
        [_along(readings, number, task, probe) for task, probe in zip(tasks, probes, strict=True)]
        for number in range(len(readings.coders))
    ]
    joined = lambda method: [np.concatenate([method(one) for one in each]).astype(float) for each in found]  # noqa: E731
    line = lambda name, method: line_of_texts(name, WORDS[name], joined(method), groups, labels=labels)  # noqa: E731
    n_own = [[len(along.own) for along in each] for each in found]
    lines = (
        line("fraction", AlongDirection.fractions),
        line("full", AlongDirection.full),
        line("own latents fire", AlongDirection.firing),
        line_of_dictionaries("own latents", WORDS["own latents"], [float(np.mean(sizes)) for sizes in n_own]),
        line_of_dictionaries("probe", WORDS["probe"], [float(np.mean([probe.accuracy for probe in probes]))]),
    )
    return ConceptScores(
        "absorption",
        readings.concept.name,
        len(readings.halves[0]),
        len(groups),
        lines,
        "Low is good only where the own latents fire: without a latent for the concept there is nothing to absorb. "
        "SAEBench means it for models of a billion parameters and 16 thousand latents or more.",
    )


@dataclass(frozen=True, eq=False)
class Probe:
    """direction: [width] unit direction of the concept in the activations. accuracy: on test texts. texts: numbers of
    the test texts that it rightly finds the concept in.
    """

    direction: Floats
    accuracy: float
    texts: NDArray[np.intp]


def _probe(readings: Readings, task: OneVsRest) -> Probe:
    plane = logistic(readings.rows[task.train], task.inside[task.train])
    test = readings.halves[1]
    said = plane.predict(readings.rows[test])
    accuracy = plane.accuracy(readings.rows[task.test], task.inside[task.test])
    direction = plane.weights / max(float(np.linalg.norm(plane.weights)), 1e-300)
    return Probe(direction, accuracy, test[said & task.inside[test]])


def _along(readings: Readings, number: int, task: OneVsRest, probe: Probe) -> AlongDirection:
    # Decoder rows with their norms: what a latent adds, not only in which direction.
    rows = readings.directions(number)
    along = rows @ probe.direction
    cosine = along / np.maximum(np.linalg.norm(rows, axis=1), 1e-30)
    values = readings.latents[number][probe.texts].astype(np.float64)
    own = own_latents(readings, number, task)
    return AlongDirection(values, values * along, cosine, readings.rows[probe.texts] @ probe.direction, own)


def own_latents(readings: Readings, number: int, task: OneVsRest) -> NDArray[np.intp]:
    """The latents that stand for the concept, found on the training texts."""
    # Scored on training texts that were not fitted to, since more latents always fit better.
    kept_back = np.arange(len(task.train)) % 3 == 0
    inner = OneVsRest(task.label, task.inside, task.train[~kept_back], task.train[kept_back])
    values = readings.latents[number]
    order = ranked(values, inner)[:MOST_SPLIT]
    best = -np.inf
    for k in range(1, len(order) + 1):
        score = _f1(values, inner, order[:k])
        if k > 1 and score < best + LEAST_GAIN:
            return order[: k - 1]
        best = score
    return order


def _f1(values: NDArray[np.float32], task: OneVsRest, columns: Sequence[int] | NDArray[np.intp]) -> float:
    plane = logistic(values[task.train][:, columns], task.inside[task.train])
    said, true = plane.predict(values[task.test][:, columns]), task.inside[task.test]
    return float(2 * (said & true).sum() / max(said.sum() + true.sum(), 1))
