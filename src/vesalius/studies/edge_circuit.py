"""A circuit of edges as plain data: what was found on discovery, and what it does alone on fresh prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vesalius import __version__
from vesalius.circuits import Circuit, Graph, Wiring, edges_of, faithfulness
from vesalius.inputs import Pairs
from vesalius.metric import Metric, logit_diff
from vesalius.stats import Measurement
from vesalius.studies.answer import percent

SCHEMA = "vesalius/circuit/1"
LANES = {"head": "heads", "mlp": "MLPs", "embed": "embeddings"}


def summarise_edges(
    question: str,
    wired: Wiring,
    circuit: Circuit,
    fresh: Pairs,
    *,
    searched: int,
    command: str,
    timings: Mapping[str, Any],
    metric: Metric = logit_diff,
    members: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The summary as a dict: `circuit` (members and edges between them), `faithfulness` on fresh prompts, `check`.

    searched: how many prompts the circuit was found on. members: what its members do, see `summarise_members`.

    Effects are shares of the effect of cutting every edge on the discovery prompts, positive for what helps. Edges into
    queries, keys and values of a head are one here, the strongest of them; `circuits.save_circuit` keeps them apart.
    """
    model, total = wired.model, float(circuit.setting["total"])
    grid = faithfulness(wired, circuit, fresh, metric=metric) if circuit.edges else {}
    drawn = _drawn(circuit, wired.graph, total or 1.0)
    return {
        "schema": SCHEMA,
        "question": question,
        "model": {"name": model.name, "hash": model.content_hash, "note": model.note},
        "answer": [*_answer(circuit, wired, grid), *(members["answer"] if members else [])],
        "members": members,
        "circuit": {
            "rule": circuit.rule,
            "kept": circuit.kept,
            "total_effect": total,
            "setting": dict(circuit.setting),
            **drawn,
        },
        "faithfulness": [_row(*key, measured) for key, measured in grid.items()],
        "check": None if circuit.check is None else circuit.check.to_json(),
        "prompts": {"discovery": searched, "validation": len(fresh)},
        "timings": dict(timings),
        "command": command,
        "version": __version__,
    }


def _drawn(circuit: Circuit, graph: Graph, total: float) -> dict[str, Any]:
    """Members and edges between them, the strongest of those that join the same two."""
    strongest: dict[tuple[str, str], float] = {}
    names = [str(part) for part in circuit.members]
    for number in edges_of(graph, circuit).nonzero()[:, 0].tolist():
        # A cut that lowers the metric takes a help away.
        source, weight = str(graph.writers[int(graph.writer_of[number])]), -circuit.edges[graph.edges[number]] / total
        nodes = graph.node_of(int(graph.reader_of[number]))
        targets = [str(graph.writers[node]) for node in nodes] if nodes else ["logits"]
        for target in targets:
            if (target in names or target == "logits") and abs(weight) >= abs(strongest.get((source, target), 0.0)):
                strongest[source, target] = weight
    members = [_member(part, strongest) for part in circuit.members]
    edges = [{"source": a, "target": b, "weight": weight} for (a, b), weight in strongest.items()]
    return {"members": members, "edges": edges}


def _member(part: Any, edges: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    name, site = str(part), part.writes[0]
    kind = {"z": "head", "mlp_out": "mlp"}.get(site.kind, "embed")
    own = [weight for (source, _), weight in edges.items() if source == name]
    effect = max(own, key=abs, default=0.0)
    return {
        "component": name,
        "kind": kind,
        "layer": site.layer,
        "head": site.index if kind == "head" else None,
        "role": LANES[kind],
        "effect": {"estimate": effect},
        "suppresses": effect < 0,
        "uncertain": False,
        "edges_in": sum(target == name for _, target in edges),
        "edges_out": len(own),
    }


def _row(level: str, kind: str, measured: Measurement) -> dict[str, Any]:
    told = measured.diagnostics
    return {"level": level, "ablation": kind, "estimate": measured.estimate, "low": measured.low, "high": measured.high,
            "n": measured.n, "n_groups": measured.n_groups, "lowest": told["lowest"],
            "highest": told["highest"]}  # fmt: skip


def _answer(circuit: Circuit, wired: Wiring, grid: Mapping[tuple[str, str], Measurement]) -> list[str]:
    size = f"{len(circuit.edges):,} of {len(wired.graph):,} edges, between {len(circuit):,} parts"
    if not circuit.edges:
        return ["Cutting all edges changes nothing, or no edge alone changes enough: the circuit is empty."]
    words = {"resample": "other prompts", "mean": "means", "zero": "zeros"}
    shares = [
        f"{percent(one)} when the rest carries {words[kind]}" for (level, kind), one in grid.items() if level == "edge"
    ]
    found = [f"{size}, keep on fresh prompts {', '.join(shares)}."]
    return [*found, *([f"{circuit.check.describe()}."] if circuit.check else [])]
