"""DECOMPOSE into latents: sparse dictionaries, one training loop for every kind, and their files."""

from __future__ import annotations

from vesalius.coder import Coder
from vesalius.dictionaries.coder import SparseCoder
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
from vesalius.dictionaries.files import load, save
from vesalius.dictionaries.history import History
from vesalius.dictionaries.kinds import ACTIVATIONS
from vesalius.dictionaries.latent import Latent
from vesalius.dictionaries.stored_layer import StoredLayer
from vesalius.dictionaries.training.fitter import Fitter
from vesalius.dictionaries.training.loop import estimate, train
from vesalius.dictionaries.training.several import train_all
from vesalius.dictionaries.unexplained import Unexplained
from vesalius.dictionaries.untrained import untrained

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
    "Scaling",
    "Shared",
    "SparseCoder",
    "StoredLayer",
    "Superposition",
    "TrainConfig",
    "Unexplained",
    "Verified",
    "dimensionality",
    "estimate",
    "geometry",
    "latent_scaling",
    "load",
    "quality",
    "relative_norms",
    "save",
    "shared",
    "superposition",
    "train",
    "train_all",
    "untrained",
    "verify",
]
