"""Do latents stand for concepts? Metrics of SAEBench (Karvonen et al. 2025, arXiv:2503.09532) on your own concepts."""

from __future__ import annotations

from vesalius.dictionaries.probing.absorption import absorption
from vesalius.dictionaries.probing.perturbation import targeted_perturbation
from vesalius.dictionaries.probing.ravel import ravel
from vesalius.dictionaries.probing.readings import Readings, read_concept
from vesalius.dictionaries.probing.removal import spurious_removal
from vesalius.dictionaries.probing.scores import Score, Scores
from vesalius.dictionaries.probing.sparse import sparse_probing
from vesalius.dictionaries.probing.suite import concept_scores

__all__ = [
    "Readings", "Score", "Scores", "absorption", "concept_scores", "ravel", "read_concept", "sparse_probing",
    "spurious_removal", "targeted_perturbation",
]  # fmt: skip
