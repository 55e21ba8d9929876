"""What cutting each edge would do, estimated from gradients.

An edge's effect is about the gradient of the metric at the reader's input times what cutting the edge changes there
(attribution patching: Nanda 2023; of edges: Syed et al. 2023, section 3). One forward and one backward pass give all
edges of an example, and nothing is summed over examples: the products of [writer, d_model] and [reader, d_model] are
taken layer by layer and position by position.

    eap                 the gradient at the run itself
    eap_ig_inputs       averaged while the embeddings go from the run's to the cut ones (Hanna et al. 2024)
    eap_ig_activations  averaged while what one layer's attention or MLP writes goes there, one after the other
    mask_ig             averaged while all edges are cut more and more: the integrated gradient of the edges' mask
    relp                with rules of relevance instead of gradients (see `relevance`)
    atp_star            with what saturates done exactly, and cancellation undone (see `relevance`)

All are estimates. `Scores.against` compares them with `edge_patching`, and `discover` does so in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from vesalius.circuits.cutting import TOKENS_PER_BATCH, Ablation, ablation
from vesalius.circuits.gradients import Gradients, differentiated, products
from vesalius.circuits.graph import Graph
from vesalius.circuits.masked import masked_stream
from vesalius.circuits.relevance import atp_star, relp
from vesalius.circuits.wired import Wiring
from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Pairs
from vesalius.intervention import Patch
from vesalius.jobs import Event, Sink
from vesalius.jobs.progress import shown
from vesalius.metric import Metric, logit_diff
from vesalius.model import Model
from vesalius.patching.examples import Examples
from vesalius.patching.plan import Cost
from vesalius.patching.scores import Scores

STEPS = 5
EACH = ("position",)
# A backward pass through frozen weights costs about a forward.
_PASS = 2.0

Estimate = Callable[[Ablation, int, bool], Tensor]
"""(ablation, steps, positions) -> estimated effects [edge, *pos, example]"""


def _eap(cut: Ablation, _steps: int, positions: bool) -> Tensor:
    run = differentiated(cut, cut.tokens)
    # So that the run without edits is not made again.
    vars(cut)["base"] = run.seen
    return products(cut.wired.graph, cut.change, run.gradients(), positions)


def _inputs(cut: Ablation, steps: int, positions: bool) -> Tensor:
    change, total = cut.change, None
    outside = range(cut.wired.graph.outside)
    for step in range(steps):
        total = _moved(cut, change, outside, (step + 0.5) / steps).plus(total)
    assert total is not None
    return products(cut.wired.graph, change, total.times(1 / steps), positions)


def _moved(cut: Ablation, change: Tensor, writers: range, share: float) -> Gradients:
    """Gradients with these writers on the way to what their cut edges carry."""
    graph, some = cut.wired.graph, slice(writers.start, writers.stop)
    moved = _base_writes(cut, writers) + share * change[:, :, some]
    edits = []
    for number in writers:
        site = graph.writers[number].site
        if site.kind != "z":
            edits.append(Patch(site, source=moved[:, :, number - writers.start]))
    heads = [number for number in writers if graph.writers[number].site.kind == "z"]
    if heads:
        layer = graph.writers[heads[0]].site.layer
        assert layer is not None
        bias = cut.wired.outputs[layer][1]
        added = moved.sum(2)
        edits.append(Patch(f"layers.{layer}.attn_out", source=added if bias is None else added + bias))
    return differentiated(cut, cut.tokens, edits).gradients()


def _base_writes(cut: Ablation, writers: range) -> Tensor:
    """What some writers add in the run without edits; embeddings need no heads to be multiplied out."""
    if writers.stop > cut.wired.graph.outside:
        return cut.base.writes[:, :, writers.start : writers.stop]
    return torch.stack([cut.base.sites[cut.wired.graph.writers[number].site] for number in writers], 2)


def _activations(cut: Ablation, steps: int, positions: bool) -> Tensor:
    graph, change = cut.wired.graph, cut.change
    found = None
    for writers in graph.groups:
        total = None
        for step in range(steps):
            total = _moved(cut, change, writers, (step + 0.5) / steps).plus(total)
        assert total is not None
        own = torch.zeros_like(change)
        own[:, :, writers.start : writers.stop] = change[:, :, writers.start : writers.stop]
        part = products(graph, own, total.times(1 / steps), positions)
        found = part if found is None else found + part
    assert found is not None
    return found


def _mask(cut: Ablation, steps: int, positions: bool) -> Tensor:
    edges, shape = len(cut.wired.graph), (cut.pairs.clean.shape[1], len(cut.pairs))
    total = torch.zeros(())
    for step in range(steps):
        share = (step + 0.5) / steps
        # One copy of the mask for each example and position, so that each has its own gradient.
        cuts = torch.full((1, edges, *shape), share, device=cut.wired.model.device, requires_grad=True)
        with torch.enable_grad():
            value = cut.score(cut.logits(masked_stream(cut, cuts, grad=True))).sum()
        total = total.to(cuts) + torch.autograd.grad(value, cuts)[0][0] / steps
    return total if positions else total.sum(1)


METHODS: Mapping[str, Estimate] = MappingProxyType(
    {
        "eap": _eap,
        "eap_ig_inputs": _inputs,
        "eap_ig_activations": _activations,
        "mask_ig": _mask,
        "relp": relp,
        "atp_star": atp_star,
    }
)


def edge_attribution(
    model: Model | Wiring,
    pairs: Pairs,
    *,
    method: str = "eap",
    kind: str = "resample",
    steps: int = STEPS,
    each: str | None = None,
    metric: Metric = logit_diff,
    prompts: str = "clean",
    budget: int = TOKENS_PER_BATCH,
    sink: Sink | None = None,
) -> Scores:
    """The estimated metric of every run with one edge cut, per example.

    method: see the module. kind: the ablation, see `circuits.cutting`. steps: of an integral. each: "position" keeps
    the position at which the reader reads, and then `Scores.at` takes a named position of prompts of any length.
    prompts: whose run is edited. budget: tokens per batch; memory grows with it, by about 5 MB a token for SmolLM2.

    Returns Scores [edge, example] or [edge, position, example] whose items are the graph's edges; nothing is summed
    over examples. Raises UnknownNameError, and InputError for what has no graph of edges (see `wiring`).
    """
    if method not in METHODS:
        raise UnknownNameError("method", method, METHODS)
    if each not in (None, *EACH):
        raise UnknownNameError("each", str(each), EACH, "None sums over positions.")
    if steps < 1:
        raise InputError(f"steps must be at least 1; got {steps}")
    cut = ablation(model, pairs, metric, kind, prompts)
    return estimated(cut, method, steps, each, budget, sink)


def estimated(
    cut: Ablation,
    method: str,
    steps: int = STEPS,
    each: str | None = None,
    budget: int = TOKENS_PER_BATCH,
    sink: Sink | None = None,
) -> Scores:
    """As `edge_attribution`."""
    graph, count = cut.wired.graph, len(cut.pairs)
    found, plain = [], []
    with shown(sink) as screen:
        screen(Event("start", method, 0, count))
        for rows, part in cut.batches(budget):
            found.append(METHODS[method](part, steps, each is not None).detach().float().cpu())
            plain.append(part.plain())
            screen(Event("advance", method, rows[-1] + 1, count))
        screen(Event("end", method, count, count))
    base, source = torch.cat(plain, 1)
    estimates = torch.cat(found, -1) if len(found) > 1 else found[0]
    real = cut.tokens.real.T[None] if each else torch.ones((), dtype=torch.bool)
    passes = _cost(method, steps, graph) * count
    return Scores(
        values=estimates.masked_fill_(~real, 0.0).add_(base),
        base=base,
        source=source,
        mask=real.expand_as(estimates),
        cost=Cost(passes, float(len(graph) * count)),
        items=graph.edges,
        each=each,
        edit=f"{method}, {cut.kind}",
        metric=cut.metric.name,
        unit=cut.metric.unit,
        prompts=cut.prompts,
        examples=Examples.of(cut.wired.model, cut.pairs, cut.prompts),
    )


def _cost(method: str, steps: int, graph: Graph) -> float:
    """Passes of an example, the two plain runs included."""
    passes = {
        "eap": 1.0 + _PASS,
        "eap_ig_inputs": 1.0 + (1 + _PASS) * steps,
        "eap_ig_activations": 1.0 + (1 + _PASS) * steps * len(graph.groups),
        "mask_ig": 1.0 + 2 * (1 + _PASS) * steps,
        "relp": 1.0 + _PASS,
        "atp_star": (1.0 + _PASS) * (1 + graph.n_layers),
    }
    return 2.0 + passes[method]
