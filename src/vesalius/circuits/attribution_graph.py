"""Attribution graphs: which latents of a prompt make which, and the logits (Ameisen et al. 2025).

Nodes are active latents of transcoders, what these leave unexplained (errors), tokens and logits. An edge's weight is
what its source says to its target in the local replacement model (`replacement`), exactly: the weights into a node and
a constant add up to its value. Influence, scores and pruning follow that paper and its reference code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vesalius.errors import InputError, UnknownNameError
from vesalius.parts import Part

KINDS = ("latent", "error", "token", "logit")
NODES, EDGES = 0.8, 0.98
ALIKE = 0.8


@dataclass(frozen=True)
class Node:
    """One node. kind: see `KINDS`. layer: of a latent or an error; index: of a latent in its layer, or a token's id.

    value: a latent's activation, or a logit less the mean of all logits. probability: of a logit's token. text: of a
    token. part: what it is in the model, where that is known; a graph that was read from a file does not know.
    """

    kind: str
    position: int
    layer: int | None = None
    index: int | None = None
    value: float = 0.0
    probability: float = 0.0
    text: str = ""
    part: Part | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """Unique in its graph."""
        numbers = [one for one in (self.layer, self.index, self.position) if one is not None]
        return " ".join([self.kind, *map(str, numbers)])


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """Nodes, and the weight of every edge between them.

    nodes: latents, errors, tokens and logits, in this order. weights: [target, source]. constants: what a node's value
    has beside them. inputs: the sum of the sizes of all weights into a node, those included that were pruned; what is
    missing counts as error. groups: supernodes, name -> numbers of nodes.
    """

    nodes: tuple[Node, ...]
    weights: Float[Tensor, "node node"]
    constants: Float[Tensor, " node"]
    inputs: Float[Tensor, " node"]
    prompt: str
    texts: tuple[str, ...]
    """The prompt's tokens."""
    n_layers: int
    model: str = ""
    transcoders: tuple[str, ...] = ()
    """Their content hashes."""
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def numbers(self, kind: str) -> Int[Tensor, " node"]:
        """Numbers of the nodes of a kind. Raises UnknownNameError."""
        if kind not in KINDS:
            raise UnknownNameError("kind of node", kind, KINDS)
        return torch.tensor([n for n, node in enumerate(self.nodes) if node.kind == kind], dtype=torch.long)

    @cached_property
    def shares(self) -> Float[Tensor, "node node"]:
        """Of each target's input by source, in absolute size; a row of what was not pruned adds up to one."""
        return self.weights.abs() / self.inputs.clamp_min(1e-10)[:, None]

    @cached_property
    def outputs(self) -> Float[Tensor, " node"]:
        """What influence starts from: the probabilities of the logits' tokens."""
        return torch.tensor([node.probability for node in self.nodes], dtype=self.weights.dtype)

    @cached_property
    def influence(self) -> Float[Tensor, " node"]:
        """Of every node on the logits: over all paths, the product of shares, weighted by probability."""
        return _influence(self.shares, self.outputs)

    @property
    def replacement_score(self) -> float:
        """Share of the influence that ends in tokens, and not in errors or in what was pruned."""
        tokens, errors = (float(self.influence[self.numbers(kind)].sum()) for kind in ("token", "error"))
        return tokens / (tokens + errors + float((self._lost * self._weighed).sum()))

    @property
    def completeness_score(self) -> float:
        """Share of nodes' inputs that are no errors, weighted by influence; as in the reference code, in which nodes
        without inputs (tokens and errors) count as complete."""
        return float((self._explained * self._weighed).sum() / self._weighed.sum())

    @property
    def completeness_of_read(self) -> float:
        """The same of nodes that have inputs alone, which is lower."""
        here = self._weighed * (self.inputs > 0)
        return float((self._explained * here).sum() / here.sum())

    @cached_property
    def _weighed(self) -> Tensor:
        return self.influence + self.outputs

    @cached_property
    def _lost(self) -> Tensor:
        """Share of each node's input that was pruned."""
        return torch.where(self.inputs > 0, 1.0 - self.shares.sum(1), 0.0).clamp_min(0.0)

    @cached_property
    def _explained(self) -> Tensor:
        return 1.0 - self.shares[:, self.numbers("error")].sum(1) - self._lost

    def pruned(self, nodes: float = NODES, edges: float = EDGES) -> AttributionGraph:
        """The nodes that make up a share of the influence, and the edges between them that make up a share of it.

        Tokens and logits stay. A latent that has lost all edges into it or out of it goes too. Raises InputError for
        shares outside 0 to 1.
        """
        if not (0 <= nodes <= 1 and 0 <= edges <= 1):
            raise InputError(f"shares of influence lie between 0 and 1; got nodes={nodes}, edges={edges}")
        kept = _largest(self.influence, nodes)
        kept[[n for n, node in enumerate(self.nodes) if node.kind in ("token", "logit")]] = True
        weights = self.weights * kept[:, None] * kept[None]
        sums = weights.abs().sum(1, keepdim=True).clamp_min(1e-10)
        shares = weights.abs() / sums
        reached = _influence(shares, self.outputs) + self.outputs
        links = _largest((shares * reached[:, None]).flatten(), edges).view_as(weights) & (weights != 0)
        return self._only(*self._connected(kept, links))

    def _connected(self, kept: Tensor, links: Tensor) -> tuple[Tensor, Tensor]:
        """Without nodes that nothing in the graph reads, and latents that read nothing in it."""
        inner = torch.tensor([node.kind in ("latent", "error") for node in self.nodes])
        latent = torch.tensor([node.kind == "latent" for node in self.nodes])
        while True:
            links = links & kept[:, None] & kept[None]
            now = kept & (~inner | links.any(0)) & (~latent | links.any(1))
            if bool((now == kept).all()):
                return kept, links
            kept = now

    def _only(self, kept: Bool[Tensor, " node"], links: Bool[Tensor, "node node"]) -> AttributionGraph:
        some = kept.nonzero()[:, 0]
        place = {int(old): new for new, old in enumerate(some)}
        groups = {name: tuple(place[n] for n in of if n in place) for name, of in self.groups.items()}
        return replace(
            self,
            nodes=tuple(self.nodes[int(n)] for n in some),
            weights=(self.weights * links)[some][:, some],
            constants=self.constants[some],
            inputs=self.inputs[some],
            groups={name: of for name, of in groups.items() if of},
        )

    def grouped(self, groups: Mapping[str, Sequence[Node | int]]) -> AttributionGraph:
        """With these supernodes. Raises InputError for a node that is not there, or is in two of them."""
        numbers = {node: n for n, node in enumerate(self.nodes)}
        found: dict[str, tuple[int, ...]] = {}
        for name, of in groups.items():
            missing = [one for one in of if (one not in numbers if isinstance(one, Node) else one >= len(self.nodes))]
            if missing:
                raise InputError(f"supernode {name!r}: {missing[0]} is no node of this graph of {len(self.nodes)}")
            found[name] = tuple(numbers[one] if isinstance(one, Node) else one for one in of)
        every = [n for of in found.values() for n in of]
        if len(set(every)) < len(every):
            raise InputError("a node belongs to one supernode")
        return replace(self, groups=found)

    def grouped_alike(self, alike: float = ALIKE) -> AttributionGraph:
        """With supernodes of latents that read and are read alike: of at most neighbouring layers' latents at a
        position, those whose shares, into and out of them, have an average cosine of at least `alike`."""
        latents, groups = self.numbers("latent").tolist(), dict[str, tuple[int, ...]]()
        for position in sorted({self.nodes[n].position for n in latents}):
            here = [n for n in latents if self.nodes[n].position == position]
            for of in self._clusters(here, alike):
                layers = sorted({self.nodes[n].layer or 0 for n in of})
                span = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"
                name = f"{len(of)} latents at {position} {self.texts[position].strip()!r}, layer {span}"
                groups[name if name not in groups else f"{name} ({len(groups)})"] = tuple(of)
        return replace(self, groups=groups)

    def _clusters(self, numbers: list[int], alike: float) -> list[list[int]]:
        # Late, because it is heavy and needed here only.
        from scipy.cluster.hierarchy import fcluster, linkage

        if len(numbers) < 2:
            return []
        profile = torch.cat([self.weights[numbers], self.weights[:, numbers].T], 1).double()
        profile = profile / profile.norm(dim=1, keepdim=True).clamp_min(1e-12)
        apart = (1.0 - profile @ profile.T).clamp_min(0.0)
        rows, columns = torch.triu_indices(len(numbers), len(numbers), 1)
        labels = fcluster(linkage(apart[rows, columns].numpy(), "average"), 1.0 - alike, "distance")
        found = [[n for n, own in zip(numbers, labels, strict=True) if own == label] for label in sorted(set(labels))]
        return [of for of in found if len(of) > 1]

    def between_groups(self) -> tuple[tuple[str, ...], Float[Tensor, "group group"]]:
        """Shares [target, source] between supernodes, nodes outside of them each as its own.

        A target's is the mean over its members, weighted by their influence, of the shares of the source's members.
        """
        inside = {n for of in self.groups.values() for n in of}
        groups = {**self.groups, **{node.name: (n,) for n, node in enumerate(self.nodes) if n not in inside}}
        member = torch.zeros(len(groups), len(self.nodes), dtype=self.weights.dtype)
        for row, of in enumerate(groups.values()):
            member[row, list(of)] = 1.0
        weight = member * self._weighed
        weight = weight / weight.sum(1, keepdim=True).clamp_min(1e-10)
        return tuple(groups), weight @ self.shares @ member.T

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self.numbers(kind))} {kind}s" for kind in KINDS)
        edges = int((self.weights != 0).sum())
        return (
            f"AttributionGraph({counts}; {edges:,} edges; replacement {self.replacement_score:.2f}, completeness "
            f"{self.completeness_score:.2f})"
        )


def _influence(shares: Tensor, outputs: Tensor) -> Tensor:
    """outputs (A + A^2 + ...), which ends because every edge goes forward."""
    step = outputs @ shares
    total = step
    for _ in range(len(shares)):
        if not bool(step.any()):
            return total
        step = step @ shares
        total = total + step
    raise InputError("these edges go round in a circle")


def _largest(scores: Tensor, share: float) -> Tensor:
    """True for the largest that together have this share of the sum."""
    ordered = scores.sort(descending=True).values
    reached = ordered.cumsum(0) / ordered.sum().clamp_min(1e-10)
    last = min(int(torch.searchsorted(reached, torch.tensor(share, dtype=reached.dtype))), len(ordered) - 1)
    return scores >= ordered[last]
