"""Sparse feature circuits: latents, what dictionaries leave over, and neurons as nodes (Marks et al. 2025).

    latent_attribution   what ablating each node does, from gradients (section 3.1), per example
    node_patching        the same exactly, one run each

`latent_circuit` finds a circuit by these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.circuits.apart import Apart, Nodes, nodes_of
from vesalius.circuits.cutting import TOKENS_PER_BATCH
from vesalius.dictionaries import Unexplained
from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Pairs
from vesalius.intervention import Patch
from vesalius.jobs import Event, Sink
from vesalius.jobs.progress import shown
from vesalius.metric import Metric, logit_diff
from vesalius.model import Model
from vesalius.parts import Edge, Part
from vesalius.patching.examples import Examples
from vesalius.patching.plan import Cost
from vesalius.patching.scores import Scores

STEPS = 10
EACH = ("position",)
_PASS = 2.0


def latent_attribution(
    model: Model | Nodes,
    pairs: Pairs | None = None,
    what: object = None,
    *,
    steps: int = STEPS,
    kind: str = "resample",
    each: str | None = None,
    metric: Metric = logit_diff,
    prompts: str = "clean",
    budget: int = TOKENS_PER_BATCH,
) -> Scores:
    """The estimated metric of every run with one latent, neuron or error node ablated.

    what: dictionaries of one site, and `mlp_post` sites. steps: 1 takes the gradient at the run itself, for all tensors
    at once; more average it on the way from a tensor to its ablated self, tensor by tensor. kind: the ablation, see
    `apart`. each: "position" ablates at one position. budget: tokens run together.

    Returns Scores [node, example] or [node, position, example] of the nodes that ablation changes on any prompt, which
    are few; nothing is summed over examples. Raises UnknownNameError, and InputError for what cannot be taken apart.
    """
    if each not in (None, *EACH):
        raise UnknownNameError("each", str(each), EACH, "None ablates at all positions.")
    if steps < 1:
        raise InputError(f"steps must be at least 1; got {steps}")
    nodes = _nodes(model, pairs, what, metric, kind, prompts)
    active, found = _active(nodes, budget), []
    for _, part in nodes.batches(budget):
        gradients = at_the_run(part) if steps == 1 else [_on_the_way(part, n, steps) for n in range(len(part.apart))]
        found.append(torch.cat([_effects(part, n, active[n], gradients[n]) for n in range(len(part.apart))]))
    effects = torch.cat(found, 2)
    real = nodes.tokens.real.T[None]
    items = tuple(part for one, units in zip(nodes.apart, active, strict=True) for part in _items(one, units))
    passes = 1 + _PASS if steps == 1 else (1 + _PASS) * steps * len(nodes.apart)
    how = "estimated" if steps == 1 else "integrated"
    return node_scores(
        nodes,
        effects if each else effects.sum(1),
        items,
        (2 + passes) * len(nodes.pairs),
        how,
        each,
        real if each else None,
    )


def _nodes(
    model: Model | Nodes, pairs: Pairs | None, what: object, metric: Metric, kind: str, prompts: str = "clean"
) -> Nodes:
    if isinstance(model, Nodes):
        return model
    if pairs is None or what is None:
        raise InputError("give pairs, and what is taken apart: dictionaries, or mlp_post sites")
    return nodes_of(model, pairs, what, metric, kind, prompts)


def _active(nodes: Nodes, budget: int) -> list[Tensor]:
    """Numbers of the units of each tensor that ablation changes anywhere."""
    found: list[Tensor | None] = [None] * len(nodes.apart)
    for _, part in nodes.batches(budget):
        for number in range(len(nodes.apart)):
            here = (part.changes(number)[0] != 0).any(0).any(0)
            before = found[number]
            found[number] = here if before is None else before | here
    return [one.nonzero()[:, 0] for one in found if one is not None]


def _items(one: Apart, units: Tensor) -> list[Part]:
    left: list[Part] = [] if one.coder is None else [Unexplained(one.coder)]
    return [*(one.part(unit) for unit in units.tolist()), *left]


def at_the_run(nodes: Nodes) -> list[Tensor]:
    """Gradients of the metric at every tensor, in the run itself."""
    sites = [one.site for one in nodes.apart]
    run = nodes.model.run(nodes.tokens, capture=sites, grad=True)
    with torch.enable_grad():
        value = nodes.score(run.logits).sum()
    found = torch.autograd.grad(value, [run[site] for site in sites], allow_unused=True)
    return [torch.zeros_like(run[site]) if one is None else one for site, one in zip(sites, found, strict=True)]


def _on_the_way(nodes: Nodes, number: int, steps: int) -> Tensor:
    """The mean gradient at a tensor while all its nodes go to their ablated values."""
    site, there, moved = nodes.apart[number].site, nodes.base[nodes.apart[number].site], nodes.moved(number)
    total = torch.zeros_like(there)
    for step in range(steps):
        edit = Patch(site, source=there + (step + 0.5) / steps * moved)
        run = nodes.model.run(nodes.tokens, capture=[site], interventions=[edit], grad=True)
        with torch.enable_grad():
            value = nodes.score(run.logits).sum()
        total += torch.autograd.grad(value, run[site])[0] / steps
    return total


def _effects(
    nodes: Nodes, number: int, units: Tensor, gradient: Float[Tensor, "example pos d"]
) -> Float[Tensor, "node pos example"]:
    """Change times gradient of some units, and of what is left over."""
    one, (change, left) = nodes.apart[number], nodes.changes(number)
    with torch.no_grad():
        own = change[..., units] * one.pulled(gradient, units)
        both = [own] if one.coder is None else [own, (left * gradient).sum(-1, keepdim=True)]
        return torch.cat(both, -1).permute(2, 1, 0).float().cpu()


def node_scores(
    nodes: Nodes,
    effects: Tensor,
    items: Sequence[Part | Edge],
    spent: float,
    how: str,
    each: str | None = None,
    mask: Tensor | None = None,
) -> Scores:
    """Effects [item, *pos, example] as Scores. spent: forward passes; how: what they are."""
    base, source = torch.cat([part.plain() for _, part in nodes.batches()], 1)
    real = torch.ones((), dtype=torch.bool) if mask is None else mask
    return Scores(
        values=effects + base,
        base=base,
        source=source,
        mask=real.expand_as(effects),
        cost=Cost(spent, float(effects[..., 0].numel() * len(base))),
        items=tuple(items),
        each=each,
        edit=f"{how}, {nodes.kind}",
        metric=nodes.metric.name,
        unit=nodes.metric.unit,
        prompts=nodes.prompts,
        examples=Examples.of(nodes.model, nodes.pairs, nodes.prompts),
    )


def node_patching(
    model: Model | Nodes,
    pairs: Pairs | None = None,
    what: object = None,
    *,
    parts: Sequence[Part],
    kind: str = "resample",
    metric: Metric = logit_diff,
    prompts: str = "clean",
    sink: Sink | None = None,
) -> Scores:
    """The metric of every run with one node ablated at all positions, measured: one whole run each.

    parts: latents, neurons and error nodes of what is taken apart. Returns Scores [node, example]. Raises InputError
    for a part of something else.
    """
    nodes, rows = _nodes(model, pairs, what, metric, kind, prompts), []
    with shown(sink) as screen:
        screen(Event("start", "nodes", 0, len(parts)))
        ready = [(part, [part.ablated(n) for n in range(len(part.apart))]) for _, part in nodes.batches()]
        for done, part in enumerate(parts):
            edited = [
                batch.metric_with([Patch(part, source=_ablated_value(batch, gone, part))]) for batch, gone in ready
            ]
            rows.append(torch.cat(edited))
            screen(Event("advance", "nodes", done + 1, len(parts)))
        screen(Event("end", "nodes", len(parts), len(parts)))
    base = torch.cat([batch.plain()[0] for batch, _ in ready])
    effects = torch.stack(rows) - base if rows else base.new_zeros(0, len(base))
    return node_scores(nodes, effects, parts, float((2 + len(parts)) * len(nodes.pairs)), "exact")


def _ablated_value(nodes: Nodes, gone: Sequence[tuple[Tensor, Tensor]], part: Part) -> Tensor:
    number, unit = located(nodes, part)
    units, left = gone[number]
    value = left if unit is None else units[..., unit]
    return value.expand(len(nodes.pairs), *value.shape[1:])


def located(nodes: Nodes, part: Part) -> tuple[int, int | None]:
    """Which tensor a node belongs to, and its number there; None for what is left over.

    Raises InputError for a part that is none of them.
    """
    for number, one in enumerate(nodes.apart):
        if isinstance(part, Unexplained) and part.coder is one.coder:
            return number, None
        unit = one.number(part)
        if unit is not None:
            return number, unit
    raise InputError(f"{part} is no node of {', '.join(one.name for one in nodes.apart)}")
