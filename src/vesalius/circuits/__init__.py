"""Decompose a network into circuits: exact effects, and a circuit by a stated rule."""

from __future__ import annotations

from vesalius.circuits.apart import Nodes, nodes_of, with_nodes
from vesalius.circuits.attribution import edge_attribution
from vesalius.circuits.attribution_graph import AttributionGraph, Node
from vesalius.circuits.cells import optimal_ablation, token_roles, with_tokens
from vesalius.circuits.circuit import RULE, Circuit, edges_from_json, edges_to_json, find_circuit, share
from vesalius.circuits.cutting import ABLATIONS, Ablation, ablation
from vesalius.circuits.edges import find_edges
from vesalius.circuits.effects import Condition, Effects, component_effects
from vesalius.circuits.exact import edge_patching
from vesalius.circuits.graph import Graph
from vesalius.circuits.graph_files import graph_from_json, graph_json, load_graph, save_graph
from vesalius.circuits.greedy import acdc
from vesalius.circuits.hypotheses import (
    Counted,
    equivalence,
    independence,
    minimality,
    paraphrase_stability,
    prompt_clusters,
    random_circuits,
    stability,
    sufficiency,
)
from vesalius.circuits.latent_circuit import discover_latents, latent_edges
from vesalius.circuits.latents import latent_attribution, node_patching
from vesalius.circuits.masked import with_cut, with_only
from vesalius.circuits.pruning import prune_edges
from vesalius.circuits.quality import (
    Curve,
    areas,
    between,
    coablation,
    completeness,
    curve,
    edges_of,
    faithfulness,
    scrubbing,
)
from vesalius.circuits.replacement import Replacement, replaced
from vesalius.circuits.search import METHODS, discover, load_circuit, members_of, save_circuit
from vesalius.circuits.tracing import attribution_graph
from vesalius.circuits.verified import Check
from vesalius.circuits.wired import Wiring, wiring

__all__ = [
    "ABLATIONS",
    "METHODS",
    "RULE",
    "Ablation",
    "AttributionGraph",
    "Check",
    "Circuit",
    "Condition",
    "Counted",
    "Curve",
    "Effects",
    "Graph",
    "Node",
    "Nodes",
    "Replacement",
    "Wiring",
    "ablation",
    "acdc",
    "areas",
    "attribution_graph",
    "between",
    "coablation",
    "completeness",
    "component_effects",
    "curve",
    "discover",
    "discover_latents",
    "edge_attribution",
    "edge_patching",
    "edges_from_json",
    "edges_of",
    "edges_to_json",
    "equivalence",
    "faithfulness",
    "find_circuit",
    "find_edges",
    "graph_from_json",
    "graph_json",
    "independence",
    "latent_attribution",
    "latent_edges",
    "load_circuit",
    "load_graph",
    "members_of",
    "minimality",
    "node_patching",
    "nodes_of",
    "optimal_ablation",
    "paraphrase_stability",
    "prompt_clusters",
    "prune_edges",
    "random_circuits",
    "replaced",
    "save_circuit",
    "save_graph",
    "scrubbing",
    "share",
    "stability",
    "sufficiency",
    "token_roles",
    "wiring",
    "with_cut",
    "with_nodes",
    "with_only",
    "with_tokens",
]
