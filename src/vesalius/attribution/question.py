"""What is explained: one number that a model gives, as a function of one input, and the features that may be absent.

The input is an image, a row of a table, or tokens (by their embeddings). Its elements belong to features: patches of
an image, columns, tokens. A feature is absent when its elements are those of a reference; with several references
(rows of a table) what is measured is the mean over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vesalius.activations import Run
from vesalius.describe.embedded import EMBED
from vesalius.errors import InputError, NotFiniteError
from vesalius.inputs import Tokens
from vesalius.intervention import Patch
from vesalius.model import Model
from vesalius.site import Site

Kind = Literal["image", "row", "tokens"]
ALWAYS = -1
"""Number of the elements that are never absent."""
BATCH = 64


class Score(Protocol):
    """One number of each of some inputs, from that input alone."""

    def __call__(self, points: Float[Tensor, "point ..."], grad: bool = False) -> Float[Tensor, " point"]: ...


@dataclass(frozen=True, eq=False)
class NetworkScore:
    """A number that is read off a network's run. needs: sites that it is read from. tokens: the one sequence whose
    embeddings the points are; None for a network that takes the points themselves."""

    model: Model
    of: Callable[[Run], Float[Tensor, " point"]]
    needs: tuple[Site, ...] = ()
    tokens: Tokens | None = None

    def __call__(self, points: Float[Tensor, "point ..."], grad: bool = False) -> Float[Tensor, " point"]:
        return self.of(self.run(points, self.needs, grad))

    def run(self, points: Float[Tensor, "point ..."], capture: Sequence[Site], grad: bool = False) -> Run:
        """The network's run of some points."""
        if self.tokens is None:
            return self.model.run(points, capture=capture, grad=grad)
        repeated = self.tokens.take(torch.zeros(len(points), dtype=torch.long))
        return self.model.run(repeated, capture=capture, interventions=[Patch(EMBED, source=points)], grad=grad)


@dataclass(frozen=True, eq=False)
class Question:
    """Why is this number what it is?

    x: the input, without an axis of examples: [channel, row, column], [column], [pos, d_model]. references: [reference,
    ...] what absent elements are replaced with. features: of each element the number of its feature, or ALWAYS. target,
    scale: what the number is, in words. asked: what was asked, a network or an estimator. output: the class, where the
    target is one. Raises InputError for parts that do not fit together, NotFiniteError for NaN and infinity.
    """

    kind: Kind
    score: Score
    x: Float[Tensor, "*any"]
    references: Float[Tensor, "reference ..."]
    features: Int[Tensor, "*any"]
    names: tuple[str, ...]
    target: str
    scale: str
    asked: object = None
    output: int | None = None
    baseline: str = "given"
    batch: int = BATCH

    def __post_init__(self) -> None:
        if self.x.shape != self.features.shape or self.references.shape[1:] != self.x.shape:
            raise InputError(
                f"input {list(self.x.shape)}, features {list(self.features.shape)} and references "
                f"{list(self.references.shape)} do not fit together"
            )
        if not bool(torch.isfinite(self.x).all()) or not bool(torch.isfinite(self.references).all()):
            raise NotFiniteError("the input or what it is compared with holds NaN or infinity")
        always = (self.features == ALWAYS).to(self.x.device)
        object.__setattr__(self, "references", torch.where(always, self.x, self.references))
        found = self.features[self.features != ALWAYS].unique().tolist()
        if found != list(range(len(self.names))) or not found:
            raise InputError(f"features are numbered from 0 on, each with an element and a name; got {found[:9]}")

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def value(self) -> float:
        """Of the input as it is."""
        return float(self._scored(self.x[None]).double())

    @cached_property
    def at_baseline(self) -> float:
        """With every feature absent."""
        return float(self.worth(torch.zeros(1, len(self), dtype=torch.bool)))

    def worth(self, present: Bool[Tensor, "set feature"]) -> Float[Tensor, " set"]:
        """The number with only some features present, mean over the references; in double precision, on the CPU."""
        sets, references = present.shape[0], len(self.references)
        found = torch.empty(sets * references, dtype=torch.float64)
        for some in torch.arange(sets * references).split(self.batch):
            found[some] = self._scored(self.mixed(present[some // references], some % references)).double().cpu()
        return found.view(sets, references).mean(1)

    def mixed(self, present: Bool[Tensor, "set feature"], reference: Int[Tensor, " set"]) -> Float[Tensor, "set ..."]:
        """The input with only some features present."""
        with_always = torch.cat([present, torch.ones(len(present), 1, dtype=torch.bool)], 1).to(self.x.device)
        return torch.where(with_always[:, self.features], self.x, self.references[reference.to(self.x.device)])

    def shares(self, values: Float[Tensor, "*any"]) -> Float[Tensor, " feature"]:
        """Values of the elements, summed over those of each feature."""
        kept = self.features != ALWAYS
        total = torch.zeros(len(self), dtype=torch.float64)
        return total.index_add(0, self.features[kept].cpu(), values[kept].double().cpu())

    def spread(self, shares: Float[Tensor, " feature"]) -> Float[Tensor, "*any"]:
        """Shares of features, dealt out evenly to their elements."""
        each = shares / torch.bincount(self.features[self.features != ALWAYS].cpu(), minlength=len(self))
        return torch.cat([each, torch.zeros(1, dtype=each.dtype)])[self.features.cpu()]

    def points(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The input beside some references at a time: (x [point, ...], reference [point, ...])."""
        for some in self.references.split(self.batch):
            yield self.x.expand_as(some), some

    def network(self, method: str) -> NetworkScore:
        """The number as read off a network. Raises InputError for what is no network."""
        if not isinstance(self.score, NetworkScore):
            raise InputError(
                f"{method} looks inside a network, and a {type(self.asked).__name__} is none; use kernel_shap, lime, "
                "occlusion or shapley, or for trees tree_shap"
            )
        return self.score

    def to(self, model: Model) -> Question:
        """The same question to another network of the same make."""
        return replace(self, score=replace(self.network("another model"), model=model), asked=model)

    def plain(self, points: Float[Tensor, "point ..."]) -> Float[Tensor, " point"]:
        """The number of other inputs, in double precision, on the CPU."""
        return self._scored(points).double().cpu()

    def _scored(self, points: Tensor) -> Tensor:
        with torch.no_grad():
            found = self.score(points)
        if not bool(torch.isfinite(found).all()):
            raise NotFiniteError(f"{self.target} is not finite for this input with some features absent")
        return found


def all_sets(count: int) -> Bool[Tensor, "set feature"]:
    """Every set of some features; set s holds feature i where bit i of s is set."""
    return (torch.arange(2**count)[:, None] >> torch.arange(count) & 1).bool()


def grid(shape: Sequence[int], side: int) -> tuple[Int[Tensor, "*any"], tuple[str, ...]]:
    """Features of an image [channel, row, column]: square patches, all channels together."""
    rows, columns = (torch.arange(size) // side for size in shape[-2:])
    across = int(columns.max()) + 1
    numbers = (rows[:, None] * across + columns[None]).expand(*shape).contiguous()
    names = [
        f"rows {row * side}-{min(row * side + side, shape[-2]) - 1}, "
        f"columns {column * side}-{min(column * side + side, shape[-1]) - 1}"
        for row in range(int(rows.max()) + 1)
        for column in range(across)
    ]
    return numbers, tuple(names)
