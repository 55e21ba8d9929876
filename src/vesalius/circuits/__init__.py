"""Decompose a network into circuits: exact effects, and a circuit by a stated rule."""

from __future__ import annotations

from vesalius.circuits.circuit import RULE, Circuit, edges_from_json, edges_to_json, find_circuit, share
from vesalius.circuits.edges import find_edges
from vesalius.circuits.effects import Condition, Effects, component_effects

__all__ = [
    "RULE",
    "Circuit",
    "Condition",
    "Effects",
    "component_effects",
    "edges_from_json",
    "edges_to_json",
    "find_circuit",
    "find_edges",
    "share",
]
