"""Checks: the named measurements that turn a claim's prediction into per-example numbers, its control and its nulls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vesalius.bench import DIRECTIONS, Bench
from vesalius.circuits.effects import clusters
from vesalius.describe.measures import UNITS, Parameters, component_of, condition, figure
from vesalius.errors import InputError, UnknownNameError
from vesalius.intervention import off_distribution
from vesalius.stats import clustered_t

Control = Mapping[str, Any]
# A mean elsewhere counts as a sign only when it stands out of its noise: two clustered standard errors.
SIGN_ERRORS = 2.0


@dataclass(frozen=True)
class Measures:
    """What a check measured. effects, control, nulls: [example], raw (before the claim's sign)."""

    effects: Tensor
    control: Tensor | None = None
    nulls: Mapping[str, Tensor] = field(default_factory=dict)
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)


def _no_nulls(_bench: Bench, _parameters: Parameters) -> Mapping[str, Tensor]:
    return {}


def _no_diagnostics(_bench: Bench, _parameters: Parameters) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class Check:
    """One named measurement.

    effects: (bench, parameters) -> [example]. control: (bench, parameters, the claim's control) -> [example], or None
    when the claim names no control. nulls: null name -> [example]. diagnostics: JSON data.
    """

    name: str
    unit: str
    effects: Callable[[Bench, Parameters], Tensor]
    control: Callable[[Bench, Parameters, Control], Tensor | None]
    nulls: Callable[[Bench, Parameters], Mapping[str, Tensor]] = _no_nulls
    diagnostics: Callable[[Bench, Parameters], Mapping[str, Any]] = _no_diagnostics


def measure(check: str, parameters: Parameters, bench: Bench, control: Control | None = None) -> Measures:
    """Measures a check by name on a bench, with its control ({"parts": [..]}) and its nulls.

    Raises UnknownNameError for an unknown check, InputError for a missing parameter, PairsError when the prompts lack
    what the check speaks about, NotFiniteError for runs that are not finite.
    """
    if check not in CHECKS:
        raise UnknownNameError("check", check, CHECKS)
    found, before = CHECKS[check], bench.cost
    try:
        effects = found.effects(bench, parameters)
        compared = found.control(bench, parameters, control or {})
        nulls, diagnostics = found.nulls(bench, parameters), found.diagnostics(bench, parameters)
    except KeyError as error:
        raise InputError(f"check {check!r} needs the parameter {error}; got {sorted(parameters)}") from error
    spent = {"forwards": bench.cost.spent - before.spent, "naive_forwards": bench.cost.naive - before.naive}
    return Measures(effects, compared, nulls, diagnostics, spent)


def _of(name: str) -> Callable[[Bench, Parameters], Tensor]:
    return lambda bench, parameters: figure(bench, name, parameters)


def _matched(name: str) -> Callable[[Bench, Parameters, Control], Tensor | None]:
    """The same figure of each control component, averaged over them."""

    def control(bench: Bench, parameters: Parameters, chosen: Control) -> Tensor | None:
        parts = chosen.get("parts", ())
        each = [figure(bench, name, {**parameters, "component": str(part)}) for part in parts]
        return torch.stack(each).mean(0) if each else None

    return control


def _elsewhere(bench: Bench, parameters: Parameters) -> Mapping[str, Tensor]:
    if "elsewhere" not in parameters:
        return {}
    return {"elsewhere": figure(bench, "attends", {**parameters, "key": parameters["elsewhere"]})}


def _direct_of_shuffled(bench: Bench, parameters: Parameters) -> Mapping[str, Tensor]:
    return {"shuffled labels": bench.direct(component_of(parameters), bench.shuffled)}


def _total_of_shuffled(bench: Bench, parameters: Parameters) -> Mapping[str, Tensor]:
    part = component_of(parameters)
    return {"shuffled labels": bench.shuffled_effects([part], *condition(bench, parameters))[0]}


def _conditions(bench: Bench, parameters: Parameters) -> Mapping[str, Any]:
    """The same effect elsewhere, where it stands out, and how unnatural the patched values are."""
    return {"other_conditions": _other_conditions(bench, parameters), **_unnatural(bench, parameters)}


def other_conditions(bench: Bench, parameters: Parameters) -> list[tuple[str, str]]:
    """Every other corruption and direction that the bench has."""
    here = condition(bench, parameters)
    return [other for c in bench.corruptions for d in DIRECTIONS if (other := (c, d)) != here]


def _other_conditions(bench: Bench, parameters: Parameters) -> dict[str, float]:
    part, found = component_of(parameters), {}
    for corruption, direction in other_conditions(bench, parameters):
        values = bench.effects([part], corruption, direction)[0].double().numpy()
        groups = [labels for labels in clusters(bench) if len(set(labels)) > 1]
        test = clustered_t(values, *groups)
        if abs(test.estimate) > SIGN_ERRORS * test.se:
            found[f"{corruption}, {direction}"] = test.estimate
    return found


def _unnatural(bench: Bench, parameters: Parameters) -> Mapping[str, Any]:
    part = component_of(parameters)
    corruption, direction = condition(bench, parameters)
    natural, other = bench.run("clean").at(part.whole), bench.run(corruption).at(part.whole)
    before, after = (natural, other) if direction == "noising" else (other, natural)
    read = torch.arange(before.shape[1])[None] <= bench.pairs.at[:, None]
    return {"off_distribution": off_distribution(before, after, read, part)}


CHECKS: Mapping[str, Check] = {
    "attends": Check("attends", UNITS["attends"], _of("attends"), _matched("attends"), _elsewhere),
    "copies": Check("copies", UNITS["copies"], _of("copies"), _matched("copies")),
    "direct_effect": Check(
        "direct_effect", UNITS["direct_effect"], _of("direct_effect"), _matched("direct_effect"), _direct_of_shuffled
    ),
    "total_effect": Check(
        "total_effect", UNITS["total_effect"], _of("total_effect"), _matched("total_effect"), _total_of_shuffled,
        _conditions,
    ),
    "moves_attention": Check(
        "moves_attention", UNITS["moves_attention"], _of("moves_attention"), _matched("moves_attention"),
        diagnostics=_unnatural,
    ),
}  # fmt: skip
"""Every check of one component, by name."""
