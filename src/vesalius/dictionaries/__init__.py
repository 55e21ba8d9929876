"""DECOMPOSE into latents: sparse dictionaries, one training loop for every kind, and their files."""

from __future__ import annotations

from vesalius.dictionaries.coder import Coder
from vesalius.dictionaries.config import KINDS, TrainConfig
from vesalius.dictionaries.cross_layer import CrossLayerTranscoder
from vesalius.dictionaries.crosscoder import Scaling, latent_scaling, relative_norms
from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.evaluation import (
    SUPERPOSED,
    WORDS,
    Figure,
    Quality,
    Shared,
    Superposition,
    Verified,
    dimensionality,
    geometry,
    quality,
    shared,
    superposition,
    verify,
)
from vesalius.dictionaries.history import History
from vesalius.dictionaries.kinds import ACTIVATIONS
from vesalius.dictionaries.latent import Latent
from vesalius.dictionaries.loading import load
from vesalius.dictionaries.probing import (
    Readings,
    Score,
    Scores,
    absorption,
    concept_scores,
    ravel,
    read_concept,
    sparse_probing,
    spurious_removal,
    targeted_perturbation,
)
from vesalius.dictionaries.saving import save
from vesalius.dictionaries.stored_layer import StoredLayer
from vesalius.dictionaries.training.fitter import Fitter
from vesalius.dictionaries.training.loop import estimate, train
from vesalius.dictionaries.training.several import train_all

__all__ = [
    "ACTIVATIONS",
    "KINDS",
    "SUPERPOSED",
    "WORDS",
    "Coder",
    "CrossLayerTranscoder",
    "Dictionary",
    "Figure",
    "Fitter",
    "History",
    "Latent",
    "Quality",
    "Readings",
    "Scaling",
    "Score",
    "Scores",
    "Shared",
    "StoredLayer",
    "Superposition",
    "TrainConfig",
    "Verified",
    "absorption",
    "concept_scores",
    "dimensionality",
    "estimate",
    "geometry",
    "latent_scaling",
    "load",
    "quality",
    "ravel",
    "read_concept",
    "relative_norms",
    "save",
    "shared",
    "sparse_probing",
    "spurious_removal",
    "superposition",
    "targeted_perturbation",
    "train",
    "train_all",
    "verify",
]
