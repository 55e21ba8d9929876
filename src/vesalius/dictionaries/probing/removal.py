"""Spurious-correlation removal (SCR): does ablating a mark's latents free a biased probe of it? (SAEBench, section 3.)

A probe of a label is fitted to texts in which a mark always goes with it, so it learns both. The latents of the mark
are ablated, and the probe is tried on texts in which the two are independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vesalius.concepts.classifier import Plane, logistic, mean_difference
from vesalius.dictionaries.probing.readings import Floats, Readings, random_order
from vesalius.dictionaries.probing.scores import Score, Scores
from vesalius.errors import InputError

UNRELIABLE = (
    "Chanin 2026 (arXiv:2605.18229) finds this metric unreliable at its usual settings and advises against it: read it "
    "beside its spread over seeds and the controls."
)
LEAST_GAP = 0.001
Numbers = NDArray[np.intp]
Flags = NDArray[np.bool_]


def removal_score(ablated: float, base: float, oracle: float) -> float:
    """(ablated - base) / (oracle - base) of accuracies; 0 where the oracle gains nothing. May be over 1 or under 0."""
    return 0.0 if oracle - base < LEAST_GAP else (ablated - base) / (oracle - base)


@dataclass(frozen=True, eq=False)
class Direction:
    """One way round: the biased probe judged by `label`, while the latents of `mark` are ablated. Test accuracies."""

    label: Flags
    mark: Flags
    base: float
    oracle: float


@dataclass(frozen=True, eq=False)
class Setting:
    """The biased probe, the balanced texts to fit on and to test on, and both ways round."""

    probe: Plane
    train: Numbers
    test: Numbers
    ways: tuple[Direction, Direction]


def spurious_removal(readings: Readings, ns: Sequence[int] = (2, 5, 10, 20, 50)) -> Scores:
    """SCR per number of ablated latents; of the two ways round, the one that the biased probe is worse at (SAEBench).

    The concept needs two labels and two marks. Beside the latents: as many latents at random, and the mark's direction
    (difference of means) projected out of the activations. Raises InputError without two of both, or too few texts.
    """
    setting = _setting(readings)
    way = min(setting.ways, key=lambda one: one.base)
    lines = []
    for n in ns:
        for method, words in (("latents", "the latents with the largest effect on a probe of the mark"),
                              ("random", "as many of the active latents at random")):  # fmt: skip
            values = [_of_latents(readings, number, setting, way, n, method) for number in range(len(readings.coders))]
            lines.append(Score(method, words, tuple(values), k=n))
    projected = _projected(readings, setting, way)
    lines.append(Score("difference", "the mark's difference of means projected out of the activations", (projected,)))
    gap = f"The biased probe is right in {way.base:.3f} of the balanced texts, an unbiased one in {way.oracle:.3f}."
    return Scores(
        "spurious-correlation removal", readings.concept.name, len(setting.train), len(setting.test), tuple(lines),
        f"{gap} {UNRELIABLE}",
    )  # fmt: skip


def _setting(readings: Readings) -> Setting:
    concept = readings.concept
    marks = sorted(set(concept.marks))
    if len(concept.classes) != 2 or len(marks) != 2:
        raise InputError(
            f"{concept.name}: removal needs two labels and two marks (a second column); got {len(concept.classes)} and "
            f"{len(marks)}"
        )
    label, mark = concept.of(concept.classes[1]), np.array([own == marks[1] for own in concept.marks])
    train, test = (_even(numbers, label, mark, readings.seed) for numbers in readings.halves)
    together = train[label[train] == mark[train]]
    probe = logistic(readings.rows[together], label[together])
    rows, ways = readings.rows, []
    for wanted, other in ((label, mark), (mark, label)):
        fair = logistic(rows[train], wanted[train])
        accuracies = (plane.accuracy(rows[test], wanted[test]) for plane in (probe, fair))
        ways.append(Direction(wanted, other, *accuracies))
    return Setting(probe, train, test, (ways[0], ways[1]))


def _even(numbers: Numbers, label: Flags, mark: Flags, seed: int) -> Numbers:
    """As many texts of each of the four combinations. Raises InputError when one has none."""
    cells = [numbers[(label[numbers] == a) & (mark[numbers] == b)] for a in (True, False) for b in (True, False)]
    least = min(map(len, cells))
    if least < 2:
        raise InputError(f"a combination of label and mark has {least} texts; at least 2 are needed in each half")
    return np.sort(np.concatenate([cell[random_order(len(cell), seed)[:least]] for cell in cells]))


def _of_latents(readings: Readings, number: int, setting: Setting, way: Direction, n: int, method: str) -> float:
    """The score with n latents of one dictionary ablated: of the mark's, or any that are active."""
    values = readings.latents[number]
    if method == "random":
        active = np.flatnonzero(values[setting.train].any(0))
        chosen = active[random_order(len(active), readings.seed + n)[:n]]
    else:
        mark = logistic(readings.rows[setting.train], way.mark[setting.train])
        chosen = strongest(np.abs(effects(readings, number, setting.train, way.mark, mark)), n)
    rows = ablated(readings, number, setting.test, chosen)
    return removal_score(setting.probe.accuracy(rows, way.label[setting.test]), way.base, way.oracle)


def effects(
    readings: Readings, number: int, texts: Numbers, inside: Flags, probe: Plane, rising: bool = False
) -> Floats:
    """[latent] difference of its means in and outside the class, times what one unit of it adds to the probe.

    rising: latents that are weaker in the class count as 0.
    """
    values = readings.latents[number][texts].astype(np.float64)
    apart = values[inside[texts]].mean(0) - values[~inside[texts]].mean(0)
    found: Floats = (np.maximum(apart, 0.0) if rising else apart) * (readings.directions(number) @ probe.weights)
    return found


def strongest(effect: Floats, n: int) -> Numbers:
    """The n latents of the largest effect above zero; fewer when fewer have any."""
    order = np.argsort(-effect, kind="stable")[:n]
    return order[effect[order] > 0]


def ablated(readings: Readings, number: int, texts: Numbers, latents: Numbers) -> Floats:
    """[text, width] activations less what these latents add to them; the dictionary's error stays in."""
    values = readings.latents[number][texts][:, latents].astype(np.float64)
    found: Floats = readings.rows[texts] - values @ readings.directions(number)[latents]
    return found


def _projected(readings: Readings, setting: Setting, way: Direction) -> float:
    train, test = setting.train, setting.test
    plane = mean_difference(readings.rows[train], way.mark[train])
    unit = plane.weights / np.linalg.norm(plane.weights)
    centre = readings.rows[train].mean(0)
    rows = readings.rows[test]
    rows = rows - np.outer((rows - centre) @ unit, unit)
    return removal_score(setting.probe.accuracy(rows, way.label[test]), way.base, way.oracle)
