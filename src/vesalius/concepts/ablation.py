"""What ablating a concept's latents does to probes: SCR and TPP (SAEBench, section 3).

Spurious-correlation removal (SCR): a probe of a label is fitted to texts in which a second label, the mark, always goes
with it, so it learns both. The latents of the mark are ablated, and the probe is tried on texts in which the two are
independent: does that free it of the mark?

Targeted probe perturbation (TPP): does ablating a class's latents hurt the probe of that class, and no other?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vesalius.concepts.classifier import Plane, logistic, mean_difference
from vesalius.concepts.readings import Floats, Readings, random_order
from vesalius.concepts.scores import ConceptScores, ScoreLine, line_of_dictionaries
from vesalius.concepts.sparse import OneVsRest, one_vs_rest
from vesalius.errors import InputError

UNRELIABLE = (
    "Chanin 2026 (arXiv:2605.18229) finds this metric unreliable at its usual settings and advises against it: read it "
    "beside its spread over seeds and the controls."
)
NUMBERS_ABLATED = (2, 5, 10, 20, 50)
LEAST_GAP = 0.001
Numbers = NDArray[np.intp]
Flags = NDArray[np.bool_]


# Ablation


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


# Spurious-correlation removal


def removal_score(ablated: float, base: float, oracle: float) -> float:
    """(ablated - base) / (oracle - base) of accuracies; 0 where the oracle gains nothing. May be over 1 or under 0."""
    return 0.0 if oracle - base < LEAST_GAP else (ablated - base) / (oracle - base)


@dataclass(frozen=True, eq=False)
class Removal:
    """What the biased probe should tell (target), and what is removed from it (spurious): label and mark, or the other
    way round. base, oracle: test accuracies of the biased probe, and of one that is fitted to balanced texts.
    """

    target: Flags
    spurious: Flags
    base: float
    oracle: float


@dataclass(frozen=True, eq=False)
class BiasedProbe:
    """A probe fitted where label and mark go together, and the balanced texts to fit others on and to test on."""

    plane: Plane
    train: Numbers
    test: Numbers
    removals: tuple[Removal, Removal]


def spurious_removal(readings: Readings, ns: Sequence[int] = NUMBERS_ABLATED) -> ConceptScores:
    """SCR per number of ablated latents; of label and mark, the one that the biased probe is worse at is the target.

    The concept needs two labels and two marks. Beside the latents: as many latents at random, and the mark's direction
    (difference of means) projected out of the activations. Raises InputError without two of both, or too few texts.
    """
    probe = _biased_probe(readings)
    removal = min(probe.removals, key=lambda one: one.base)
    methods = {
        "latents": "the latents with the largest effect on a probe of the mark",
        "random": "as many of the active latents at random",
    }
    lines = []
    for n in ns:
        for method, words in methods.items():
            values = [_score(readings, number, probe, removal, n, method) for number in range(len(readings.coders))]
            lines.append(line_of_dictionaries(method, words, values, k=n))
    projected = _projected(readings, probe, removal)
    words = "the mark's difference of means projected out of the activations"
    lines.append(line_of_dictionaries("difference", words, [projected]))
    gap = (
        f"The biased probe is right in {removal.base:.3f} of the balanced texts, an unbiased one in "
        f"{removal.oracle:.3f}."
    )
    return ConceptScores(
        "spurious-correlation removal",
        readings.concept.name,
        len(probe.train),
        len(probe.test),
        tuple(lines),
        f"{gap} {UNRELIABLE}",
    )


def _biased_probe(readings: Readings) -> BiasedProbe:
    concept = readings.concept
    marks = sorted(set(concept.marks))
    if len(concept.classes) != 2 or len(marks) != 2:
        raise InputError(
            f"{concept.name}: removal needs two labels and two marks (a second column); got {len(concept.classes)} and "
            f"{len(marks)}"
        )
    label, mark = concept.of(concept.classes[1]), np.array([own == marks[1] for own in concept.marks])
    train, test = (_even(numbers, label, mark, readings.seed) for numbers in readings.halves)
    # Where the two always go together a probe has no way to learn only one of them.
    together = train[label[train] == mark[train]]
    biased = logistic(readings.rows[together], label[together])
    rows, removals = readings.rows, []
    for target, spurious in ((label, mark), (mark, label)):
        unbiased = logistic(rows[train], target[train])
        base, oracle = (plane.accuracy(rows[test], target[test]) for plane in (biased, unbiased))
        removals.append(Removal(target, spurious, base, oracle))
    return BiasedProbe(biased, train, test, (removals[0], removals[1]))


def _even(numbers: Numbers, label: Flags, mark: Flags, seed: int) -> Numbers:
    """As many texts of each of the four combinations. Raises InputError when one has none."""
    cells = [numbers[(label[numbers] == a) & (mark[numbers] == b)] for a in (True, False) for b in (True, False)]
    least = min(map(len, cells))
    if least < 2:
        raise InputError(f"a combination of label and mark has {least} texts; at least 2 are needed in each half")
    return np.sort(np.concatenate([cell[random_order(len(cell), seed)[:least]] for cell in cells]))


def _score(readings: Readings, number: int, probe: BiasedProbe, removal: Removal, n: int, method: str) -> float:
    """The score with n latents of one dictionary ablated: those of what is spurious, or any that are active."""
    values = readings.latents[number]
    if method == "random":
        active = np.flatnonzero(values[probe.train].any(0))
        # Active ones only: ablating a silent latent changes nothing, and would be too easy a control.
        chosen = active[random_order(len(active), readings.seed + n)[:n]]
    else:
        # Latents are chosen by a probe of what is spurious, on texts where it is independent of the target.
        spurious = logistic(readings.rows[probe.train], removal.spurious[probe.train])
        chosen = strongest(np.abs(effects(readings, number, probe.train, removal.spurious, spurious)), n)
    rows = ablated(readings, number, probe.test, chosen)
    return removal_score(probe.plane.accuracy(rows, removal.target[probe.test]), removal.base, removal.oracle)


def _projected(readings: Readings, probe: BiasedProbe, removal: Removal) -> float:
    train, test = probe.train, probe.test
    plane = mean_difference(readings.rows[train], removal.spurious[train])
    unit = plane.weights / np.linalg.norm(plane.weights)
    centre = readings.rows[train].mean(0)
    rows = readings.rows[test]
    rows = rows - np.outer((rows - centre) @ unit, unit)
    return removal_score(probe.plane.accuracy(rows, removal.target[test]), removal.base, removal.oracle)


# Targeted probe perturbation


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


@dataclass(frozen=True, eq=False)
class Probes:
    """A probe for each class, and its accuracy on balanced texts."""

    tasks: Sequence[OneVsRest]
    planes: Mapping[str, Plane]
    clean: Accuracies


def targeted_perturbation(readings: Readings, ns: Sequence[int] = NUMBERS_ABLATED) -> ConceptScores:
    """TPP per number of ablated latents, mean over classes; 0 is no effect, or the same on every probe.

    The concept needs at least three labels. Beside the latents of the class: as many of the next class's, whose
    effect on this class's probe is not what was aimed at. Raises InputError for fewer labels.
    """
    if len(readings.concept.classes) < 3:
        raise InputError(f"{readings.concept.name}: perturbation needs at least 3 labels; it has 2. See sparse_probing")
    tasks = one_vs_rest(readings)
    planes = {task.label: logistic(readings.rows[task.train], task.inside[task.train]) for task in tasks}
    clean = {
        task.label: planes[task.label].accuracy(readings.rows[task.test], task.inside[task.test]) for task in tasks
    }
    probes = Probes(tasks, planes, clean)
    methods = (
        (0, "latents", "the latents with the largest effect on the probe of their class"),
        (1, "others", "as many of the latents of the next class"),
    )
    lines = [_line(readings, probes, n, shift, method, words) for n in ns for shift, method, words in methods]
    return ConceptScores(
        "targeted probe perturbation",
        readings.concept.name,
        len(readings.halves[0]),
        len(readings.halves[1]),
        tuple(lines),
        f"Probes are right in {np.mean(list(clean.values())):.3f} of the balanced texts. {UNRELIABLE}",
    )


def _line(readings: Readings, probes: Probes, n: int, shift: int, method: str, words: str) -> ScoreLine:
    each = [_scores(readings, number, probes, n, shift) for number in range(len(readings.coders))]
    parts = {task.label: float(np.mean([found[task.label] for found in each])) for task in probes.tasks}
    values = [float(np.mean(list(found.values()))) for found in each]
    return line_of_dictionaries(method, words, values, k=n, parts=parts)


def _scores(readings: Readings, number: int, probes: Probes, n: int, shift: int) -> dict[str, float]:
    """Per class, with the n strongest latents ablated of the class that stands `shift` further."""
    tasks, by = probes.tasks, {}
    for place, task in enumerate(tasks):
        source = tasks[(place + shift) % len(tasks)]
        effect = effects(readings, number, source.train, source.inside, probes.planes[source.label], rising=True)
        by[task.label] = _accuracies(readings, number, probes, strongest(effect, n))
    return perturbation_score(probes.clean, by)


def _accuracies(readings: Readings, number: int, probes: Probes, chosen: Numbers) -> dict[str, float]:
    return {
        task.label: probes.planes[task.label].accuracy(
            ablated(readings, number, task.test, chosen), task.inside[task.test]
        )
        for task in probes.tasks
    }
