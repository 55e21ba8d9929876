"""Total effect: what giving a part its corrupted value (or its clean one) does to the metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from vesalius.parts import Part
from vesalius.quantities.base import Parameters, PerExample, Quantity, condition, control_parts, unnatural
from vesalius.quantities.runs import DIRECTIONS, Runs
from vesalius.stats import clustered_t

# A mean elsewhere counts as a sign only when it stands out of its noise: two clustered standard errors.
SIGN_ERRORS = 2.0


class TotalEffect(Quantity):
    """Effect of patching a part alone, by `corruption` and `direction` (default the main one, noising)."""

    name = "total_effect"
    condition = MappingProxyType({"direction": "noising", "effect": "total"})

    def measure(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample:
        return runs.effects([part], *condition(runs, parameters))[0]

    def prepare(self, runs: Runs, wanted: Sequence[tuple[Part, Parameters]]) -> None:
        """Parts of one condition in one sweep, and the same parts under the other conditions."""
        by_condition: dict[tuple[str, str], list[Part]] = {}
        for part, parameters in wanted:
            here = condition(runs, parameters)
            by_condition.setdefault(here, []).extend([part, *control_parts(parameters.get("control", {}), part)])
            for other in _others(runs, parameters):
                by_condition.setdefault(other, []).append(part)
        for (corruption, direction), parts in by_condition.items():
            runs.effects(list(dict.fromkeys(parts)), corruption, direction)

    def nulls(self, runs: Runs, part: Part, parameters: Parameters) -> Mapping[str, PerExample]:
        return {"shuffled labels": runs.shuffled_effects([part], *condition(runs, parameters))[0]}

    def diagnostics(self, runs: Runs, part: Part, parameters: Parameters) -> Mapping[str, Any]:
        """The same effect under other conditions, where it stands out, and how unnatural the patched values are."""
        found = {}
        for corruption, direction in _others(runs, parameters):
            values = runs.effects([part], corruption, direction)[0].double().numpy()
            test = clustered_t(values, *(runs.groups[kind] for kind in runs.clusters))
            if abs(test.estimate) > SIGN_ERRORS * test.se:
                found[f"{corruption}, {direction}"] = test.estimate
        return {"other_conditions": found, **unnatural(runs, part, parameters)}


def _others(runs: Runs, parameters: Parameters) -> list[tuple[str, str]]:
    """Every other corruption and direction that the data have."""
    here = condition(runs, parameters)
    return [other for c in runs.corruptions for d in DIRECTIONS if (other := (c, d)) != here]
