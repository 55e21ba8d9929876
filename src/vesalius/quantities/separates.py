"""Separates: how well a part's largest activation in a text tells some texts from the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from vesalius.errors import InputError
from vesalius.inputs import Corpus, Table
from vesalius.parts import Part
from vesalius.quantities.activation import ACTIVATION
from vesalius.quantities.base import PROBABILITY, Parameters, PerExample, Quantity
from vesalius.quantities.pseudo_values import auroc, groups_of, scored
from vesalius.quantities.runs import Runs
from vesalius.seeds import generator_for

DIGITS = 16
"""Of a text's hash, enough to name it."""


class Separates(Quantity):
    """AUROC less one half: how much likelier than a coin it is that the part is larger in one of these texts.

    Parameters: `texts`, the first 16 digits of the hashes of the texts that it should fire on (those of a corpus,
    `example_hashes`; others of the claim may be missing here), and `what` they are about, in words. Per text: its
    pseudo-value. Null `shuffled`: the same with labels that were dealt out anew.
    """

    name = "separates"
    kind = "predictive"
    scale = PROBABILITY

    def unit(self, runs: Runs) -> str:
        return "AUROC over .5"

    def phrase(self, parameters: Parameters) -> str:
        return f"tells texts about {parameters.get('what', 'something')} from others by its largest activation"

    def measure(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample:
        return self._score(runs, part, named(runs, parameters))

    def prepare(self, runs: Runs, wanted: Sequence[tuple[Part, Parameters]]) -> None:
        """All parts in one pass over the texts."""
        ACTIVATION.prepare(runs, [(part, {**given, "at": "max"}) for part, given in wanted])

    def scale_of(self, runs: Runs, part: Part, parameters: Parameters) -> float | None:
        """One half: what telling them all apart would give."""
        return 0.5

    def nulls(self, runs: Runs, part: Part, parameters: Parameters) -> Mapping[str, PerExample]:
        some = named(runs, parameters)
        dealt = some[torch.randperm(len(some), generator=generator_for("separates", runs.seed))]
        return {"shuffled": self._score(runs, part, dealt)}

    def _score(self, runs: Runs, part: Part, some: Bool[Tensor, " example"]) -> PerExample:
        return scored(groups_of(runs), ACTIVATION.measure(runs, part, {"at": "max"}), some, ~some, auroc)


def named(runs: Runs, parameters: Parameters) -> Bool[Tensor, " example"]:
    """Which of the texts are named; of a table, which rows have the `value` of a `label`. Raises InputError when all
    are, or none."""
    if isinstance(runs.data, Table):
        return _with_value(runs.data, str(parameters["label"]), str(parameters["value"]))
    if not isinstance(runs.data, Corpus):
        raise InputError(f"texts are told apart in a corpus; got {runs.data!r}")
    known = {str(digest)[:DIGITS] for digest in parameters["texts"]}
    found = torch.tensor([digest[:DIGITS] in known for digest in runs.data.example_hashes], dtype=torch.bool)
    if not bool(found.any()) or bool(found.all()):
        raise InputError(f"{int(found.sum())} of {len(found)} texts are among those named; both kinds are needed")
    return found


def _with_value(table: Table, label: str, value: str) -> Bool[Tensor, " example"]:
    found = torch.tensor([one == value for one in table.label(label)], dtype=torch.bool)
    if not bool(found.any()) or bool(found.all()):
        raise InputError(f"{int(found.sum())} of {len(found)} rows have {label} {value!r}; both kinds are needed")
    return found
