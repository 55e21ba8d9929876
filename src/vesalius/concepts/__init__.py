"""Concepts: from labelled examples to a direction, and whether the model uses it.

Concept        examples with labels, in splits that share nothing; from files, frames, minimal pairs, tagged words
fit_probe(s)   what can be read off at a site, with the controls beside it
fit_contrast   directions from contrast pairs, without labels (CCS and its simpler rivals)
fit_eraser     taking the concept out of activations (LEACE), as an intervention; `leaks` says what is left
*_effect       what erasing, exchanging or pushing it does to the next token, beside random directions
train_das      the subspace that carries a variable of a causal model (distributed alignment search)
influence      derivatives along a direction (TCAV)

The metrics of SAEBench (Karvonen et al. 2025, arXiv:2503.09532) and RAVEL ask whether latents of a dictionary stand for
a concept, which is given as texts with labels (`vs.data.Labelled`), or as entities with attributes.
"""

from __future__ import annotations

from vesalius.concepts.ablation import spurious_removal, targeted_perturbation
from vesalius.concepts.absorption import absorption
from vesalius.concepts.concept import Concept
from vesalius.concepts.das import (
    Counterfactuals,
    DasConfig,
    Exchange,
    IllusionCheck,
    agreement,
    baselines,
    best_units,
    iia,
    illusion_of,
    principal_components,
    train_das,
)
from vesalius.concepts.effect import (
    Behaviour,
    Effect,
    Specificity,
    erasure_effect,
    interchange_effect,
    partners,
    push_effect,
    specificity,
)
from vesalius.concepts.entities import Entities, load_ravel
from vesalius.concepts.eraser import ConceptEraser, Leak, fit_eraser, leaks, load_eraser
from vesalius.concepts.erasure import Eraser, GaussianEraser, LeaceFitter, OracleEraser, fit_rows, random_eraser
from vesalius.concepts.influence import Influence, influence
from vesalius.concepts.loading import concept_from_frame, load_concept, minimal_pairs, tagged_words
from vesalius.concepts.probe import Control, Probe, ProbeReport, load_probe
from vesalius.concepts.probing import Probes, fit_probe, fit_probes, probes_of, transfer
from vesalius.concepts.ravel import ravel
from vesalius.concepts.ravel_subspaces import ravel_subspaces
from vesalius.concepts.reading import Rows, read_sites, tokens_of_concept
from vesalius.concepts.readings import Readings, read_concept
from vesalius.concepts.scores import ConceptScores, ScoreLine
from vesalius.concepts.sparse import sparse_probing
from vesalius.concepts.suite import concept_scores
from vesalius.concepts.unsupervised import ContrastProbe, DistractorTest, distractor_test, fit_contrast

__all__ = [
    "Behaviour",
    "Concept",
    "ConceptEraser",
    "ConceptScores",
    "ContrastProbe",
    "Control",
    "Counterfactuals",
    "DasConfig",
    "DistractorTest",
    "Effect",
    "Entities",
    "Eraser",
    "Exchange",
    "GaussianEraser",
    "IllusionCheck",
    "Influence",
    "LeaceFitter",
    "Leak",
    "OracleEraser",
    "Probe",
    "ProbeReport",
    "Probes",
    "Readings",
    "Rows",
    "ScoreLine",
    "Specificity",
    "absorption",
    "agreement",
    "baselines",
    "best_units",
    "concept_from_frame",
    "concept_scores",
    "distractor_test",
    "erasure_effect",
    "fit_contrast",
    "fit_eraser",
    "fit_probe",
    "fit_probes",
    "fit_rows",
    "iia",
    "illusion_of",
    "influence",
    "interchange_effect",
    "leaks",
    "load_concept",
    "load_eraser",
    "load_probe",
    "load_ravel",
    "minimal_pairs",
    "partners",
    "principal_components",
    "probes_of",
    "push_effect",
    "random_eraser",
    "ravel",
    "ravel_subspaces",
    "read_concept",
    "read_sites",
    "sparse_probing",
    "specificity",
    "spurious_removal",
    "tagged_words",
    "targeted_perturbation",
    "tokens_of_concept",
    "train_das",
    "transfer",
]
