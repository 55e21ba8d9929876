"""Two more ways to ask what a circuit does alone: with the best constants elsewhere, and at its own tokens only.

**Optimal ablation** (Li and Janson 2024): a cut edge carries the constant, one for each writer, with which the circuit
comes closest to the model. It is fitted on other prompts than those that the circuit is measured on.

**Token-specific circuits** (Miller et al. 2024): an edge is kept only where its reader reads at certain named places of
the prompt ("end", "answer", ...) and cut everywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vesalius.circuits.attribution import edge_attribution
from vesalius.circuits.circuit import Circuit
from vesalius.circuits.cutting import Ablation, ablation
from vesalius.circuits.graph import Graph
from vesalius.circuits.masked import masked, masked_stream
from vesalius.circuits.wired import Wiring
from vesalius.data import named_positions
from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Pairs
from vesalius.jobs import Event, Sink, silent
from vesalius.metric import Metric, logit_diff
from vesalius.parts import Edge

REST = "rest"
"""All positions without a name."""
LEAST = 0.1
STEPS, RATE = 60, 0.05

Roles = Mapping[Edge, Sequence[str]]


def optimal_ablation(
    wired: Wiring,
    mask: Bool[Tensor, " edge"],
    pairs: Pairs,
    *,
    metric: Metric = logit_diff,
    steps: int = STEPS,
    rate: float = RATE,
    sink: Sink = silent,
) -> Ablation:
    """An ablation in which cut edges carry constants, fitted so that the circuit of a mask predicts as the model does.

    Begins at the means over the other prompts and moves each writer's constant, the same at all positions, down the
    KL divergence from the model's next-token distribution to the circuit's. steps: a forward and a backward pass each;
    rate: of Adam, in units of the writers' root mean square. The constants that did best are taken.

    Evaluate it on other prompts: `replace(found, pairs=fresh)`. Raises InputError for no steps.
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1; got {steps}")
    cut = ablation(wired, pairs, metric, "mean")
    assert cut.means is not None
    scale = cut.means.square().mean((1, 3), keepdim=True).sqrt().clamp_min(1e-6)
    moved = torch.zeros_like(cut.means[:, :1]).requires_grad_()
    optimiser = torch.optim.Adam([moved], lr=rate)
    cuts = (~mask).to(cut.means)[None]
    best, least = cut.means, float("inf")
    sink(Event("start", "optimal ablation", 0, steps))
    for step in range(steps):
        with torch.enable_grad():
            means = cut.means + scale * moved
            loss = _divergence(cut, replace(cut, kind="optimal", means=means), cuts)
        now = float(loss.detach())
        if now < least:
            best, least = means.detach(), now
        if not loss.requires_grad:
            break  # nothing is cut
        optimiser.zero_grad()
        torch.autograd.backward(loss, inputs=[moved])
        optimiser.step()
        sink(Event("advance", "optimal ablation", step + 1, steps, f"KL divergence {now:.3f}"))
    sink(Event("end", "optimal ablation", steps, steps))
    return replace(cut, kind="optimal", means=best)


def _divergence(cut: Ablation, moved: Ablation, cuts: Tensor) -> Tensor:
    """Mean KL divergence from the model to the circuit, where the metric reads."""
    with torch.no_grad():
        model = cut.base.logits.log_softmax(-1)
    circuit = moved.logits(masked_stream(moved, cuts, grad=True)).log_softmax(-1)
    return (model.exp() * (model - circuit)).sum(-1).mean()


def token_roles(
    wired: Wiring,
    circuit: Circuit,
    pairs: Pairs,
    *,
    kind: str = "resample",
    metric: Metric = logit_diff,
    least: float = LEAST,
) -> dict[Edge, tuple[str, ...]]:
    """At which named places of the prompts each edge of a circuit acts, by estimates from gradients.

    pairs: of the search. Named places are those of the pairs, and those that any pair has (`data.named_positions`);
    "rest" is everything else. An edge acts where its mean effect is at least `least` of the sum of all places' sizes.
    """
    graph = wired.graph
    numbers = torch.tensor([graph.number(edge) for edge in circuit.edges], dtype=torch.long)
    scores = edge_attribution(wired, pairs, kind=kind, each="position", metric=metric)
    effects = scores.effects[numbers]
    places = _places(pairs)
    sizes = torch.stack([(effects * where.T[None]).sum(1).mean(1).abs() for where in places.values()], 1)
    acts = sizes >= least * sizes.sum(1, keepdim=True)
    names = list(places)
    return {
        edge: tuple(name for name, here in zip(names, row, strict=True) if here)
        for edge, row in zip(circuit.edges, acts.tolist(), strict=True)
    }


def _places(pairs: Pairs) -> dict[str, Bool[Tensor, "example pos"]]:
    """Where each named place is; places at one position count once, by the first name."""
    named = {name: at for name, at in pairs.named_positions.items() if at.ndim == 1}
    position = torch.arange(pairs.clean.shape[1])[None]
    free, found = pairs.real.clone(), dict[str, Tensor]()
    for name, at in {**named_positions(pairs), **named}.items():
        found[name] = (position == at[:, None]) & free
        free &= ~found[name]
    return {**{name: where for name, where in found.items() if bool(where.any())}, REST: free}


def with_tokens(cut: Ablation, roles: Roles) -> Float[Tensor, " example"]:
    """The metric with the edges kept at their own places only, everything else cut.

    Raises UnknownNameError for a place that these prompts do not name.
    """
    places = _places(cut.pairs)
    unknown = [name for names in roles.values() for name in names if name not in places]
    if unknown:
        raise UnknownNameError("place", unknown[0], places, "Places are those of these prompts.")
    found = [masked(part, _cuts(cut.wired.graph, roles, places, rows), grad=False)[0] for rows, part in _few(cut)]
    return torch.cat([one.detach().cpu() for one in found])


def _few(cut: Ablation) -> Iterator[tuple[list[int], Ablation]]:
    """A mask of every edge, position and example is large."""
    return cut.batches(64)


def _cuts(
    graph: Graph, roles: Roles, places: Mapping[str, Tensor], rows: Sequence[int]
) -> Float[Tensor, "1 edge pos example"]:
    width = next(iter(places.values())).shape[1]
    cuts = torch.ones(1, len(graph), width, len(rows))
    for edge, names in roles.items():
        for name in names:
            cuts[0, graph.number(edge)] -= places[name][rows].T.float()
    return cuts
