"""Decompose a network into circuits: exact effects, and a circuit by a stated rule."""

from __future__ import annotations

from vesalius.circuits.attribution import edge_attribution
from vesalius.circuits.circuit import RULE, Circuit, edges_from_json, edges_to_json, find_circuit, share
from vesalius.circuits.cutting import ABLATIONS, Ablation, ablation
from vesalius.circuits.edges import find_edges
from vesalius.circuits.effects import Condition, Effects, component_effects
from vesalius.circuits.exact import edge_patching
from vesalius.circuits.graph import Graph
from vesalius.circuits.greedy import acdc
from vesalius.circuits.masked import with_cut, with_only
from vesalius.circuits.pruning import prune_edges
from vesalius.circuits.search import METHODS, discover, load_circuit, members_of, save_circuit
from vesalius.circuits.verified import Check
from vesalius.circuits.wired import Wiring, wiring

__all__ = [
    "ABLATIONS",
    "METHODS",
    "RULE",
    "Ablation",
    "Check",
    "Circuit",
    "Condition",
    "Effects",
    "Graph",
    "Wiring",
    "ablation",
    "acdc",
    "component_effects",
    "discover",
    "edge_attribution",
    "edge_patching",
    "edges_from_json",
    "edges_to_json",
    "find_circuit",
    "find_edges",
    "load_circuit",
    "members_of",
    "prune_edges",
    "save_circuit",
    "share",
    "wiring",
    "with_cut",
    "with_only",
]
