"""Decompose a network into circuits: exact effects, a circuit by a stated rule, how faithful it is."""

from __future__ import annotations

from vesalius.circuits.circuit import RULE, Circuit, Edge, find_circuit
from vesalius.circuits.edges import find_edges
from vesalius.circuits.effects import Condition, Effects, clusters, decompose
from vesalius.circuits.faithfulness import ABLATIONS, Share, kept, random_sets, removed, share

__all__ = [
    "ABLATIONS",
    "RULE",
    "Circuit",
    "Condition",
    "Edge",
    "Effects",
    "Share",
    "clusters",
    "decompose",
    "find_circuit",
    "find_edges",
    "kept",
    "random_sets",
    "removed",
    "share",
]
