"""How good a circuit is: what it does alone, what is lost without it, at every size, and whether a hypothesis holds.

All figures are of prompts that the circuit was not found on, per example, and with clustered intervals.

    faithfulness    what the circuit does alone, by level (its edges, or all edges between its nodes) and ablation
    completeness    whether the rest still does what the circuit does, with parts of either taken away (Wang et al.)
    curve           faithfulness over sizes, and the areas under it: CPR and CMD (Mueller et al. 2025)
    scrubbing       causal scrubbing: everything the hypothesis leaves out comes from other prompts (Chan et al. 2022)
    coablation      what each writer does once others are gone: backups (conditional co-ablation)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vesalius.circuits.cells import Roles, optimal_ablation, with_tokens
from vesalius.circuits.circuit import Circuit
from vesalius.circuits.cutting import ABLATIONS, Ablation, ablation
from vesalius.circuits.graph import Graph
from vesalius.circuits.masked import with_cut, with_only
from vesalius.circuits.search import members_of
from vesalius.circuits.wired import Wiring, wiring
from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Pairs
from vesalius.metric import Metric, logit_diff
from vesalius.model import Model
from vesalius.parts import Part
from vesalius.patching.scores import Scores
from vesalius.seeds import generator_for
from vesalius.stats import Measurement, measure

LEVELS = ("edge", "node")
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of all edges at which MIB evaluates (Mueller et al. 2025)."""
RANKINGS = ("absolute", "signed")


def edges_of(graph: Graph, circuit: Circuit) -> Bool[Tensor, " edge"]:
    """A circuit's edges as a mask. Raises UnknownNameError or InputError for edges of another graph."""
    return graph.mask(circuit.edges)


def between(graph: Graph, members: Iterable[Part]) -> Bool[Tensor, " edge"]:
    """All edges between some writers, and from them to the logits: the circuit of nodes."""
    kept = {graph.writers.index(part) for part in members if part in graph.writers}
    written = torch.zeros(len(graph.writers), dtype=torch.bool)
    written[list(kept)] = True
    read = torch.tensor([not (nodes := graph.node_of(n)) or bool(kept & {*nodes}) for n in range(len(graph.readers))])
    return written[graph.writer_of] & read[graph.reader_of]


def faithfulness(
    model: Model | Wiring,
    circuit: Circuit,
    pairs: Pairs,
    *,
    kinds: Sequence[str] = ABLATIONS,
    levels: Sequence[str] = LEVELS,
    metric: Metric = logit_diff,
    roles: Roles | None = None,
    fitted_on: Pairs | None = None,
) -> dict[tuple[str, str], Measurement]:
    """(level, ablation) -> what the circuit does alone, as a share of the whole effect, per example.

    (metric of the circuit - metric with everything cut) / mean over examples of (metric of the model - metric with
    everything cut): a ratio of means, because single prompts with a small denominator would dominate a mean of ratios.
    Nothing is clamped; diagnostics tell how many prompts have a ratio of their own below 0 or above 1, and the lowest
    and highest.

    roles: places at which each edge acts (`token_roles`); then there is the level "token" as well, in which each is cut
    everywhere else. fitted_on: prompts of the search; then there is the ablation "optimal" as well, whose constants are
    fitted on them, for each level apart and for the model without any edge.

    Raises UnknownNameError for an unknown level, InputError where cutting everything changes nothing.
    """
    wired = model if isinstance(model, Wiring) else wiring(model)
    mask = edges_of(wired.graph, circuit)
    masks = {"edge": mask, "node": between(wired.graph, members_of(wired.graph, mask))}
    unknown = [level for level in levels if level not in LEVELS]
    if unknown:
        raise UnknownNameError("level", unknown[0], LEVELS)
    found = {}
    for kind in kinds:
        cut = ablation(wired, pairs, metric, kind)
        values = with_only(cut, [torch.zeros_like(mask), *(masks[level] for level in levels)])
        whole = cut.plain()[0] - values[0]
        for level, value in zip(levels, values[1:], strict=True):
            found[level, kind] = _share(f"faithfulness, {level}, {kind}", value - values[0], whole, pairs)
        if roles is not None:
            kept = with_tokens(cut, roles) - values[0]
            found["token", kind] = _share(f"faithfulness, token, {kind}", kept, whole, pairs)
    if fitted_on is not None:
        found |= _optimal(wired, {level: masks[level] for level in levels}, pairs, fitted_on, metric)
    return found


def _optimal(
    wired: Wiring, masks: Mapping[str, Bool[Tensor, " edge"]], pairs: Pairs, fitted_on: Pairs, metric: Metric
) -> dict[tuple[str, str], Measurement]:
    def alone(mask: Tensor) -> tuple[Ablation, Tensor]:
        cut = replace(optimal_ablation(wired, mask, fitted_on, metric=metric), pairs=pairs)
        return cut, with_only(cut, [mask])[0]

    cut, empty = alone(torch.zeros(len(wired.graph), dtype=torch.bool))
    whole = cut.plain()[0] - empty
    return {
        (level, "optimal"): _share(f"faithfulness, {level}, optimal", alone(mask)[1] - empty, whole, pairs)
        for level, mask in masks.items()
    }


def _share(name: str, part: Tensor, whole: Tensor, pairs: Pairs) -> Measurement:
    if float(whole.mean()) == 0:
        raise InputError(f"{name}: cutting every edge does not change the metric, so there is no share of it")
    own = part / torch.where(whole == 0, torch.nan, whole)
    told = {
        "outside": float(((own < 0) | (own > 1)).double().mean()),
        "lowest": float(own.nan_to_num(0.0).min()),
        "highest": float(own.nan_to_num(0.0).max()),
    }
    shares = (part / whole.mean()).double().numpy()
    return measure(name, shares, groups=pairs.groups, clusters=pairs.clusters, unit="share", diagnostics=told)


def completeness(
    cut: Ablation, circuit: Bool[Tensor, " edge"], *, draws: int = 20, seed: int = 0
) -> Float[Tensor, "draw example"]:
    """|metric of the circuit without K - metric of the model without K|, for K nothing, all of it and random parts.

    A circuit is complete when these are small (Wang et al. 2023, section 4.1): whatever is taken from both, they do the
    same. Raises InputError for a circuit without edges.
    """
    if not bool(circuit.any()):
        raise InputError("completeness is of a circuit with edges; this one has none")
    generator = generator_for("completeness", seed)
    parts = [torch.zeros_like(circuit), circuit.clone()]
    parts += [circuit & (torch.rand(len(circuit), generator=generator) < 0.5) for _ in range(draws)]
    alone = with_cut(cut, [~circuit | part for part in parts])
    return (alone - with_cut(cut, parts)).abs()


@dataclass(frozen=True, eq=False)
class Curve:
    """Faithfulness at shares of all edges, per example.

    values: [size, example] of the metric; shares: of all edges. cpr: the area under the faithfulness; cmd: the area
    between it and 1, where both are by trapezoids over the shares. ranking: by absolute or signed mean effect.
    """

    shares: tuple[float, ...]
    faithfulness: tuple[float, ...]
    values: Float[Tensor, "size example"]
    ranking: str

    @property
    def cpr(self) -> float:
        return areas(self.shares, self.faithfulness)[0]

    @property
    def cmd(self) -> float:
        return areas(self.shares, self.faithfulness)[1]


def areas(shares: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """CPR and CMD of faithfulness values at shares of the edges.

    Trapezoids on a linear axis from the smallest share, so that a perfect circuit has CPR .999 and not 1; a segment
    that crosses 1 counts as if it did not, as in MIB.
    """
    at, f = np.asarray(shares), np.asarray(values)
    return float(np.trapezoid(f, at)), float(np.trapezoid(np.abs(1 - f), at))


def curve(cut: Ablation, scores: Scores, *, shares: Sequence[float] = SHARES, ranking: str = "absolute") -> Curve:
    """Circuits of the highest edges at many sizes, evaluated on the pairs of `cut`.

    scores: of all edges, from other pairs. ranking: "absolute" by the size of the mean effect; "signed" by how much
    cutting lowers the metric, so that suppressing edges come last (the two differ: MIB's CPR is signed).

    Raises UnknownNameError, InputError for scores of other edges.
    """
    if ranking not in RANKINGS:
        raise UnknownNameError("ranking", ranking, RANKINGS)
    graph = cut.wired.graph
    if len(scores.values) != len(graph):
        raise InputError(f"a curve takes scores of all {len(graph):,} edges; these are of {len(scores.values):,}")
    mean = scores.effects.mean(1)
    order = (mean.abs() if ranking == "absolute" else -mean).argsort(descending=True, stable=True)
    masks = torch.zeros(len(shares) + 1, len(graph), dtype=torch.bool)
    for mask, share in zip(masks[1:], shares, strict=True):
        mask[order[: max(1, round(share * len(graph)))]] = True
    values = with_only(cut, masks)
    empty = float(values[0].mean())
    whole = float(cut.plain()[0].mean()) - empty
    if whole == 0:
        raise InputError("cutting every edge does not change the metric, so there is no faithfulness")
    found = tuple((float(value.mean()) - empty) / whole for value in values[1:])
    return Curve(tuple(shares), found, values[1:], ranking)


def scrubbing(
    cut: Ablation, hypothesis: Bool[Tensor, " edge"], *, draws: int = 5, seed: int = 0
) -> tuple[Float[Tensor, "draw example"], float]:
    """The metric with all edges outside a hypothesis taken from random other prompts, and the share recovered.

    recovered = (scrubbed - baseline) / (model - baseline), baseline: everything scrubbed. Prompts stand in for each
    other only where they have the same length. Read the per-example values too: opposite errors cancel in the share.

    Raises InputError for pairs whose prompts have no others of their length.
    """
    scrubbed, baseline = [], []
    nothing = torch.zeros_like(hypothesis)
    for draw in range(draws):
        other = replace(cut, kind="resample", means=None, pairs=_reassigned(cut.pairs, seed, draw))
        kept, empty = with_only(other, [hypothesis, nothing])
        scrubbed.append(kept)
        baseline.append(empty)
    values, empty = torch.stack(scrubbed), torch.stack(baseline)
    whole = float(cut.plain()[0].mean() - empty.mean())
    return values, float(values.mean() - empty.mean()) / whole


def _reassigned(pairs: Pairs, seed: int, draw: int) -> Pairs:
    """The pairs with another example's clean prompt in the place of each corrupted one."""
    generator, corrupted = generator_for("scrubbing", seed, draw), pairs.corrupted.clone()
    for row in range(len(pairs)):
        differs = (pairs.clean != pairs.clean[row]).any(1)
        fitting = ((pairs.size == pairs.size[row]) & differs).nonzero()[:, 0]
        if not len(fitting):
            raise InputError(f"prompt {row} has no other of its length of {int(pairs.size[row])} tokens to scrub with")
        corrupted[row] = pairs.clean[fitting[torch.randint(len(fitting), (1,), generator=generator)[0]]]
    return replace(pairs, corrupted=corrupted)


def coablation(cut: Ablation, found: Iterable[Part]) -> tuple[tuple[Part, ...], Float[Tensor, "writer example"]]:
    """What ablating each other writer does once `found` are ablated, less what it does alone.

    A backup does nothing while the part that it stands in for is there: its own effect is small, and this is not. All
    edges of a writer are cut. Returns the writers and the difference [writer, example].
    """
    graph, gone = cut.wired.graph, set(found)
    ablated = torch.tensor([writer in gone for writer in graph.writers])
    others = (~ablated).nonzero()[:, 0].tolist()
    first = ablated[graph.writer_of]
    alone = [graph.writer_of == number for number in others]
    values = with_cut(cut, [first, *alone, *(first | mask for mask in alone)])
    without, single, both = values[0], values[1 : 1 + len(others)], values[1 + len(others) :]
    effects = (both - without) - (single - cut.plain()[0])
    return tuple(graph.writers[number] for number in others), effects
