"""A part's activation, or a metric, as a function of the embeddings of the tokens.

What varies is the site `embed`: what the network makes of the token ids before its first layer. With learned positions
that a separate table adds, it is the token's part alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vesalius.data.forward import captured
from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Pairs, Tokens
from vesalius.intervention import Patch
from vesalius.metric import Metric
from vesalius.model import Model
from vesalius.parts import Part, places
from vesalius.quantities.values import check_one_number
from vesalius.site import Site

EMBED = Site("embed")
PLACES = ("max", "last", "sum")
BASELINES = ("mean", "zero", "pad")
_VOCAB_AT_ONCE = 8192


class Read(Protocol):
    """One number of each row, from its embeddings."""

    @property
    def tokens(self) -> Tokens: ...

    @property
    def depth(self) -> float:
        """Share of the layers that are run."""
        ...

    @property
    def ends(self) -> Int[Tensor, " example"]:
        """Position after the last one that can matter."""
        ...

    def __call__(
        self, rows: Int[Tensor, " row"], embeddings: Float[Tensor, "row pos d_model"], grad: bool = False
    ) -> Float[Tensor, " row"]:
        """rows: the example of each row. grad: keep the graph, back to the embeddings."""
        ...


@dataclass(frozen=True, eq=False)
class PartRead:
    """A part's value. at: [example] the position that is read; None for the sum over all real ones."""

    model: Model
    tokens: Tokens
    part: Part
    at: Int[Tensor, " example"] | None

    @property
    def depth(self) -> float:
        return depth_of(self.model, self.part)

    @property
    def ends(self) -> Int[Tensor, " example"]:
        causal = self.model.architecture[0].causal
        return self.tokens.lengths if self.at is None or not causal else self.at + 1

    def values(self, rows: Tensor, embeddings: Tensor, grad: bool = False) -> Float[Tensor, "row pos"]:
        """At every position up to the last that can matter."""
        width = int(self.ends[rows].max())
        edit = Patch(EMBED, source=embeddings[:, :width])
        tokens = self.tokens.take(rows, width)
        value = self.part.value(captured(self.model, tokens, places([self.part]), interventions=[edit], grad=grad))
        check_one_number(self.part, value)
        return value

    def __call__(self, rows: Tensor, embeddings: Tensor, grad: bool = False) -> Tensor:
        value = self.values(rows, embeddings, grad)
        if self.at is None:
            real = self.tokens.real[rows, : value.shape[1]].to(value.device)
            return value.masked_fill(~real, 0.0).sum(1)
        return value[torch.arange(len(rows)), self.at[rows]]


@dataclass(frozen=True, eq=False)
class MetricRead:
    """A metric of the clean prompts of some pairs."""

    model: Model
    pairs: Pairs
    metric: Metric

    @property
    def tokens(self) -> Tokens:
        return self.pairs.tokens("clean")

    @property
    def depth(self) -> float:
        return 1.0

    @property
    def ends(self) -> Int[Tensor, " example"]:
        return self.pairs.size if self._whole else self.pairs.ends

    @property
    def _whole(self) -> bool:
        return self.metric.needs.positions == "all" or not self.model.architecture[0].causal

    def __call__(self, rows: Tensor, embeddings: Tensor, grad: bool = False) -> Tensor:
        width = self.pairs.clean.shape[1] if self._whole else int(self.ends[rows].max())
        tokens, edit = self.tokens.take(rows, width), Patch(EMBED, source=embeddings[:, :width])
        logits = self.model.run(tokens, interventions=[edit], grad=grad).logits
        return self.metric(logits, self.pairs.subset(rows.tolist()))


def depth_of(model: Model, part: Part) -> float:
    """Share of the layers that are run up to where a part is read."""
    layers = [site.layer for site in part.reads if site.layer is not None]
    return (max(layers) + 1) / model.architecture[1].n_layers if layers else 0.0


def check_embedded(model: Model) -> None:
    """Raises InputError for a model whose inputs are no single sequence of tokens that it embeds."""
    adapter, _ = model.architecture
    if adapter.stack_names != ("",):
        raise InputError(f"{model.name} has several stacks of layers; this takes models of one sequence of tokens")
    model.check_site(EMBED)
    model.check_evaluating()


def embeddings_of(model: Model, tokens: Tokens) -> Float[Tensor, "example pos d_model"]:
    """What the network makes of the token ids."""
    return captured(model, tokens, [EMBED])[EMBED].detach()


def vocabulary(model: Model) -> Iterator[Float[Tensor, "token d_model"]]:
    """The embeddings of all tokens, some thousands at a time."""
    for ids in torch.arange(model.architecture[1].vocab).split(_VOCAB_AT_ONCE):
        yield embeddings_of(model, Tokens(ids[:, None]))[:, 0]


def read_of(model: Model, inputs: Any, target: Part | Metric, at: Any, keep_first: bool) -> Read:
    if isinstance(target, Metric):
        if not isinstance(inputs, Pairs) or inputs.raw:
            raise InputError(f"{target.name} is a metric of vs.Pairs of prompts; got {type(inputs).__name__}")
        target.check_one_token(inputs)
        if target.needs.base:
            raise InputError(f"{target.name} compares with the run itself, and is zero there; give another metric")
        return MetricRead(model, inputs, target)
    if not isinstance(target, Part):
        raise InputError(f"target= is a Part such as vs.neuron(5, 3) or a vs.Metric; got {type(target).__name__}")
    tokens = tokens_of(model, inputs)
    return PartRead(model, tokens, target, _places(model, tokens, target, at, keep_first))


def tokens_of(model: Model, inputs: Any) -> Tokens:
    found = inputs.tokens("clean") if isinstance(inputs, Pairs) else model.called_with(inputs)[2]
    if found is None or found.decoder is not None or not bool(found.real[:, 0].all()):
        raise InputError("attribution takes texts, token ids [example, pos] or right-padded Tokens")
    return found


def _places(model: Model, tokens: Tokens, part: Part, at: Any, keep_first: bool) -> Int[Tensor, " example"] | None:
    """The position of each example that is read."""
    lengths = tokens.lengths
    if isinstance(at, str):
        if at not in PLACES:
            raise UnknownNameError("place", at, PLACES, "Or the number of a position.")
        if at != "max":
            return None if at == "sum" else lengths - 1
        whole = PartRead(model, tokens, part, None)
        values = whole.values(torch.arange(len(tokens)), embeddings_of(model, tokens)).cpu()
        looked_at = tokens.real.clone()
        looked_at[:, 0] &= (lengths == 1) | (not keep_first)
        return values.masked_fill(~looked_at, float("-inf")).argmax(1)
    given = torch.as_tensor(at).expand(len(tokens)).clone()
    if given.dtype != torch.long or bool(((given < 0) | (given >= lengths)).any()):
        raise InputError(f"at={at!r} is no position of every input; they have {lengths.tolist()} tokens, from 0 on")
    return given


def baseline_of(model: Model, baseline: str | int) -> Float[Tensor, " d_model"]:
    """What stands for no token."""
    if baseline == "mean":
        total = sum(part.double().sum(0) for part in vocabulary(model))
        assert isinstance(total, Tensor)
        return total / model.architecture[1].vocab
    if baseline == "zero":
        return torch.zeros(model.architecture[1].d_model)
    if baseline == "pad":
        baseline = getattr(model.tokenizer, "pad_token_id", None) or "pad"
        if not isinstance(baseline, int):
            raise InputError(f"{model.name} has no padding token; give baseline='mean', 'zero' or the id of a token")
    if not isinstance(baseline, int):
        raise UnknownNameError("baseline", str(baseline), BASELINES, "Or the id of a token.")
    return embeddings_of(model, Tokens(torch.tensor([[baseline]])))[0, 0]
