"""Concepts: do latents stand for them? Probes, and the metrics of SAEBench (Karvonen et al. 2025, arXiv:2503.09532).

A concept is given as texts with labels (`vs.data.Labelled`); RAVEL's are entities with attributes.
"""

from __future__ import annotations

from vesalius.concepts.ablation import spurious_removal, targeted_perturbation
from vesalius.concepts.absorption import absorption
from vesalius.concepts.entities import Entities, load_ravel
from vesalius.concepts.ravel import ravel
from vesalius.concepts.readings import Readings, read_concept
from vesalius.concepts.scores import ConceptScores, ScoreLine
from vesalius.concepts.sparse import sparse_probing
from vesalius.concepts.suite import concept_scores

__all__ = [
    "ConceptScores",
    "Entities",
    "Readings",
    "ScoreLine",
    "absorption",
    "concept_scores",
    "load_ravel",
    "ravel",
    "read_concept",
    "sparse_probing",
    "spurious_removal",
    "targeted_perturbation",
]
