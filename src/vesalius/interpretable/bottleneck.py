"""Concept bottleneck models: a row's concepts first, and from nothing else the answer (Koh et al. 2020, ICML).

    joint         concepts and answer are fitted together
    sequential    concepts first; the answer is then fitted to the concepts as they are predicted
    independent   the answer is fitted to the true concepts

What a unit says can be corrected by hand (`intervened`): a model whose answer rests on its concepts gets better with
every concept that is put right. Concepts as probabilities can carry more than they say; `leakage` measures how much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vesalius.directions import Direction
from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Table
from vesalius.interpretable.fitted import Fitted, fitted, score_of
from vesalius.interpretable.fitting import Standardise, check_table, outputs_of, seeded, table_loss, train
from vesalius.intervention import Patch
from vesalius.quantities import coordinate
from vesalius.seeds import generator_for
from vesalius.site import Site
from vesalius.stats import Measurement, measure

CONCEPTS = Site("module", module="concepts")
HOW = ("joint", "sequential", "independent")
SIDE = "random side channel"


class Bottleneck(nn.Module):
    """encoder: [row, column] to concept logits; `concepts` their probabilities; head: from those to the answer."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.concepts = nn.Sigmoid()
        self.head = head

    def forward(self, values: Float[Tensor, "row column"]) -> Float[Tensor, "row output"]:
        """Logits, or the number that is predicted."""
        found: Tensor = self.head(self.concepts(self.encoder(values)))
        return found


def perceptron(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers = [layer for own, after in pairwise(widths) for layer in (nn.ReLU(), nn.Linear(own, after))]
    return nn.Sequential(*layers[1:])


def fit_bottleneck(
    table: Table,
    concepts: Mapping[str, str],
    *,
    how: str = "sequential",
    hidden: int = 32,
    head: Sequence[int] = (),
    weight: float = 1.0,
    steps: int = 500,
    seed: int = 0,
) -> Fitted:
    """A concept bottleneck model of a table.

    concepts: name of a label of the table -> its value for which the concept is there, {"size": "large"}. how: one of
    `HOW`. hidden: width of the encoder; head: hidden widths between concepts and answer (none: a linear one, whose
    weights can be read). weight: of the concepts' loss in a joint fit. Raises InputError as `check_table` and for a
    concept that every row has, or none; UnknownNameError for another way to fit.
    """
    if how not in HOW:
        raise UnknownNameError("way to fit a bottleneck", how, HOW)
    check_table(table)
    truth = concepts_of(table, concepts)
    values, loss = table.values.float(), table_loss(table)
    widths = (len(concepts), *head, outputs_of(table))

    def make() -> nn.Module:
        body = perceptron((len(table.columns), hidden, len(concepts)))
        return Bottleneck(nn.Sequential(Standardise(values), *body), perceptron(widths))

    net = seeded(make, seed)
    assert isinstance(net, Bottleneck)
    read: Callable[[Tensor], Tensor] = lambda logits: nn.functional.binary_cross_entropy_with_logits(logits, truth)  # noqa: E731
    if how == "joint":
        both = _Both(net)
        train(
            both,
            values,
            lambda found: loss(found[:, : widths[-1]]) + weight * read(found[:, widths[-1] :]),
            steps=steps,
        )
    else:
        train(net.encoder, values, read, steps=steps)
        seen = truth if how == "independent" else net.concepts(net.encoder(values))
        train(net.head, seen, loss, steps=steps)
    parts = tuple(coordinate(CONCEPTS, number, len(concepts), name) for number, name in enumerate(concepts))
    return fitted(table, net, f"{how} concept bottleneck", parts, len(concepts) * widths[-1])


class _Both(nn.Module):
    """Answer and concept logits side by side, to be fitted together."""

    def __init__(self, net: Bottleneck) -> None:
        super().__init__()
        self.net = net

    def forward(self, values: Tensor) -> Tensor:
        logits = self.net.encoder(values)
        return torch.cat([self.net.head(self.net.concepts(logits)), logits], 1)


def concepts_of(table: Table, concepts: Mapping[str, str]) -> Float[Tensor, "row concept"]:
    """1 where a row has a concept. Raises InputError for one that every row has, or none."""
    if not concepts:
        raise InputError('no concepts; give labels of the table and their values, such as {"size": "large"}')
    found = torch.tensor([[one == value for one in table.label(name)] for name, value in concepts.items()]).T.float()
    for number, (name, value) in enumerate(concepts.items()):
        if not 0 < float(found[:, number].mean()) < 1:
            raise InputError(
                f"{int(found[:, number].sum())} of {len(found)} rows have {name} {value!r}; nothing to learn"
            )
    return found


@dataclass(frozen=True)
class Curve:
    """Scores when the first 0, 1, 2, ... concepts of `order` are put right by hand."""

    order: tuple[str, ...]
    scores: tuple[Measurement, ...]


def intervened(found: Fitted, table: Table, concepts: Mapping[str, str], order: Sequence[str] = ()) -> Curve:
    """How much better a bottleneck model is when a person puts its concepts right, one after the other.

    order: of the concepts; default as they were given. Raises InputError for a model without these concepts.
    """
    truth = concepts_of(table, concepts)
    parts = {part.label: part for part in found.parts if isinstance(part, Direction) and part.site == CONCEPTS}
    names = tuple(order) or tuple(concepts)
    missing = [name for name in (*names, *concepts) if name not in parts]
    if missing:
        raise UnknownNameError("concept of this model", missing[0], parts)
    values = table.values.float()
    units, scores = found.model.run(values, capture=CONCEPTS)[CONCEPTS].clone(), []
    for count in range(len(names) + 1):
        for name in names[max(0, count - 1) : count]:
            units = parts[name].write(units, truth[:, list(concepts).index(name)])
        output = found.model.run(values, interventions=[Patch(CONCEPTS, source=units)]).logits.double()
        scores.append(score_of(output, table, f"{count} concepts put right"))
    return Curve(names, tuple(scores))


@dataclass(frozen=True)
class Leakage:
    """What passes a bottleneck beside its concepts, as scores on fresh rows.

    soft, hard: the model as it is, and with each concept rounded to yes or no. ceiling: what the true concepts allow, a
    model that was fitted to them and is given them. side: the model fitted anew with units beside its concepts that
    stand for labels drawn at random. beyond, gained: row by row, soft over the ceiling, and side over soft.
    """

    soft: Measurement
    hard: Measurement
    ceiling: Measurement
    side: Measurement
    beyond: Measurement
    gained: Measurement

    @property
    def leaks(self) -> bool:
        """Whether it is better than its concepts allow, or better with units that stand for nothing."""
        return any(one.low is not None and one.low > 0 for one in (self.beyond, self.gained))


def leakage(
    train_on: Table, test: Table, concepts: Mapping[str, str], *, how: str = "joint", head: Sequence[int] = (32,),
    side: int = 4, weight: float = 1.0, steps: int = 500, seed: int = 0,
) -> Leakage:  # fmt: skip
    """Whether a bottleneck's concepts carry more than they say (Margeloiu et al. 2021, arXiv:2105.04289; Mahinpei et
    al. 2021, arXiv:2106.13314).

    side: units of the side channel. Raises as `fit_bottleneck`.
    """
    given: dict[str, Any] = {"head": head, "weight": weight, "steps": steps, "seed": seed}
    found = fit_bottleneck(train_on, concepts, how=how, **given)
    honest = fit_bottleneck(train_on, concepts, how="independent", **given)
    units = found.model.run(test.values.float(), capture=CONCEPTS)[CONCEPTS]
    soft = found.score(test)
    hard = _given(found, test, (units > 0.5).float(), "concepts rounded")
    ceiling = _given(honest, test, concepts_of(test, concepts), "true concepts")
    names = [f"{SIDE} {number}" for number in range(side)]
    more, fresh = (
        replace(rows, labels={**rows.labels, **{name: _coin(len(rows), seed, name) for name in names}})
        for rows in (train_on, test)
    )
    beside = fit_bottleneck(more, {**concepts, **dict.fromkeys(names, "1")}, how=how, **given).score(fresh)
    return Leakage(soft, hard, ceiling, beside, _over(soft, ceiling, test), _over(beside, soft, test))


def _given(found: Fitted, table: Table, units: Tensor, name: str) -> Measurement:
    """The score with these concepts."""
    run = found.model.run(table.values.float(), interventions=[Patch(CONCEPTS, source=units)])
    return score_of(run.logits.double(), table, name)


def _over(one: Measurement, other: Measurement, table: Table) -> Measurement:
    """How much better one is than the other, row by row."""
    apart = [own - than for own, than in zip(one.values, other.values, strict=True)]
    return measure(f"{one.name} over {other.name}", apart, groups=table.groups, clusters=table.clusters)


def _coin(count: int, seed: int, name: str) -> tuple[str, ...]:
    drawn = torch.randint(0, 2, (count,), generator=generator_for(name, seed, count))
    return tuple(map(str, drawn.tolist()))
