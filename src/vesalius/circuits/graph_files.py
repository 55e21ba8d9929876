"""Attribution graphs as JSON that the public viewers read.

The format is that of circuit-tracer's files and of Neuronpedia's schema of attribution graphs: `metadata`, `qParams`
(the saved view, which holds supernodes), `nodes` and `links`. Two things are ours: nodes also hold `input_sum` and
`constant`, which the scores of a pruned graph need; and errors are named `err_<layer>_<position>`, because the names
that circuit-tracer gives them are those of latents of the first layer as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vesalius import __version__
from vesalius.circuits.attribution_graph import EDGES, NODES, AttributionGraph, Node
from vesalius.errors import FileFormatError
from vesalius.jobs import write_atomic
from vesalius.jobs.untrusted import read_json, understood

TYPES = {
    "latent": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "token": "embedding",
    "logit": "logit",
}
"""What viewers call the kinds of nodes; latents of every transcoder are called cross-layer ones there."""


def graph_json(
    graph: AttributionGraph,
    slug: str = "graph",
    scan: str = "",
    *,
    nodes: float = NODES,
    edges: float = EDGES,
    labels: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A graph, pruned, as plain data for viewers.

    slug: a name for the graph. scan: the name under which the viewer knows the model; default the model's own. nodes,
    edges: as for `AttributionGraph.pruned`; 1 keeps everything. labels: node's name -> what is shown beside it.
    """
    kept = graph.pruned(nodes, edges) if nodes < 1 or edges < 1 else graph
    reached = dict(zip((node.name for node in graph.nodes), _cumulative(graph.influence), strict=True))
    names, shown = [_id(node, graph.n_layers) for node in kept.nodes], labels or {}
    best = next((n for n, node in enumerate(kept.nodes) if node.kind == "logit"), -1)
    rows = [
        {
            **_named(node, name),
            "clerp": shown.get(node.name, _said(node)),
            "influence": None if node.kind == "logit" else reached[node.name],
            "activation": node.value if node.kind in ("latent", "logit") else None,
            "token_prob": node.probability,
            "is_target_logit": number == best,
            "run_idx": 0,
            "reverse_ctx_idx": 0,
            "input_sum": float(kept.inputs[number]),
            "constant": float(kept.constants[number]),
        }
        for number, (node, name) in enumerate(zip(kept.nodes, names, strict=True))
    ]
    targets, sources = kept.weights.nonzero(as_tuple=True)
    pairs = zip(targets.tolist(), sources.tolist(), kept.weights[targets, sources].tolist(), strict=True)
    return {
        "metadata": {
            "slug": slug,
            "scan": scan or graph.model,
            "transcoder_list": list(graph.transcoders),
            "prompt_tokens": list(graph.texts),
            "prompt": graph.prompt,
            "node_threshold": nodes,
            "schema_version": 1,
            "info": {"generator": {"name": "vesalius", "version": __version__}},
            "pruning_settings": {"node_threshold": nodes, "edge_threshold": edges},
            "n_layers": graph.n_layers,
        },
        "qParams": {
            "pinnedIds": [],
            "supernodes": [[name, *(names[n] for n in of)] for name, of in kept.groups.items()],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": rows,
        "links": [{"source": names[s], "target": names[t], "weight": weight} for t, s, weight in pairs],
    }


def save_graph(graph: AttributionGraph, path: str | Path, **how: Any) -> None:
    """Write `graph_json` of a graph to a file; how: its arguments."""
    write_atomic(path, json.dumps(graph_json(graph, **how), indent=1, allow_nan=False))


def load_graph(path: str | Path) -> AttributionGraph:
    """The graph in a file of this format, also of circuit-tracer's and Neuronpedia's. FileFormatError for another."""
    with understood(f"{path} holds no attribution graph"):
        return graph_from_json(read_json(Path(path)))


def graph_from_json(data: Mapping[str, Any]) -> AttributionGraph:
    """The graph that `graph_json` gave. Raises FileFormatError for links between unknown nodes, or names used twice."""
    about, rows = data["metadata"], data["nodes"]
    texts = tuple(map(str, about["prompt_tokens"]))
    names = {str(row["node_id"]): number for number, row in enumerate(rows)}
    if len(names) < len(rows):
        raise FileFormatError("two nodes have one node_id")
    kinds = {shown: kind for kind, shown in TYPES.items()}
    nodes = [_node(row, kinds, texts) for row in rows]
    order = sorted(range(len(nodes)), key=lambda n: list(TYPES).index(nodes[n].kind))
    place = {old: new for new, old in enumerate(order)}
    weights = torch.zeros(len(nodes), len(nodes))
    for link in data["links"]:
        ends = [names.get(str(link[end])) for end in ("target", "source")]
        if None in ends or not math.isfinite(float(link["weight"])):
            raise FileFormatError(f"a link from {link['source']} to {link['target']} does not join two nodes")
        weights[place[ends[0]], place[ends[1]]] = float(link["weight"])  # type: ignore[index]
    layers = [node.layer for node in nodes if node.layer is not None]
    groups = {
        str(of[0]): tuple(place[names[str(one)]] for one in of[1:]) for of in data["qParams"].get("supernodes", [])
    }
    return AttributionGraph(
        nodes=tuple(nodes[n] for n in order),
        weights=weights,
        constants=_column(rows, order, "constant", weights.new_zeros(len(nodes))),
        inputs=_column(rows, order, "input_sum", weights.abs().sum(1)),
        prompt=str(about["prompt"]),
        texts=texts,
        n_layers=int(about.get("n_layers", max(layers, default=-1) + 1)),
        model=str(about["scan"]),
        transcoders=tuple(map(str, about.get("transcoder_list", []))),
        groups=groups,
    )


def _column(rows: Sequence[Mapping[str, Any]], order: Sequence[int], name: str, otherwise: Tensor) -> Tensor:
    if not all(name in row for row in rows):
        return otherwise
    return torch.tensor([float(rows[n][name]) for n in order])


def _node(row: Mapping[str, Any], kinds: Mapping[str, str], texts: Sequence[str]) -> Node:
    shown, at = str(row["feature_type"]), int(row["ctx_idx"])
    if shown not in kinds or not 0 <= at < len(texts):
        raise FileFormatError(f"node {row['node_id']} is a {shown} at position {at} of {len(texts)}")
    kind, parts = kinds[shown], str(row["node_id"]).split("_")
    layer = int(row["layer"]) if kind in ("latent", "error") else None
    index = None if kind == "error" else int(parts[1])
    text = texts[at] if kind == "token" else ""
    if kind == "logit":
        text = str(row["clerp"]).partition('"')[2].rpartition('"')[0]
    value = row.get("activation")
    return Node(kind, at, layer, index, float(value or 0.0), float(row.get("token_prob") or 0.0), text)


def _id(node: Node, n_layers: int) -> str:
    """Latents: layer, number and position, as viewers take them apart."""
    layer = {"token": "E", "logit": str(n_layers + 1)}.get(node.kind, str(node.layer))
    return f"err_{layer}_{node.position}" if node.kind == "error" else f"{layer}_{node.index}_{node.position}"


def _named(node: Node, name: str) -> dict[str, Any]:
    layer = name.split("_")[1 if node.kind == "error" else 0]
    feature = {"token": node.position, "error": -1}.get(node.kind, node.index)
    same = f"{layer}_{node.position if node.kind == 'error' else node.index}-0"
    if node.kind == "latent":
        assert node.layer is not None and node.index is not None
        feature = _paired(node.layer, node.index)
    if node.kind in ("token", "logit"):
        same = f"{'E' if node.kind == 'token' else 'L'}_{node.index}-{node.position}"
    return {
        "node_id": name,
        "feature": feature,
        "layer": layer,
        "ctx_idx": node.position,
        "feature_type": TYPES[node.kind],
        "jsNodeId": same,
    }


def _paired(layer: int, index: int) -> int:
    """Cantor's number of a pair, by which viewers look latents up."""
    return (layer + index) * (layer + index + 1) // 2 + index


def _said(node: Node) -> str:
    return f'Output "{node.text}" (p={node.probability:.3f})' if node.kind == "logit" else ""


def _cumulative(influence: Tensor) -> list[float]:
    """Of each node, the share of all influence that it has together with those that have more."""
    order = influence.argsort(descending=True, stable=True)
    found = torch.zeros_like(influence)
    found[order] = influence[order].cumsum(0) / influence.sum().clamp_min(1e-10)
    return [float(one) for one in found]
