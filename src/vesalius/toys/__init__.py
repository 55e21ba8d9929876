"""Networks and activations whose mechanism is known: what a method says about them can be checked against the truth."""

from __future__ import annotations

from vesalius.toys.carrier import Carrier, CarrierNetwork, carrier
from vesalius.toys.compiled import EDGES, PROGRAMS, compiled, compiled_checks, compiled_pairs
from vesalius.toys.mechanisms import MECHANISMS, Mechanism, mechanism
from vesalius.toys.modular import KEYS, ModularAddition, every_pair, explained_by, frequencies
from vesalius.toys.planted import PLANTED, VOCAB, planted_induction, random_model
from vesalius.toys.sparse import SparseRows, recovered, sparse_rows, unit_rows
from vesalius.toys.superposition import ToyModels, toy_models
from vesalius.toys.tasks import CORRUPTIONS, planted_pairs
from vesalius.toys.text import PlantedText, PlantedUnit, text_network
from vesalius.toys.trained import TRAINED, induction_scores, is_balanced, trained, trained_pairs

__all__ = [
    "CORRUPTIONS",
    "EDGES",
    "KEYS",
    "MECHANISMS",
    "PLANTED",
    "PROGRAMS",
    "TRAINED",
    "VOCAB",
    "Carrier",
    "CarrierNetwork",
    "Mechanism",
    "ModularAddition",
    "PlantedText",
    "PlantedUnit",
    "SparseRows",
    "ToyModels",
    "carrier",
    "compiled",
    "compiled_checks",
    "compiled_pairs",
    "every_pair",
    "explained_by",
    "frequencies",
    "induction_scores",
    "is_balanced",
    "mechanism",
    "planted_induction",
    "planted_pairs",
    "random_model",
    "recovered",
    "sparse_rows",
    "text_network",
    "toy_models",
    "trained",
    "trained_pairs",
    "unit_rows",
]
