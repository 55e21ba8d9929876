"""A circuit of latents, error nodes and neurons, and the edges between them (Marks et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.circuits.apart import Nodes, nodes_of, with_nodes
from vesalius.circuits.circuit import KEEP, Circuit
from vesalius.circuits.exact import sample
from vesalius.circuits.graph import LOGITS
from vesalius.circuits.latents import STEPS, at_the_run, latent_attribution, located, node_patching, node_scores
from vesalius.circuits.verified import check_of
from vesalius.errors import InputError
from vesalius.inputs import Pairs
from vesalius.intervention import Replace
from vesalius.jobs import Event, Sink
from vesalius.jobs.progress import shown
from vesalius.metric import Metric, logit_diff
from vesalius.model import Model
from vesalius.parts import Edge, Part
from vesalius.patching.scores import Scores
from vesalius.site import Site

SMALLEST = 0.01
DRAWN = 32
RULE = (
    "latents: nodes whose ablation has a large enough effect, estimated from gradients, the others ablated. Discovery "
    "prompts only."
)


@dataclass(eq=False)
class _Leaf:
    """Stands at a tensor: what comes after it sees a tensor without past."""

    before: list[Tensor] = field(default_factory=list)

    def __call__(self, given: Tensor) -> Tensor:
        self.before[:] = [given]
        return given.detach().requires_grad_()


def latent_edges(nodes: Nodes, members: Sequence[Part]) -> Scores:
    """What each node does to the metric through each later one, and past all of them to the logits, per example.

    With d a later node, u an earlier one and everything that is taken apart between them held: gradient of the metric
    at d, times the gradient of d in u, times what ablating u changes (section 3.2, the product of first-order terms,
    all taken at the run itself). Over all later nodes and the logits these add up to the first-order effect of u.

    Returns Scores [edge, example]. Raises InputError for a member that is no node.
    """
    places = [located(nodes, part) for part in members]
    pieces = [_Between(part, members, places).effects() for _, part in nodes.batches()]
    edges = pieces[0][0]
    effects = torch.cat([found for _, found in pieces], 1)
    passes = 2.0 + 1.0 + 2.0 * (2 + len(members))
    return node_scores(nodes, effects, edges, passes * len(nodes.pairs), "estimated")


@dataclass(frozen=True, eq=False)
class _Between:
    nodes: Nodes
    members: Sequence[Part]
    places: Sequence[tuple[int, int | None]]

    def effects(self) -> tuple[list[Edge], Float[Tensor, "edge example"]]:
        apart, leaves = self.nodes.apart, [_Leaf() for _ in self.nodes.apart]
        held = [Replace(one.site, one.site, leaf, "held") for one, leaf in zip(apart, leaves, strict=True)]
        run = self.nodes.model.run(self.nodes.tokens, capture=self.nodes.sites, interventions=held, grad=True)
        at = {site: run[site] for site in self.nodes.sites}
        onto = at_the_run(self.nodes)
        edges: list[Edge] = []
        found: list[Tensor] = []
        for part, (number, unit) in zip(self.members, self.places, strict=True):
            # A dictionary reads its tensor as it was before it.
            own = {**at, apart[number].site: leaves[number].before[0]}
            value = self._value(own, number, unit, onto[number])
            self._add(edges, found, part, self._pulled(value, at, number))
        with torch.enable_grad():
            value = self.nodes.score(run.logits).sum()
        self._add(edges, found, LOGITS, self._pulled(value, at, len(apart)))
        return edges, torch.stack(found) if found else torch.zeros(0, len(self.nodes.pairs))

    def _value(self, at: dict[Site, Tensor], number: int, unit: int | None, gradient: Tensor) -> Tensor:
        """What the metric gets from a node, to first order: its value times the metric's gradient at it."""
        one = self.nodes.apart[number]
        with torch.enable_grad():
            if unit is None:
                return (one.left(at) * gradient).sum()
            slope = one.pulled(gradient, torch.tensor([unit], device=gradient.device))[..., 0]
            real = self.nodes.tokens.real.to(slope.device)
            return (torch.where(real, one.units(at)[..., unit], 0.0) * slope).sum()

    def _pulled(self, value: Tensor, at: dict[Site, Tensor], before: int) -> list[Tensor | None]:
        """Its gradients at the tensors before it."""
        earlier = [at[one.site] for one in self.nodes.apart[:before]]
        if not earlier or not value.requires_grad:
            return [None] * before
        return list(torch.autograd.grad(value, earlier, allow_unused=True, retain_graph=True))

    def _add(self, edges: list[Edge], found: list[Tensor], target: Part, pulled: Sequence[Tensor | None]) -> None:
        for part, (number, unit) in zip(self.members, self.places, strict=True):
            if number >= len(pulled):
                continue
            edges.append(Edge(part, target))
            gradient = pulled[number]
            change, left = self._changes[number]
            if gradient is None:
                found.append(torch.zeros(len(self.nodes.pairs)))
            elif unit is None:
                found.append((left * gradient).sum((1, 2)).float().cpu())
            else:
                index = torch.tensor([unit], device=gradient.device)
                own = self.nodes.apart[number].pulled(gradient, index)[..., 0]
                found.append((change[..., unit] * own).sum(1).float().cpu())

    @cached_property
    def _changes(self) -> list[tuple[Tensor, Tensor]]:
        return [self.nodes.changes(number) for number in range(len(self.nodes.apart))]


def discover_latents(
    model: Model,
    pairs: Pairs,
    what: object,
    *,
    kind: str = "resample",
    metric: Metric = logit_diff,
    size: int | None = None,
    smallest: float = SMALLEST,
    steps: int = STEPS,
    drawn: int = DRAWN,
    edges: bool = True,
    seed: int = 0,
    sink: Sink | None = None,
) -> Circuit:
    """A circuit of latents, error nodes and neurons.

    pairs: of one split, as for `discover`. what: dictionaries of one site, and `mlp_post` sites. smallest: the mean
    absolute effect from which on a node is a member, as a share of the effect of ablating all nodes; size: the number
    of nodes instead, by absolute mean effect. drawn: random nodes that are ablated exactly, to check the estimates.
    edges: whether those between members are estimated as well, a backward pass for each member.

    The circuit's `kept` is what the members do with all other nodes ablated (error nodes too), and its `check` says
    how estimates agree with exact effects. Raises as `latent_attribution`, and InputError for pairs of several splits
    and where ablating all nodes changes nothing.
    """
    if len(pairs.split_names) > 1:
        raise InputError(f"these pairs hold the splits {', '.join(pairs.split_names)}; search on one")
    nodes = nodes_of(model, pairs, what, metric, kind)
    with shown(sink) as screen:
        estimates = latent_attribution(nodes, steps=steps)
        empty = with_nodes(nodes, [[]])[0]
        total = float((estimates.base - empty).mean())
        if not total:
            raise InputError("ablating all of these nodes does not change the metric, so there is no circuit of them")
        mask = _chosen(estimates, size, smallest * abs(total))
        members = tuple(part for part, one in zip(_parts(estimates), mask.tolist(), strict=True) if one)
        numbers = sample(len(mask), drawn, seed)
        measured = node_patching(nodes, parts=[_parts(estimates)[n] for n in numbers.tolist()], sink=screen)
        random = torch.zeros_like(mask)
        random[numbers] = True
        check = check_of(estimates, measured, numbers, random, mask, smallest * abs(total), "nodes")
        screen(Event("note", "nodes", message=check.describe()))
        alone = with_nodes(nodes, [members])[0]
        kept = float((alone - empty).mean()) / total
        found = latent_edges(nodes, members) if edges else None
    return Circuit(
        members=members,
        kept=kept,
        reached=kept >= KEEP,
        edges=_weights(found, smallest * abs(total)) if found else {},
        rule=RULE,
        history=((len(members), kept),),
        scores=estimates,
        check=check,
        setting={
            "method": "latents", "ablation": kind, "metric": metric.name, "smallest": smallest, "size": size,
            "seed": seed, "total": total, "model": model.content_hash, "pairs": pairs.content_hash,
            "apart": [one.name for one in nodes.apart],
        },
    )  # fmt: skip


def _parts(scores: Scores) -> list[Part]:
    return [item for item in scores.items if isinstance(item, Part)]


def _chosen(estimates: Scores, size: int | None, smallest: float) -> Tensor:
    if size is None:
        return estimates.effects.abs().mean(1) >= smallest
    mask = torch.zeros(len(estimates.values), dtype=torch.bool)
    mask[estimates.effects.mean(1).abs().argsort(descending=True, stable=True)[:size]] = True
    return mask


def _weights(found: Scores, smallest: float) -> dict[Edge, float]:
    mean = found.effects.mean(1).tolist()
    named = zip(found.items, mean, strict=True)
    return {edge: weight for edge, weight in named if isinstance(edge, Edge) and abs(weight) >= smallest}
