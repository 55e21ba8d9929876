"""Networks and activations whose mechanism is known: what a method says about them can be checked against the truth."""

from __future__ import annotations

from vesalius.toys.carrier import Carrier, CarrierNetwork, carrier
from vesalius.toys.compiled import EDGES, PROGRAMS, compiled, compiled_checks, compiled_pairs
from vesalius.toys.mechanisms import MECHANISMS, Mechanism, mechanism
from vesalius.toys.planted import PLANTED, VOCAB, planted_induction, random_model
from vesalius.toys.sparse import SparseRows, recovered, sparse_rows, unit_rows
from vesalius.toys.superposition import ToyModels, toy_models
from vesalius.toys.tasks import CORRUPTIONS, planted_pairs
from vesalius.toys.text import PlantedText, PlantedUnit, text_network

__all__ = [
    "CORRUPTIONS",
    "EDGES",
    "MECHANISMS",
    "PLANTED",
    "PROGRAMS",
    "VOCAB",
    "Carrier",
    "CarrierNetwork",
    "Mechanism",
    "PlantedText",
    "PlantedUnit",
    "SparseRows",
    "ToyModels",
    "carrier",
    "compiled",
    "compiled_checks",
    "compiled_pairs",
    "mechanism",
    "planted_induction",
    "planted_pairs",
    "random_model",
    "recovered",
    "sparse_rows",
    "text_network",
    "toy_models",
    "unit_rows",
]
