"""Sparse probing: how well few latents tell a concept (Gurnee et al. 2023, arXiv:2305.01610; SAEBench, section 3).

The k latents (1, 2, 5 ...) whose means in and outside the class differ most, on the training texts, and a logistic
regression on them; beside it the same on as many of the site's own coordinates, on all activations, and the difference
of means of all activations, which a dictionary has to beat to be of use for probing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vesalius.concepts.classifier import Plane, logistic, mean_difference
from vesalius.concepts.readings import Readings, random_order
from vesalius.concepts.scores import ConceptScores, ScoreLine, line_of_texts
from vesalius.errors import InputError

WORDS = {
    "latents": "logistic regression on the k latents whose class means differ most",
    "coordinates": "the same on k of the site's own coordinates",
    "activations": "logistic regression on all activations",
    "difference": "the difference of class means of all activations",
}
Fit = Callable[..., Plane]
Numbers = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class OneVsRest:
    """One class to tell from the rest. inside: [text] whether each is of it. train, test: numbers of the texts that are
    fitted to and tested on, as many of the class as of the rest.
    """

    label: str
    inside: NDArray[np.bool_]
    train: Numbers
    test: Numbers


def one_vs_rest(readings: Readings) -> list[OneVsRest]:
    """One per target label, balanced at random by the readings' seed, so that guessing is right half the time."""
    concept, found = readings.concept, []
    for label in concept.targets:
        inside = concept.of(label)
        train, test = (balanced(numbers, inside, readings.seed) for numbers in readings.halves)
        found.append(OneVsRest(label, inside, train, test))
    return found


def balanced(numbers: Numbers, inside: NDArray[np.bool_], seed: int) -> Numbers:
    """As many of these numbers in the class as outside, all of the smaller side."""
    sides = [numbers[inside[numbers] == side] for side in (True, False)]
    least = min(map(len, sides))
    kept = [side[random_order(len(side), seed)[:least]] for side in sides]
    return np.sort(np.concatenate(kept))


def ranked(values: NDArray[Any], task: OneVsRest) -> Numbers:
    """Columns by how far their means in and outside the class are apart on the training texts, farthest first."""
    inside = task.inside[task.train]
    rows = values[task.train].astype(np.float64)
    apart = np.abs(rows[inside].mean(0) - rows[~inside].mean(0))
    return np.argsort(-apart, kind="stable")


def sparse_probing(readings: Readings, ks: Sequence[int] = (1, 2, 5)) -> ConceptScores:
    """Accuracy of k-sparse probes on the test texts, per k and for the baselines; chance is .5.

    Of several labels each is told from the others, and lines are means over them. Raises InputError for a k under 1.
    """
    if min(ks) < 1:
        raise InputError(f"ks must be at least 1; got {list(ks)}")
    tasks = one_vs_rest(readings)
    lines = [_line(readings, tasks, "latents", readings.latents, k) for k in ks]
    lines += [_line(readings, tasks, "coordinates", [readings.rows], k) for k in ks]
    lines += [
        _line(readings, tasks, "activations", [readings.rows], None),
        _line(readings, tasks, "difference", [readings.rows], None, mean_difference),
    ]
    return ConceptScores(
        "sparse probing",
        readings.concept.name,
        len(readings.halves[0]),
        len(readings.halves[1]),
        tuple(lines),
        "Accuracy on texts that share no group with those fitted to; chance is .5.",
    )


def _line(
    readings: Readings,
    tasks: Sequence[OneVsRest],
    method: str,
    values: Sequence[NDArray[Any]],
    k: int | None,
    fit: Fit = logistic,
) -> ScoreLine:
    right = [np.concatenate([_right(own, task, k, fit) for task in tasks]).astype(float) for own in values]
    groups = [readings.concept.groups[number] for task in tasks for number in task.test]
    labels = [task.label for task in tasks for _ in task.test]
    return line_of_texts(method, WORDS[method], right, groups, k=k, labels=labels)


def _right(values: NDArray[Any], task: OneVsRest, k: int | None, fit: Fit) -> NDArray[np.bool_]:
    """[test text] whether its class is predicted."""
    # By the training texts alone: latents that were chosen on test texts would always look good.
    columns = slice(None) if k is None else ranked(values, task)[:k]
    plane = fit(values[task.train][:, columns], task.inside[task.train])
    found: NDArray[np.bool_] = plane.predict(values[task.test][:, columns]) == task.inside[task.test]
    return found
