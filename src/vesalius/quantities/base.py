"""What a quantity is: one thing that can be measured about a part, per example, with its control and its nulls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.directions import Direction
from vesalius.errors import InputError
from vesalius.intervention import off_distribution
from vesalius.parts import Part, as_part
from vesalius.quantities.contrast import Contrast
from vesalius.quantities.matching import RANDOM, Matched, matched_controls, random_directions
from vesalius.quantities.runs import Runs
from vesalius.refs import resolve
from vesalius.site import Site

Parameters = Mapping[str, Any]
PerExample = Float[Tensor, " example"]
TOTAL_EFFECT, PROBABILITY, DEVIATION = "total effect", "probability", "standard deviation"
"""Scales: what the smallest value worth claiming is measured in."""


class Quantity(ABC):
    """Something that is measured about a part of a model, on a contrast or a corpus.

    Values are raw, one per example, and oriented so that positive helps the answer, or is more of what the name says.
    A class of your own and an entry in `QUANTITIES` are all that it takes for a quantity to be predicted, claimed and
    checked.
    """

    name: str
    kind: str = "causal"
    """Of claims about it: "predictive" for what is only read, "causal" for what an edit does."""
    scale: str = TOTAL_EFFECT
    condition: Mapping[str, str] = MappingProxyType({})
    """The words of a claim's condition beside the corruption, with their usual values."""

    def unit(self, runs: Runs) -> str:
        """Of its values; the metric's unless it says otherwise."""
        return runs.contrast.metric.unit

    def phrase(self, parameters: Parameters) -> str:
        """What a claim about it says a part does, where nobody found better words."""
        name = self.name.replace("_", " ")
        given = ", ".join(f"{key} {value}" for key, value in parameters.items())
        return f"has {'an' if name[0] in 'aeiou' else 'a'} {name}{f' ({given})' if given else ''}"

    def refuses(self, runs: Runs, part: Part) -> str:
        """Why it does not apply to a part of this model, in words; empty when it does."""
        return ""

    def condition_on(self, runs: Runs) -> dict[str, str]:
        """The usual condition of a claim that is made on these runs."""
        return {**({"corruption": runs.main} if isinstance(runs.data, Contrast) else {}), **self.condition}

    @abstractmethod
    def measure(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample:
        """Per example. Raises InputError where it does not apply, PairsError when the prompts lack what it needs."""

    def prepare(self, runs: Runs, wanted: Sequence[tuple[Part, Parameters]]) -> None:
        """Measure for many parts what costs less together; `measure` then finds it in the runs."""
        return

    def scale_of(self, runs: Runs, part: Part, parameters: Parameters) -> float | None:
        """The scale's value on these runs: the total effect, a mean over groups; None where there is none."""
        values = self.scale_values(runs, part, parameters)
        return None if values is None else runs.mean(values)

    def scale_values(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample | None:
        """What the scale is the mean of, per example; None where it is no mean, or there is none."""
        return runs.total(runs.main) if self.scale == TOTAL_EFFECT else None

    def matched(self, runs: Runs, part: Part, members: Sequence[Part], parameters: Parameters) -> Matched:
        """Parts like this one that are not members: what the quantity is compared with."""
        return matched_controls(runs, part, members)

    def control(self, runs: Runs, part: Part, parameters: Parameters, control: Mapping[str, Any]) -> PerExample | None:
        """The same of the control that a claim names ({"parts": [...]}), averaged over its parts; None without any."""
        each = [self.measure(runs, other, parameters) for other in control_parts(control, part)]
        return torch.stack(each).mean(0) if each else None

    def nulls(self, runs: Runs, part: Part, parameters: Parameters) -> Mapping[str, PerExample]:
        """Per example, by name: what the quantity would be if the statement were not about this."""
        return {}

    def diagnostics(self, runs: Runs, part: Part, parameters: Parameters) -> Mapping[str, Any]:
        """JSON data beside the values: how unnatural the edit was, the same effect under other conditions."""
        return {}


def control_parts(control: Mapping[str, Any], part: Part) -> list[Part]:
    """The parts that a claim's control names, by name or by reference, or says how to make."""
    if RANDOM in control and isinstance(part, Direction):
        return [*random_directions(part, int(control[RANDOM]))]
    return [as_part(one) if isinstance(one, str) else resolve(one, part) for one in control.get("parts", ())]


def condition(runs: Runs, parameters: Parameters) -> tuple[str, str]:
    """Corruption and direction that the parameters name, by default the main corruption, noising."""
    return str(parameters.get("corruption", runs.main)), str(parameters.get("direction", "noising"))


def head(part: Part) -> Site:
    """The site of a part that must be one attention head. Raises InputError."""
    site = part.writes[0]
    if site.kind != "z" or site.layer is None or site.index is None:
        raise InputError(f"{part} is not an attention head; give one as layers.<layer>.z[<head>]")
    return site


def not_a_head(part: Part) -> str:
    """Why a part is no head; empty when it is one."""
    return "" if part.writes[0].kind == "z" and part.writes[0].index is not None else f"{part} is no attention head"


def unnatural(runs: Runs, part: Part, parameters: Parameters) -> dict[str, Any]:
    """How far patched values lie from the natural ones of the same part, up to the read position."""
    corruption, direction = condition(runs, parameters)
    site, (base, _) = part.writes[0], runs.source(corruption, direction, [part])
    other = runs.run(corruption if direction == "noising" else "clean")
    before, after = base[site.whole], part.written(base, part.value(other))[site.whole]
    before, after = before[: runs.n], after[: runs.n]
    read = torch.arange(before.shape[1])[None] <= runs.pairs.at[:, None]
    return {"off_distribution": off_distribution(before, after, read, site)}
