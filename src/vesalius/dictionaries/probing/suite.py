"""Every metric that applies to a concept, in one go."""

from __future__ import annotations

from collections.abc import Sequence

from vesalius.data import Labelled
from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.probing.absorption import absorption
from vesalius.dictionaries.probing.perturbation import targeted_perturbation
from vesalius.dictionaries.probing.readings import read_concept
from vesalius.dictionaries.probing.removal import spurious_removal
from vesalius.dictionaries.probing.scores import Scores
from vesalius.dictionaries.probing.sparse import sparse_probing
from vesalius.jobs import Sink
from vesalius.jobs.progress import shown
from vesalius.model import Model


def concept_scores(
    coders: Sequence[Dictionary], concept: Labelled, model: Model, *, seed: int = 0, sink: Sink | None = None
) -> tuple[Scores, ...]:
    """Sparse probing of the mean over tokens and absorption at the last token; with a mark of two values also
    spurious-correlation removal, with three labels or more also targeted probe perturbation.

    Raises as `read_concept` and the metrics.
    """
    with shown(sink) as told:
        whole = read_concept(coders, concept, model, at="mean", seed=seed, sink=told)
        last = read_concept(coders, concept, model, at="last", seed=seed, sink=told)
    found = [sparse_probing(whole), absorption(last)]
    if len(set(concept.marks)) == 2 and len(concept.classes) == 2:
        found.append(spurious_removal(whole))
    if len(concept.classes) > 2:
        found.append(targeted_perturbation(whole))
    return tuple(found)
