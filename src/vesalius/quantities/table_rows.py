"""What parts of a network do for the rows of a table: whether an answer rests on them, and which way they push it.

A part is a column that the network is given (`column_part`), a coordinate, a direction, or a subspace of any tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vesalius.concepts.effect import basis_of
from vesalius.directions import Direction, Subspace
from vesalius.errors import InputError
from vesalius.inputs import Table
from vesalius.intervention import derangement, off_distribution
from vesalius.metric import wide
from vesalius.parts import Part
from vesalius.patching.plan import Cost
from vesalius.patching.tail import Tail, in_batches
from vesalius.quantities.base import PROBABILITY, Parameters, PerExample, Quantity
from vesalius.quantities.concept import tail_of
from vesalius.quantities.matching import RANDOM, Matched, random_directions
from vesalius.quantities.runs import Runs
from vesalius.seeds import generator_for
from vesalius.site import Site

PARTNERS = 4
"""Other rows whose values each row is given, one after the other."""
DRAWS = 8
"""Other coordinates, or random subspaces, that a part is compared with."""
DEALS = 16
"""Times that targets are dealt out anew for the null of `helps`."""
COORDINATES = "other coordinates"
COLUMNS = Site("module", module="", side="in")
"""What a network is given."""
Values = Float[Tensor, "row width"]
Edit = Callable[[Values], Values]


def coordinate(site: Site | str, number: int, width: int, label: str = "") -> Direction:
    """One coordinate of a tensor [row, width] as a part: a term, a concept, a unit. Raises InputError past its end."""
    where = Site.parse(site)
    if not 0 <= number < width:
        raise InputError(f"{where} has {width} coordinates, numbered from 0; got {number}")
    return Direction(where, torch.eye(width)[number], label or f"{number}")


def column_part(table: Table, *names: str, label: str = "") -> Direction | Subspace:
    """One column of what a network is given, or several together. Raises UnknownNameError for one that is not there."""
    numbers = [table.column(name) for name in names]
    if len(numbers) == 1:
        return coordinate(COLUMNS, numbers[0], len(table.columns), label or names[0])
    return Subspace(COLUMNS, torch.eye(len(table.columns))[numbers], label or ", ".join(names))


class _OfRows(Quantity):
    """Common to all: where they apply, and what a part is compared with."""

    def refuses(self, runs: Runs, part: Part) -> str:
        if not isinstance(runs.data, Table):
            return "it is measured on a vs.Table"
        return "" if isinstance(part, Direction | Subspace) else f"{part} is no Direction or Subspace"

    def matched(self, runs: Runs, part: Part, members: Sequence[Part], parameters: Parameters) -> Matched:
        """Of a coordinate, or several, as many others of the same tensor; else random subspaces of the same rank."""
        known = _part(part)
        if others := other_coordinates(known):
            count = "other coordinates" if len(basis_of(known)) == 1 else f"times {len(basis_of(known))} others"
            return Matched(f"{len(others)} {count} of {known.site}", others, {COORDINATES: len(others)})
        return Matched(f"{DRAWS} random subspaces of rank {len(basis_of(known))}", (part,), {RANDOM: DRAWS})

    def control(self, runs: Runs, part: Part, parameters: Parameters, control: Mapping[str, Any]) -> PerExample | None:
        if not control:
            return None
        others: Sequence[Part] = other_coordinates(_part(part)) if COORDINATES in control else random_parts(_part(part))
        return torch.stack([self.measure(runs, other, parameters) for other in others]).mean(0)


class Helps(_OfRows):
    """What the answer loses when a part has the values of other rows: loss then, less loss as it is.

    Loss: minus the log-probability of a row's class (nats), or the squared error of a number. Averaged over 4 rows each
    (a permutation importance of Breiman 2001, Machine Learning 45:5, section 10, without retraining and of any part).
    Parameters: none. Null `shuffled`: the same with targets that were dealt out anew. Scale: the same of everything
    that is there.
    """

    name = "helps"

    def unit(self, runs: Runs) -> str:
        return "nats" if _table(runs).classes else "squared error"

    def phrase(self, parameters: Parameters) -> str:
        return "helps to be right: with the values of other rows, the answer is worse"

    def measure(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample:
        return _loss_of(runs, _part(part), _table(runs).target)

    def scale_values(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample | None:
        return _loss_of(runs, whole_of(runs, _part(part)), _table(runs).target)

    def nulls(self, runs: Runs, part: Part, parameters: Parameters) -> Mapping[str, PerExample]:
        target, generator = _table(runs).target, generator_for("helps", runs.seed)
        # Averaged over several: what one deal does to a row says little.
        dealt = [target[torch.randperm(len(target), generator=generator)] for _ in range(DEALS)]
        return {"shuffled": torch.stack([_loss_of(runs, _part(part), one) for one in dealt]).mean(0)}

    def diagnostics(self, runs: Runs, part: Part, parameters: Parameters) -> Mapping[str, Any]:
        tail = tail_of(runs, _part(part))
        new = exchanged(_part(part), _others(runs, 0))(tail.values)
        return {"off_distribution": off_distribution(tail.values[:, None], new[:, None], None, tail.site)}


class Raises(_OfRows):
    """What raising a part from one value to another, everything else as it is, adds to the log-odds of a class.

    Parameters: `low` and `high`, its two values (use quantiles of discovery); `class`, the class; without classes the
    number that is predicted is what rises. Scale: what the same does for the row that it moves most.
    """

    name = "raises"
    scale = "largest on discovery"

    def unit(self, runs: Runs) -> str:
        return "log-odds" if _table(runs).classes else "units of the target"

    def phrase(self, parameters: Parameters) -> str:
        what = f" for {parameters['class']}" if "class" in parameters else ""
        odds = f"the odds{what}" if what else "what is predicted"
        return f"pushes {odds} when it goes from {parameters['low']:.3g} to {parameters['high']:.3g}"

    def refuses(self, runs: Runs, part: Part) -> str:
        known = super().refuses(runs, part)
        return known or ("" if isinstance(part, Direction) else f"{part} has several numbers")

    def measure(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample:
        direction, table = _part(part), _table(runs)
        assert isinstance(direction, Direction)
        tail = tail_of(runs, direction)
        low, high = (outputs(runs, tail, set_to(direction, float(parameters[end]))) for end in ("low", "high"))
        if not table.classes:
            return high - low
        odds = [_log_odds(one, _class(table, parameters)) for one in (low, high)]
        return odds[1] - odds[0]

    def scale_of(self, runs: Runs, part: Part, parameters: Parameters) -> float | None:
        return float(self.measure(runs, part, parameters).abs().max())


class Repairs(_OfRows):
    """How many more rows are right when a part is held at a constant than as it is: a share, negative when it hurts.

    Parameters: `value`, what it is held at: a list, one number a dimension (use the mean on discovery). `along`, of a
    direction: the vector that its change is written along, where that is another one than it is read by (an erasure
    that takes along what goes with it, such as LEACE's).
    """

    name = "repairs"
    scale = PROBABILITY

    def unit(self, runs: Runs) -> str:
        return "share of rows"

    def phrase(self, parameters: Parameters) -> str:
        return "misleads: held at a constant, more rows are right"

    def measure(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample:
        known, table = _part(part), _table(runs)
        tail = tail_of(runs, known)
        value = torch.tensor([float(one) for one in parameters["value"]])
        held = outputs(runs, tail, held_at(known, value, parameters.get("along")))
        return (right(held, table) - right(outputs(runs, tail, lambda x: x), table)).double()

    def control(self, runs: Runs, part: Part, parameters: Parameters, control: Mapping[str, Any]) -> PerExample | None:
        """Others are held at their own means of these rows."""
        if not control:
            return None
        others = other_coordinates(_part(part)) if COORDINATES in control else random_parts(_part(part))
        means = [(tail_of(runs, one).values @ basis_of(one).T.to(tail_of(runs, one).values)).mean(0) for one in others]
        each = [
            self.measure(runs, one, {**parameters, "value": mean.tolist()})
            for one, mean in zip(others, means, strict=True)
        ]
        return torch.stack(each).mean(0)

    def scale_of(self, runs: Runs, part: Part, parameters: Parameters) -> float | None:
        return 1.0


def outputs(runs: Runs, tail: Tail, edit: Edit) -> Tensor:
    """Logits [row, class] with edited values, in float64; the number [row] where the target is one."""
    natural = tail.values
    new = edit(natural)
    found = torch.cat([wide(tail.logits(new[rows], rows)).double().cpu() for rows in in_batches(len(tail), 512)])
    runs.cost = runs.cost + Cost(runs.n, runs.n)
    return found if _table(runs).classes else found.reshape(len(found), -1)[:, 0]


def loss(output: Tensor, target: Tensor, classes: bool) -> PerExample:
    """Minus the log-probability of each row's class, or the squared error."""
    if not classes:
        return (output - target.double()) ** 2
    return -output.log_softmax(-1).gather(1, target[:, None])[:, 0]


def right(output: Tensor, table: Table) -> Float[Tensor, " row"]:
    """1 for each row whose likeliest class is its own. Raises InputError where there are no classes."""
    return (output.argmax(-1) == table.numbers).double()


def exchanged(part: Direction | Subspace, partner: Int[Tensor, " row"]) -> Edit:
    """The part's coordinates are those of another row."""
    basis = basis_of(part)
    return lambda values: values + (values[partner] - values) @ basis.T.to(values) @ basis.to(values)


def held_at(part: Direction | Subspace, value: Float[Tensor, " rank"], along: Sequence[float] | None = None) -> Edit:
    """The part's coordinates are these numbers in every row; along: the vector, or vectors, that are moved along."""
    basis = basis_of(part)
    writes = basis if along is None else torch.tensor(along).reshape(basis.shape)
    if value.shape != basis.shape[:1]:
        raise InputError(f"{part} has {len(basis)} coordinates; got {len(value)} values to hold it at")
    return lambda values: values + (value.to(values) - values @ basis.T.to(values)) @ writes.to(values)


def set_to(part: Direction, value: float) -> Edit:
    """The part's coordinate is this number in every row."""
    return held_at(part, torch.tensor([value]))


def other_coordinates(part: Direction | Subspace) -> tuple[Direction | Subspace, ...]:
    """Of a part that is one coordinate or several, up to 8 times as many others of the same tensor; the same every
    time. Empty for other directions, and where there are too few others."""
    # Making a basis orthonormal may turn a vector round.
    basis = basis_of(part).abs()
    if not bool(((basis == 0) | (basis == 1)).all()):
        return ()
    rank, width = basis.shape
    free = (basis.sum(0) == 0).nonzero()[:, 0]
    if len(free) < rank:
        return ()
    made: list[Direction | Subspace] = []
    for number in range(min(DRAWS, len(free)) if rank == 1 else DRAWS):
        order = torch.randperm(
            len(free), generator=generator_for("other coordinates", rank, 0 if rank == 1 else number)
        )
        some = free[order[number : number + 1]] if rank == 1 else free[order[:rank]]
        rows = torch.eye(width)[some]
        label = f"coordinates {some.tolist()}"
        made.append(Direction(part.site, rows[0], label) if rank == 1 else Subspace(part.site, rows, label))
    return tuple(made)


def random_parts(part: Direction | Subspace) -> tuple[Direction | Subspace, ...]:
    """Random directions, or subspaces of the same rank, at the same site; the same every time."""
    if isinstance(part, Direction):
        return random_directions(part, DRAWS)
    shape = part.basis.shape
    drawn = [torch.randn(shape, generator=generator_for("random subspace", number)) for number in range(DRAWS)]
    return tuple(replace(part, basis=one, label=f"random {number}") for number, one in enumerate(drawn))


def whole_of(runs: Runs, part: Direction | Subspace) -> Subspace:
    """Everything at a part's site."""
    width = tail_of(runs, part).values.shape[1]
    return Subspace(part.site, torch.eye(width), "everything")


def _loss_of(runs: Runs, part: Direction | Subspace, target: Tensor) -> PerExample:
    tail, classes = tail_of(runs, part), bool(_table(runs).classes)

    def logits() -> list[Tensor]:
        return [outputs(runs, tail, exchanged(part, _others(runs, draw))) for draw in range(PARTNERS)]

    base = runs.once(("as it is", part.site), lambda: outputs(runs, tail, lambda values: values))
    found = runs.once(("exchanged", part), logits)
    return torch.stack([loss(one, target, classes) for one in found]).mean(0) - loss(base, target, classes)


def _others(runs: Runs, draw: int) -> Int[Tensor, " row"]:
    return derangement(runs.n, 1000 * runs.seed + draw)


def _log_odds(logits: Float[Tensor, "row class"], number: int) -> PerExample:
    others = [other for other in range(logits.shape[1]) if other != number]
    return logits[:, number] - logits[:, others].logsumexp(-1)


def _class(table: Table, parameters: Parameters) -> int:
    name = str(parameters["class"])
    if name not in table.classes:
        raise InputError(f"there is no class {name!r}; there are {list(table.classes)}")
    return table.classes.index(name)


def _table(runs: Runs) -> Table:
    """Raises InputError for other data."""
    if not isinstance(runs.data, Table):
        raise InputError(f"this is measured on a vs.Table; got {runs.data!r}")
    return runs.data


def _part(part: Part) -> Direction | Subspace:
    """Raises InputError for another part."""
    if not isinstance(part, Direction | Subspace):
        raise InputError(f"{part} is no coordinate, direction or subspace of one tensor")
    return part
