"""What a direction has to do with a concept, at the last token of each text or in each row of a table: whether it
carries it, and is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vesalius.concepts.effect import Behaviour, Edit, exchange, moved_as_far, partners, run_edits
from vesalius.directions import Direction, Subspace
from vesalius.errors import InputError
from vesalius.inputs import Corpus, Inputs, Table
from vesalius.intervention import off_distribution
from vesalius.parts import Part
from vesalius.patching.plan import Cost
from vesalius.patching.tail import Tail
from vesalius.quantities.base import PROBABILITY, Parameters, PerExample, Quantity
from vesalius.quantities.matching import RANDOM, Matched, random_directions
from vesalius.quantities.pseudo_values import auroc, groups_of, scored
from vesalius.quantities.runs import Runs
from vesalius.quantities.separates import named
from vesalius.seeds import generator_for

DRAWS = 8
"""Random directions that are compared with."""


def tail_of(runs: Runs, part: Direction | Subspace) -> Tail:
    """The texts or rows, recorded where the part is, texts at their last tokens."""
    inputs: Inputs
    if isinstance(runs.data, Table):
        inputs = runs.data.inputs
    else:
        assert isinstance(runs.data, Corpus)
        inputs = runs.data.tokens

    def record() -> Tail:
        runs.cost = runs.cost + Cost(runs.n, runs.n)
        return Tail.of(runs.model, inputs, part.site)

    return runs.once(("tail", part.site), record)


class Carries(Quantity):
    """AUROC less one half of a direction's coordinate at the last token, of some texts against the others.

    Parameters: `texts`, as for `separates`, and `what` they are; of a table `label` and `value`. Per text: its
    pseudo-value. Null `shuffled`: the same with labels that were dealt out anew. Matched: random directions at the same
    site.
    """

    name = "carries"
    kind = "predictive"
    scale = PROBABILITY

    def unit(self, runs: Runs) -> str:
        return "AUROC over .5"

    def phrase(self, parameters: Parameters) -> str:
        return f"carries whether {_one(parameters)} is {_what(parameters)}"

    def refuses(self, runs: Runs, part: Part) -> str:
        return not_on_texts(runs, part)

    def measure(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample:
        return _score(runs, part, named(runs, parameters))

    def scale_of(self, runs: Runs, part: Part, parameters: Parameters) -> float | None:
        """One half: what telling them all apart would give."""
        return 0.5

    def matched(self, runs: Runs, part: Part, members: Sequence[Part], parameters: Parameters) -> Matched:
        assert isinstance(part, Direction)
        found = random_directions(part, DRAWS)
        return Matched(f"{DRAWS} random directions at {part.site}", found, {RANDOM: DRAWS})

    def control(self, runs: Runs, part: Part, parameters: Parameters, control: Mapping[str, Any]) -> PerExample | None:
        """Of each random direction the better of its two signs: it has none of its own."""
        if RANDOM not in control or not isinstance(part, Direction):
            return super().control(runs, part, parameters, control)
        some = named(runs, parameters)
        each = [_score(runs, other, some) for other in random_directions(part, int(control[RANDOM]))]
        return torch.stack([one if float(one.mean()) >= 0 else -one for one in each]).mean(0)

    def nulls(self, runs: Runs, part: Part, parameters: Parameters) -> Mapping[str, PerExample]:
        some = named(runs, parameters)
        dealt = some[torch.randperm(len(some), generator=generator_for("carries", runs.seed))]
        return {"shuffled": _score(runs, part, dealt)}


class Moves(Quantity):
    """What giving a text the coordinate of a text of the other kind does to the next token, at the last token alone.

    Parameters as for `carries`; `answers`, two lists of token ids that speak for and against: then
    the log-odds that are lost (nats), counted towards each text's own kind; without them KL(as it is || exchanged).
    Matched: as far a move in random directions. Scale: the same exchange of all the site holds there.
    """

    name = "moves"

    def unit(self, runs: Runs) -> str:
        return "nats"

    def phrase(self, parameters: Parameters) -> str:
        does = "what it answers" if parameters.get("answers") or "label" in parameters else "what comes next"
        kind = _one(parameters).removeprefix("a ")
        return f"is used: exchanging it for that of another kind of {kind} changes {does}"

    def refuses(self, runs: Runs, part: Part) -> str:
        return not_on_texts(runs, part)

    def measure(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample:
        return self._kept(runs, part, parameters)[0]

    def scale_values(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample | None:
        """What exchanging everything at the place does."""
        return self._kept(runs, part, parameters)[1]

    def matched(self, runs: Runs, part: Part, members: Sequence[Part], parameters: Parameters) -> Matched:
        _ = _direction(part)
        return Matched(f"moved as far in {DRAWS} random directions", (part,), {RANDOM: DRAWS})

    def control(self, runs: Runs, part: Part, parameters: Parameters, control: Mapping[str, Any]) -> PerExample | None:
        found: PerExample = self._kept(runs, part, parameters)[2:].mean(0)
        return found

    def diagnostics(self, runs: Runs, part: Part, parameters: Parameters) -> Mapping[str, Any]:
        """How far the exchanged values lie from natural ones."""
        tail = tail_of(runs, _direction(part))
        new = exchange(_direction(part).vector[None], _partner(runs, parameters))(tail.values)
        return {"off_distribution": off_distribution(tail.values[:, None], new[:, None], None, _direction(part).site)}

    def _kept(self, runs: Runs, part: Part, parameters: Parameters) -> Tensor:
        """[edit, example]: the exchange, that of everything, and the random moves."""
        direction, answers = _direction(part), parameters.get("answers")
        key = ("moves", part, str(answers), *(str(parameters.get(name)) for name in ("texts", "label", "value")))
        return runs.once(key, lambda: _exchanged(runs, direction, parameters))


def _exchanged(runs: Runs, part: Direction, parameters: Parameters) -> Tensor:
    tail, partner, answers = tail_of(runs, part), _partner(runs, parameters), parameters.get("answers")
    behaviour = Behaviour((answers[0], answers[1])) if answers else Behaviour()
    basis = part.vector[None]
    whole: Edit = lambda values: values[partner]  # noqa: E731
    edits = [exchange(basis, partner), whole, *(moved_as_far(basis, partner, runs.seed, n) for n in range(DRAWS))]
    found = run_edits(tail, edits, behaviour)[0]
    positions = 1 if isinstance(runs.data, Table) else max(1, tail.base.tokens.ids.shape[1])
    runs.cost = runs.cost + Cost(len(edits) * runs.n / positions, len(edits) * runs.n)
    if answers:
        # A text that speaks for the concept loses log-odds, one that speaks against it gains them.
        found = found * torch.where(named(runs, parameters), -1.0, 1.0)
    return found


def _partner(runs: Runs, parameters: Parameters) -> Int[Tensor, " example"]:
    return partners([str(bool(one)) for one in named(runs, parameters)], runs.seed)


def _direction(part: Part) -> Direction:
    """Raises InputError for another part."""
    if not isinstance(part, Direction):
        raise InputError(f"{part} is no direction, and this quantity is of vs.Direction only")
    return part


def _what(parameters: Parameters) -> str:
    named = f"{parameters['label']} {parameters['value']}" if "label" in parameters else "of the concept"
    return str(parameters.get("what", named))


def _one(parameters: Parameters) -> str:
    return "a row" if "label" in parameters else "a text"


def _score(runs: Runs, part: Part, some: Bool[Tensor, " example"]) -> PerExample:
    direction = _direction(part)
    values = tail_of(runs, direction).values.float().cpu() @ direction.vector.float().cpu()
    return scored(groups_of(runs), values, some, ~some, auroc)


def not_on_texts(runs: Runs, part: Part) -> str:
    """Why it does not apply; empty when it does."""
    if not isinstance(runs.data, Corpus | Table):
        return "it is measured on a corpus of texts or a table"
    return "" if isinstance(part, Direction) else f"{part} is no Direction"
