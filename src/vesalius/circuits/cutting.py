"""What an edge carries once it is cut: the setting that every measure of edges shares.

A cut edge carries its writer's value under an ablation instead of the value in the run (Miller et al. 2024 on what
that choice decides):

    resample    the other prompt's value at the same position
    mean        the mean over the other prompts, position by position
    zero        nothing
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.circuits.wired import Wiring, wiring
from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Pairs, Tokens
from vesalius.metric import Metric
from vesalius.model import Model
from vesalius.model.readout import unembedded
from vesalius.parts import At
from vesalius.patching.targets import PROMPTS
from vesalius.site import Site

ABLATIONS = ("resample", "mean", "zero")
TOKENS_PER_BATCH = 256


@dataclass(frozen=True, eq=False)
class Ablation:
    """A wired model, prompts, a metric, and what cut edges carry.

    prompts: whose run is edited, clean or corrupted; the other side gives resampled values and means.
    """

    wired: Wiring
    pairs: Pairs
    metric: Metric
    kind: str = "resample"
    prompts: str = "clean"
    means: Float[Tensor, "1 pos writer d_model"] | None = None

    @property
    def tokens(self) -> Tokens:
        """The prompts that are run."""
        return self.pairs.tokens(self.prompts)

    @property
    def other(self) -> Tokens:
        """The prompts of the other side."""
        return self.pairs.tokens(PROMPTS[1 - PROMPTS.index(self.prompts)])

    def of(self, rows: Sequence[int]) -> Ablation:
        """On some of the pairs; means stay those of all."""
        return replace(self, pairs=self.pairs.subset(rows))

    def batches(self, budget: int = TOKENS_PER_BATCH) -> Iterator[tuple[list[int], Ablation]]:
        """Row numbers and the ablation on them, of at most about `budget` tokens."""
        size = max(1, budget // self.pairs.clean.shape[1])
        if size >= len(self.pairs):
            # With the runs that it may already have.
            yield list(range(len(self.pairs))), self
            return
        for first in range(0, len(self.pairs), size):
            rows = list(range(first, min(first + size, len(self.pairs))))
            yield rows, self.of(rows)

    def seen(self, tokens: Tokens) -> Seen:
        """A run of these prompts."""
        wired, attended = self.wired, [Site("attn_out", layer) for layer in range(self.wired.graph.n_layers)]
        asked = [*wired.captured, *(attended if wired.graph.n_heads else []), wired.last]
        with torch.no_grad():
            run = wired.model.run(tokens, capture=asked, last_logits=True)
            return Seen(wired, run.activations, self.logits(run[wired.last]))

    @cached_property
    def base(self) -> Seen:
        """The run without edits."""
        return self.seen(self.tokens)

    @cached_property
    def source(self) -> Seen:
        """The run of the other side."""
        return self.seen(self.other)

    @property
    def cut(self) -> Float[Tensor, "example pos writer d_model"]:
        """What a cut edge carries, by writer; examples and positions may be 1, for all of them."""
        if self.kind == "resample":
            return self.source.writes
        if self.means is not None:
            return self.means
        layout, weight = self.wired.model.architecture[1], next(self.wired.model.module.parameters())
        return weight.new_zeros(1, 1, len(self.wired.graph.writers), layout.d_model)

    @property
    def by_difference(self) -> bool:
        """What cutting changes is linear in how two runs differ at heads and MLPs, so that heads' writes are made once.

        Not where a norm follows attention, whose scale is another one in each run.
        """
        return self.kind == "resample" and not self.wired.model.architecture[0].attn_norm

    @cached_property
    def change(self) -> Float[Tensor, "example pos writer d_model"]:
        """What cutting every edge of a writer changes for its readers, in the run without edits."""
        if not self.by_difference:
            return self.cut - self.base.writes
        one, other = self.base.sites, self.source.sites
        return self.wired.writes({site: other[site] - one[site] for site in self.wired.captured})

    def logits(self, stream: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row vocab"]:
        """Logits where the metric reads, of rows of the last stream: these pairs, again and again."""
        at = self.pairs.at.repeat(len(stream) // len(self.pairs)).to(stream.device)
        return unembedded(self.wired.model, stream[torch.arange(len(stream), device=stream.device), at])

    def score(self, logits: Float[Tensor, "row vocab"]) -> Float[Tensor, "variant example"]:
        """The metric of rows of logits, variant by variant."""
        base, count = self.base.logits if self.metric.needs.base else None, len(self.pairs)
        return torch.stack([self.metric(logits[i : i + count], self.pairs, base) for i in range(0, len(logits), count)])

    def plain(self) -> Float[Tensor, "2 example"]:
        """The metric of the run without edits, and of the other prompts' run."""
        return torch.cat([self.score(run.logits) for run in (self.base, self.source)]).cpu()


@dataclass(frozen=True, eq=False)
class Seen:
    """One run. sites: what it wrote, by site; logits: where the metric reads."""

    wired: Wiring
    sites: At
    logits: Float[Tensor, "example vocab"]

    @cached_property
    def writes(self) -> Float[Tensor, "example pos writer d_model"]:
        """What every writer added to the stream."""
        with torch.no_grad():
            return self.wired.writes(self.sites)


def ablation(
    model: Model | Wiring, pairs: Pairs, metric: Metric, kind: str = "resample", prompts: str = "clean"
) -> Ablation:
    """The setting of a model, pairs and metric.

    Raises UnknownNameError for an unknown ablation or side, InputError for a metric that does not read one position, or
    for answers of several tokens, and what `wiring` raises.
    """
    if kind not in ABLATIONS:
        raise UnknownNameError("ablation", kind, ABLATIONS)
    if prompts not in PROMPTS:
        raise UnknownNameError("prompts", prompts, PROMPTS)
    if metric.needs.positions != "read":
        raise InputError(f"{metric.name} reads other positions than one; edges are scored where the metric reads")
    metric.check_one_token(pairs)
    made = Ablation(model if isinstance(model, Wiring) else wiring(model), pairs, metric, kind, prompts)
    return replace(made, means=_means(made)) if kind == "mean" else made


def _means(made: Ablation) -> Float[Tensor, "1 pos writer d_model"]:
    """Means over the other prompts that reach a position."""
    total, real = None, made.pairs.real
    for rows, part in made.batches():
        here = real[rows].to(made.wired.model.device)
        summed = torch.where(here[..., None, None], part.source.writes, 0.0).sum(0, keepdim=True)
        total = summed if total is None else total + summed
    assert total is not None
    return total / real.sum(0).clamp_min(1).to(total)[None, :, None, None]
