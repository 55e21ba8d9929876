"""From a claim to its Evidence: the one place where a measurement becomes evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from vesalius.bench import Bench
from vesalius.describe.measures import component_of, condition, measure_shifts
from vesalius.errors import InputError, NotFiniteError, PairsError, UnknownNameError
from vesalius.inputs import Pairs
from vesalius.model import Model
from vesalius.protocol import Claim, Evidence, unmeasured
from vesalius.site import Site
from vesalius.validate.checks.figures import CHECKS, Measures, measure, other_conditions


def check(
    claim: Claim,
    *,
    bench: Bench | None = None,
    model: Model | None = None,
    data: Pairs | Mapping[str, Pairs] | None = None,
    plan_hash: str = "",
    data_hash: str = "",
    model_hash: str = "",
    version: str = "",
    commit: str = "",
    created_at: str = "",
    allow_other_model: bool = False,
) -> Evidence:
    """Tests a claim, on a bench (shared by many claims) or on pairs of a model, and returns the Evidence.

    data: Pairs with the claim's corruption, or corruption name -> Pairs. data_hash: the opened split's, when the bench
    holds only some of its rows; default that of the bench's pairs. model_hash, when given, must be the bench's model's.
    version: default the installed package's. Evidence is unmeasured, with the reason, when
    the prompts lack what the claim speaks about or a result is not finite.

    Raises InputError when neither bench nor model and data are given, or when the claim was made about another model
    (allow_other_model=True tests it there all the same: the random-weights control); PairsError for pairs of another
    corruption; UnknownNameError for an unknown check or corruption.
    """
    bench = bench if bench is not None else _bench(claim, model, data)
    if claim.check not in CHECKS:
        raise UnknownNameError("check", claim.check, CHECKS)
    parameters = parameters_of(claim)
    corruption, _ = condition(bench, parameters)
    if corruption not in bench.corruptions:
        raise UnknownNameError("corruption", corruption, bench.corruptions)
    _check_model(claim, bench.model, model_hash, allow_other_model)
    stamp: dict[str, Any] = {
        "data_hash": data_hash or bench.corruptions[corruption].content_hash, "model_hash": bench.model.content_hash,
        "plan_hash": plan_hash, "seed": claim.seed, "commit": commit, "created_at": created_at,
        "version": version or _installed(),
    }  # fmt: skip
    try:
        measures = measure(claim.check, parameters, bench, claim.control)
        return _evidence(claim, bench, measures, stamp)
    except (NotFiniteError, PairsError) as error:
        return unmeasured(claim.id, str(error), **stamp)


def parameters_of(claim: Claim) -> dict[str, Any]:
    """A claim's parameters, with the corruption and direction that its condition names."""
    named = {key: claim.condition[key] for key in ("corruption", "direction") if key in claim.condition}
    return {**named, **claim.parameters}


def prefetch(claims: Sequence[Claim], bench: Bench) -> None:
    """Measures what many claims need in as few sweeps as possible; `check` then finds it on the bench.

    Members and controls of all total effects of one condition go together, and so do the parts whose effect on the same
    movers' attention is asked for. Claims of other checks cost next to nothing.
    """
    wanted: dict[tuple[str, str], list[Site]] = {}
    shifts: dict[tuple[tuple[Site, ...], str, str], list[Site]] = {}
    for claim in claims:
        parameters = parameters_of(claim)
        if claim.check == "total_effect":
            wanted.setdefault(condition(bench, parameters), []).extend(_parts(claim))
            for other in other_conditions(bench, parameters):
                wanted.setdefault(other, []).append(component_of(parameters))
        elif claim.check == "moves_attention":
            movers = tuple(Site.parse(name) for name in parameters["movers"])
            shifts.setdefault((movers, *condition(bench, parameters)), []).extend(_parts(claim))
    for (corruption, direction), parts in wanted.items():
        bench.effects(list(dict.fromkeys(parts)), corruption, direction)
    for (movers, corruption, direction), parts in shifts.items():
        measure_shifts(bench, parts, movers, corruption, direction)


def _parts(claim: Claim) -> list[Site]:
    """The component a claim is about, and its controls."""
    return [component_of(claim.parameters), *map(Site.parse, claim.control.get("parts", ()))]


def _bench(claim: Claim, model: Model | None, data: Pairs | Mapping[str, Pairs] | None) -> Bench:
    if model is None or data is None:
        raise InputError("a check needs bench=, or model= and data= (the pairs that the ledger opened)")
    if not isinstance(data, Pairs):
        return Bench(model, data, seed=claim.seed)
    named = str(claim.condition.get("corruption", data.corruption))
    if named != data.corruption:
        raise PairsError(f"the claim is about corruption {named!r}, but these pairs have {data.corruption!r}")
    return Bench(model, {named: data}, seed=claim.seed)


def _check_model(claim: Claim, model: Model, given: str, allow_other_model: bool) -> None:
    if given and given != model.content_hash:
        raise InputError(f"model_hash {given[:12]} was given, but {model.name} is {model.content_hash[:12]}")
    stated = claim.subject.get("model_hash", "")
    if not allow_other_model and stated and stated != model.content_hash:
        raise InputError(
            f"the claim is about model {stated[:12]}, but {model.name} is {model.content_hash[:12]}; "
            "allow_other_model=True tests it on this one all the same"
        )


def _installed() -> str:
    try:
        return metadata.version("vesalius")
    except metadata.PackageNotFoundError:
        return ""


def _evidence(claim: Claim, bench: Bench, measures: Measures, stamp: Mapping[str, Any]) -> Evidence:
    pairs = bench.pairs
    return Evidence(
        claim_id=claim.id,
        effects=_listed("effects", measures.effects),
        control=None if measures.control is None else _listed("control", measures.control),
        nulls={name: _listed(f"null {name!r}", values) for name, values in measures.nulls.items()},
        groups={name: tuple(labels) for name, labels in pairs.groups.items()},
        example_hashes=pairs.example_hashes,
        cost=measures.cost,
        diagnostics=measures.diagnostics,
        **stamp,
    )


def _listed(name: str, values: Tensor) -> tuple[float, ...]:
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        raise NotFiniteError(f"{name} of example {int(bad.nonzero()[0])} is {float(values[bad][0])}")
    return tuple(values.double().tolist())
