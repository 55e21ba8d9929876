"""What a concept's direction does in the model: effects on the next token of erasing, exchanging or pushing it.

Every effect stands beside that of random directions or subspaces of the same size: removing or moving enough of
anything changes a model (amnesic probing: Elazar et al. 2021, arXiv:2006.00995, section 3; AlterRep: Ravfogel et al.
2021, arXiv:2105.06965; interchange: Geiger et al. 2021, arXiv:2106.02997).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vesalius.concepts.erasure import Eraser, random_eraser
from vesalius.directions import Direction, Subspace
from vesalius.errors import InputError, UnknownNameError
from vesalius.intervention import off_distribution
from vesalius.metric import wide
from vesalius.patching.tail import Tail, in_batches
from vesalius.seeds import generator_for
from vesalius.stats import Measurement, measure, rank_p
from vesalius.stats.arrays import Floats

RANDOM = 19
"""Random controls, with which p can be .05."""
Values = Float[Tensor, "example width"]
Edit = Callable[[Values], Values]
PerExample = Float[Tensor, " example"]


@dataclass(frozen=True)
class Behaviour:
    """What is measured at the last token: by default KL(as it is || edited) in nats.

    answers: token ids or classes that speak for the concept and against it; the change of the log-odds between them is
    measured, one number an example.
    """

    answers: tuple[Sequence[int], Sequence[int]] | None = None

    @property
    def unit(self) -> str:
        """Of its values."""
        return "nats"

    @property
    def name(self) -> str:
        """In words."""
        return "KL of the next token" if self.answers is None else "log-odds of the answers"

    def of(self, logits: Tensor, base: Tensor) -> PerExample:
        """[row] from logits [row, vocab] of the edited and of the recorded run."""
        new, old = (wide(one).log_softmax(-1) for one in (logits, base))
        if self.answers is None:
            return (old.exp() * (old - new)).sum(-1)
        return self.level(new) - self.level(old)

    def level(self, logits: Tensor) -> PerExample:
        """Log-odds of the answers. Raises InputError where there are none."""
        if self.answers is None:
            raise InputError("this behaviour has no answers to compare")
        both = [wide(logits)[:, list(tokens)].logsumexp(-1) for tokens in self.answers]
        return both[0] - both[1]


@dataclass(frozen=True, eq=False, repr=False)
class Effect:
    """Effects [example] of an edit, and of random ones of the same size [draw, example].

    unnatural: how far the edited values lie from natural ones (`off_distribution`).
    """

    name: str
    values: Floats
    random: Floats
    unit: str
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unnatural: Mapping[str, float] = field(default_factory=dict)

    @property
    def measurement(self) -> Measurement:
        """Mean over examples, with its interval."""
        return self.of_values(self.name, self.values)

    @property
    def over_random(self) -> Measurement:
        """The same less the mean of the random ones, example by example."""
        return self.of_values(f"{self.name}, over random ones", self.values - self.random.mean(0))

    @property
    def p(self) -> float:
        """Rank of the size of the mean effect among those of the random edits."""
        return rank_p(abs(float(self.values.mean())), np.abs(self.random.mean(1)))

    def of_values(self, name: str, values: Floats) -> Measurement:
        """A measurement of the same examples."""
        off = {"off_distribution": dict(self.unnatural)}
        return measure(name, values, groups=self.groups, clusters=tuple(self.groups), unit=self.unit, diagnostics=off)

    def __repr__(self) -> str:
        found = self.measurement
        return (
            f"Effect({self.name}: {found.estimate:.3g} [{found.low:.3g}, {found.high:.3g}] {self.unit}; random "
            f"{self.random.mean():.3g}, p {self.p:.2g})"
        )


def run_edits(tail: Tail, edits: Sequence[Edit], *behaviours: Behaviour) -> Float[Tensor, "behaviour edit example"]:
    """Behaviours under each of some edits of the values at a tail's place, one of them after the other."""
    found = torch.zeros(len(behaviours), len(edits), len(tail), dtype=torch.float64)
    natural = tail.values
    for rows in in_batches(len(tail)):
        base = tail.logits(natural[rows], rows)
        for number, edit in enumerate(edits):
            logits = tail.logits(edit(natural)[rows], rows)
            for which, behaviour in enumerate(behaviours):
                found[which, number, rows] = behaviour.of(logits, base).double().cpu()
    return found


def effect_of(
    tail: Tail,
    edit: Edit,
    controls: Sequence[Edit],
    *,
    behaviour: Behaviour,
    name: str,
    groups: Mapping[str, tuple[str, ...]] | None = None,
) -> Effect:
    """The effect of an edit beside that of its controls."""
    return _effects_of(tail, edit, controls, [behaviour], name, groups)[0]


def _effects_of(
    tail: Tail,
    edit: Edit,
    controls: Sequence[Edit],
    behaviours: Sequence[Behaviour],
    name: str,
    groups: Mapping[str, tuple[str, ...]] | None,
) -> list[Effect]:
    """Of every behaviour, from the same runs."""
    found = run_edits(tail, [edit, *controls], *behaviours).numpy()
    off = off_distribution(tail.values[:, None], edit(tail.values)[:, None], None, tail.site)
    units = [behaviour.unit for behaviour in behaviours]
    return [Effect(name, of[0], of[1:], unit, groups or {}, off) for of, unit in zip(found, units, strict=True)]


def erasure_effect(
    tail: Tail,
    eraser: Eraser,
    *,
    behaviour: Behaviour | None = None,
    random: int = RANDOM,
    seed: int = 0,
    groups: Mapping[str, tuple[str, ...]] | None = None,
) -> Effect:
    """What erasing a concept does, against projecting out random subspaces of the same rank (an amnesic test)."""
    drawn = [random_eraser(eraser, generator_for("amnesic", seed, number)) for number in range(random)]
    return effect_of(tail, eraser, drawn, behaviour=behaviour or Behaviour(), name="erasure", groups=groups)


def interchange_effect(
    tail: Tail,
    part: Direction | Subspace,
    partner: Int[Tensor, " example"],
    *,
    behaviour: Behaviour | None = None,
    random: int = RANDOM,
    seed: int = 0,
    groups: Mapping[str, tuple[str, ...]] | None = None,
) -> Effect:
    """What giving each example its partner's coordinates does, against moving it as far in random directions.

    partner: [example] number of the example whose coordinates it gets, such as one of the other label (`partners`).
    """
    edit, *controls = _exchanges(tail, part, partner, random, seed)
    return effect_of(tail, edit, controls, behaviour=behaviour or Behaviour(), name="interchange", groups=groups)


def _exchanges(
    tail: Tail, part: Direction | Subspace, partner: Int[Tensor, " example"], random: int, seed: int
) -> list[Edit]:
    """The exchange, and moves as far in random directions."""
    check_site(tail, part)
    basis = basis_of(part)
    return [exchange(basis, partner), *(moved_as_far(basis, partner, seed, number) for number in range(random))]


def push_effect(
    tail: Tail,
    direction: Direction,
    to: float,
    *,
    behaviour: Behaviour | None = None,
    random: int = RANDOM,
    seed: int = 0,
    groups: Mapping[str, tuple[str, ...]] | None = None,
) -> Effect:
    """What setting every example's coordinate to a value does (AlterRep pushes to one side of a probe's plane),
    against moving it as far in random directions."""
    check_site(tail, direction)
    vector = direction.vector

    def edit(values: Values, along: Tensor = vector) -> Values:
        own = vector.to(values)
        return values + (to - values @ own)[:, None] * along.to(values)

    others = [random_unit(len(vector), seed, number) for number in range(random)]
    controls = [lambda values, along=along: edit(values, along) for along in others]
    return effect_of(tail, edit, controls, behaviour=behaviour or Behaviour(), name="push", groups=groups)


@dataclass(frozen=True, eq=False)
class Specificity:
    """What exchanging a concept does to the answers that it should change, and to others that it should leave alone."""

    wanted: Effect
    unrelated: Mapping[str, Effect]

    def apart(self, name: str) -> Measurement:
        """How much larger the wanted change is than an unrelated one, in size, example by example.

        Raises UnknownNameError for a name that there is not.
        """
        if name not in self.unrelated:
            raise UnknownNameError("unrelated behaviour", name, self.unrelated)
        sizes = np.abs(self.wanted.values) - np.abs(self.unrelated[name].values)
        return self.wanted.of_values(f"change of the answers beyond that of {name}", sizes)


def specificity(
    tail: Tail,
    part: Direction | Subspace,
    partner: Int[Tensor, " example"],
    wanted: Behaviour,
    unrelated: Mapping[str, Behaviour],
    *,
    random: int = RANDOM,
    seed: int = 0,
    groups: Mapping[str, tuple[str, ...]] | None = None,
) -> Specificity:
    """Interchange (see `interchange_effect`), measured on the answers that it should change and on unrelated ones, such
    as {"weekdays": Behaviour(answers=([monday], [friday]))}, each beside the same random directions.

    Raises InputError for behaviours without answers: the change of everything is no answer to leave alone.
    """
    if not unrelated or any(one.answers is None for one in (wanted, *unrelated.values())):
        raise InputError("specificity compares log-odds of answers: give Behaviour(answers=...) for what should change "
                         "and for at least one thing that should not")  # fmt: skip
    edit, *controls = _exchanges(tail, part, partner, random, seed)
    first, *others = _effects_of(tail, edit, controls, [wanted, *unrelated.values()], "interchange", groups)
    return Specificity(first, dict(zip(unrelated, others, strict=True)))


def exchange(basis: Float[Tensor, "rank width"], partner: Int[Tensor, " example"]) -> Edit:
    """Coordinates in a basis are taken from the partner."""

    def edit(values: Values) -> Values:
        rows = basis.to(values)
        return values + (values[partner] - values) @ rows.T @ rows

    return edit


def moved_as_far(basis: Tensor, partner: Int[Tensor, " example"], seed: int, number: int) -> Edit:
    """As far as `exchange` moves each example, in a random direction and its opposite in turns."""
    along = random_unit(basis.shape[-1], seed, number)

    def edit(values: Values) -> Values:
        rows = basis.to(values)
        shift = (values[partner] - values) @ rows.T
        size = shift.norm(dim=1) * torch.where(shift[:, 0] < 0, -1.0, 1.0)
        return values + size[:, None] * along.to(values)

    return edit


def random_unit(width: int, seed: int, number: int) -> Float[Tensor, " width"]:
    """A unit vector, the same every time."""
    drawn = torch.randn(width, generator=generator_for("random direction of a concept", seed, number))
    return drawn / drawn.norm()


def partners(labels: Sequence[str], seed: int = 0) -> Int[Tensor, " example"]:
    """For each example one of another label, at random; each is somebody's partner about equally often.

    Raises InputError when all labels are the same.
    """
    own = np.array(labels)
    found = torch.zeros(len(own), dtype=torch.long)
    for label in dict.fromkeys(own.tolist()):
        here, there = (torch.from_numpy(np.flatnonzero(own == label)), torch.from_numpy(np.flatnonzero(own != label)))
        if not len(there):
            raise InputError(f"every example is labelled {label!r}; there is no other to take coordinates from")
        order = torch.randperm(len(there), generator=generator_for("partners", seed, str(label)))
        found[here] = there[order[torch.arange(len(here)) % len(there)]]
    return found


def basis_of(part: Direction | Subspace) -> Float[Tensor, "rank width"]:
    """Orthonormal rows."""
    return part.vector[None] if isinstance(part, Direction) else part.basis


def check_site(tail: Tail, part: Direction | Subspace) -> None:
    """Raises InputError for a part of another site."""
    if part.site != tail.site:
        raise InputError(f"{part} is at {part.site}, and this run was recorded at {tail.site}; record it there")
