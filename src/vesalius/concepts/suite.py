"""Every metric that applies to a concept, in one go."""

from __future__ import annotations

from collections.abc import Sequence

from vesalius.coder import Coder
from vesalius.concepts.ablation import spurious_removal, targeted_perturbation
from vesalius.concepts.absorption import absorption
from vesalius.concepts.readings import read_concept
from vesalius.concepts.scores import ConceptScores
from vesalius.concepts.sparse import sparse_probing
from vesalius.data import Labelled
from vesalius.jobs import Sink
from vesalius.jobs.progress import shown
from vesalius.model import Model


def concept_scores(
    coders: Sequence[Coder], concept: Labelled, model: Model, *, seed: int = 0, sink: Sink | None = None
) -> tuple[ConceptScores, ...]:
    """Sparse probing of the mean over tokens and absorption at the last token; with a mark of two values also
    spurious-correlation removal, with three labels or more also targeted probe perturbation.

    Raises as `read_concept` and the metrics.
    """
    with shown(sink) as progress:
        whole = read_concept(coders, concept, model, at="mean", seed=seed, sink=progress)
        last = read_concept(coders, concept, model, at="last", seed=seed, sink=progress)
    found = [sparse_probing(whole), absorption(last)]
    if len(set(concept.marks)) == 2 and len(concept.classes) == 2:
        found.append(spurious_removal(whole))
    if len(concept.classes) > 2:
        found.append(targeted_perturbation(whole))
    return tuple(found)
