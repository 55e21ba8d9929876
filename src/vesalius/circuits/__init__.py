"""Decompose a network into circuits: exact effects, and a circuit by a stated rule."""

from __future__ import annotations

from vesalius.circuits.ablation import ABLATIONS, Ablation, ablation
from vesalius.circuits.attribution import METHODS, edge_attribution
from vesalius.circuits.circuit import RULE, Circuit, edges_from_json, edges_to_json, find_circuit, share
from vesalius.circuits.edges import find_edges
from vesalius.circuits.effects import Condition, Effects, component_effects
from vesalius.circuits.graph import Graph
from vesalius.circuits.masked import with_cut, with_only
from vesalius.circuits.wiring import Wiring, wiring

__all__ = [
    "ABLATIONS",
    "METHODS",
    "RULE",
    "Ablation",
    "Circuit",
    "Condition",
    "Effects",
    "Graph",
    "Wiring",
    "ablation",
    "component_effects",
    "edge_attribution",
    "edges_from_json",
    "edges_to_json",
    "find_circuit",
    "find_edges",
    "share",
    "wiring",
    "with_cut",
    "with_only",
]
