"""Attends: how much of a head's attention goes from one named place of the prompt to another."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vesalius.errors import PairsError, UnknownNameError
from vesalius.parts import Part
from vesalius.quantities.base import PROBABILITY, Parameters, PerExample, Quantity, head, not_a_head
from vesalius.quantities.places import in_words, positions
from vesalius.quantities.runs import Runs

# Attention to the place before is averaged from here on: earlier queries have too few keys to choose from.
FIRST_QUERY = 3
_BACK = {"previous": 1, "two back": 2}


class Attends(Quantity):
    """Attention mass of a head from place `query` to place `key`, per clean prompt.

    query "every" with key "previous" or "two back": mean over the queries from position 3 to the end. key "others":
    mean over all positions but the first that the query can see. elsewhere: a place that the null of the same name
    measures. Raises PairsError where a prompt lacks a place.
    """

    name = "attends"
    kind = "predictive"
    scale = PROBABILITY
    condition = MappingProxyType({"prompts": "clean"})

    def unit(self, runs: Runs) -> str:
        return "attention"

    def phrase(self, parameters: Parameters) -> str:
        return f"attends from {in_words(str(parameters['query']))} to {in_words(str(parameters['key']))}"

    def refuses(self, runs: Runs, part: Part) -> str:
        return not_a_head(part) or runs.run("clean").reason

    def measure(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample:
        _ = head(part)
        query, key = str(parameters["query"]), str(parameters["key"])
        if query == "every":
            return _relative(runs, part, key)
        at = positions(runs, query)
        seen = _from(runs, part, at)
        if key == "others":
            return (1 - seen[:, 0]) / at.clamp_min(1)
        # A key behind the query gets no attention: what causal attention says.
        return seen.gather(1, positions(runs, key)[:, None])[:, 0]

    def nulls(self, runs: Runs, part: Part, parameters: Parameters) -> Mapping[str, PerExample]:
        if "elsewhere" not in parameters:
            return {}
        return {"elsewhere": self.measure(runs, part, {**parameters, "key": parameters["elsewhere"]})}


def _from(runs: Runs, part: Part, at: Int[Tensor, " example"]) -> Float[Tensor, "example key_pos"]:
    return runs.pattern(part)[torch.arange(runs.n), at]


def _relative(runs: Runs, part: Part, key: str) -> PerExample:
    if key not in _BACK:
        raise UnknownNameError("relative place", key, _BACK)
    end = runs.named_positions["end"]
    if bool((end < FIRST_QUERY).any()):
        raise PairsError(f"a prompt ends before position {FIRST_QUERY}: too short for attention to {key!r}")
    mass = runs.pattern(part).diagonal(-_BACK[key], 1, 2)
    query = torch.arange(mass.shape[1])[None] + _BACK[key]
    counted = (query >= FIRST_QUERY) & (query <= end[:, None])
    return (mass * counted).sum(1) / counted.sum(1)
