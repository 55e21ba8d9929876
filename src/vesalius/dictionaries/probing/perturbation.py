"""Targeted probe perturbation (TPP): do a class's latents hurt the probe of that class, and no other? (SAEBench, 3.)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vesalius.concepts.classifier import Plane, logistic
from vesalius.dictionaries.probing.readings import Readings
from vesalius.dictionaries.probing.removal import UNRELIABLE, ablated, effects, strongest
from vesalius.dictionaries.probing.scores import Score, Scores
from vesalius.dictionaries.probing.sparse import Cell, cells_of
from vesalius.errors import InputError

Accuracies = Mapping[str, float]


def perturbation_score(clean: Accuracies, ablated_by: Mapping[str, Accuracies]) -> dict[str, float]:
    """Per class: what its own ablation takes from its probe, less the mean of what it takes from the others'.

    clean: accuracy of each class's probe. ablated_by: class whose latents are ablated -> accuracies then.
    """
    found = {}
    for label, then in ablated_by.items():
        lost = {name: clean[name] - accuracy for name, accuracy in then.items()}
        others = [value for name, value in lost.items() if name != label]
        found[label] = lost[label] - float(np.mean(others))
    return found


def targeted_perturbation(readings: Readings, ns: Sequence[int] = (2, 5, 10, 20, 50)) -> Scores:
    """TPP per number of ablated latents, mean over classes; 0 is no effect, or the same on every probe.

    The concept needs at least three labels. Beside the latents of the class: as many of the next class's, whose
    effect on this class's probe is not what was aimed at. Raises InputError for fewer labels.
    """
    if len(readings.concept.classes) < 3:
        raise InputError(f"{readings.concept.name}: perturbation needs at least 3 labels; it has 2. See sparse_probing")
    cells = cells_of(readings)
    probes = {cell.label: logistic(readings.rows[cell.train], cell.inside[cell.train]) for cell in cells}
    clean = {
        cell.label: probes[cell.label].accuracy(readings.rows[cell.test], cell.inside[cell.test]) for cell in cells
    }
    lines = [_line(readings, cells, probes, clean, n, shift, method, words)
             for n in ns for shift, method, words in (
                 (0, "latents", "the latents with the largest effect on the probe of their class"),
                 (1, "others", "as many of the latents of the next class"))]  # fmt: skip
    return Scores(
        "targeted probe perturbation", readings.concept.name, len(readings.halves[0]), len(readings.halves[1]),
        tuple(lines), f"Probes are right in {np.mean(list(clean.values())):.3f} of the balanced texts. {UNRELIABLE}",
    )  # fmt: skip


def _line(
    readings: Readings, cells: Sequence[Cell], probes: Mapping[str, Plane], clean: Accuracies, n: int, shift: int,
    method: str, words: str,
) -> Score:  # fmt: skip
    each = [_scores(readings, number, cells, probes, clean, n, shift) for number in range(len(readings.coders))]
    parts = {cell.label: float(np.mean([found[cell.label] for found in each])) for cell in cells}
    return Score(method, words, tuple(float(np.mean(list(found.values()))) for found in each), k=n, parts=parts)


def _scores(
    readings: Readings, number: int, cells: Sequence[Cell], probes: Mapping[str, Plane], clean: Accuracies, n: int,
    shift: int,
) -> dict[str, float]:  # fmt: skip
    by = {}
    for place, cell in enumerate(cells):
        source = cells[(place + shift) % len(cells)]
        effect = effects(readings, number, source.train, source.inside, probes[source.label], rising=True)
        by[cell.label] = _accuracies(readings, number, cells, probes, strongest(effect, n))
    return perturbation_score(clean, by)


def _accuracies(
    readings: Readings, number: int, cells: Sequence[Cell], probes: Mapping[str, Plane], chosen: np.ndarray
) -> dict[str, float]:
    return {
        cell.label: probes[cell.label].accuracy(ablated(readings, number, cell.test, chosen), cell.inside[cell.test])
        for cell in cells
    }
