"""From a claim to its Evidence: the one place where a measurement becomes evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from vesalius.errors import InputError, NotFiniteError, PairsError, UnknownNameError
from vesalius.inputs import Corpus, Pairs, Table
from vesalius.model import Model
from vesalius.parts import HasLatents, Part, Together, as_part
from vesalius.protocol import Claim, Evidence, unmeasured
from vesalius.protocol.evidence import LONGEST_REASON
from vesalius.quantities import Contrast, Parameters, Quantity, Runs, quantity
from vesalius.quantities.base import condition
from vesalius.refs import resolve

Data = Pairs | Mapping[str, Pairs] | Corpus | Table
Given = Sequence[Part | HasLatents | Tensor]


def check(
    claim: Claim,
    *,
    runs: Runs | None = None,
    model: Model | None = None,
    data: Data | None = None,
    parts: Given = (),
    plan_hash: str = "",
    data_hash: str = "",
    model_hash: str = "",
    version: str = "",
    commit: str = "",
    created_at: str = "",
    allow_other_model: bool = False,
) -> Evidence:
    """Tests a claim, on runs (shared by many claims) or on a model and data, and returns the Evidence.

    data: what the ledger opened: Pairs with the claim's corruption, corruption name -> Pairs, a Corpus or a Table.
    parts: what the claim's subject names by hash and is not alive in this process: a dictionary, a Direction, its
    numbers. data_hash: the opened split's; default that of the runs' data, or of the split that they were taken from.
    model_hash, when given, must be that of the runs' model. version: default the installed package's. Evidence is
    unmeasured, with the reason, when there are fewer examples than were planned, when the prompts lack what the claim
    speaks about or a result is not finite.

    Raises InputError when neither runs nor model and data are given, when the quantity does not apply to the part, or
    when the claim was made about another model (allow_other_model=True tests it there all the same: the random-weights
    control); PairsError for pairs of another corruption; UnknownNameError for an unknown quantity, corruption or
    condition.
    """
    of = quantity(claim.quantity)
    runs = runs if runs is not None else _runs(claim, model, data)
    part, parameters = part_of(claim, *parts), parameters_of(claim, of)
    refused = of.refuses(runs, part)
    if refused:
        raise InputError(f"{of.name} of {part} cannot be measured: {refused}")
    root = _corruption(runs, parameters).source_hash if isinstance(runs.data, Contrast) else runs.data.source_hash
    _check_model(claim, runs.model, model_hash, allow_other_model)
    stamp: dict[str, Any] = {
        "data_hash": data_hash or root,
        "model_hash": runs.model.content_hash,
        "plan_hash": plan_hash,
        "seed": claim.seed,
        "commit": commit,
        "created_at": created_at,
        "version": version or _installed(),
    }
    if runs.n < claim.n:
        return unmeasured(claim.id, f"too few examples: {runs.n} of the {claim.n} that were planned", **stamp)
    try:
        return _measured(claim, of, runs, part, parameters, stamp)
    except NotFiniteError as error:
        return unmeasured(claim.id, f"not finite: {error}"[:LONGEST_REASON], **stamp)
    except PairsError as error:
        return unmeasured(claim.id, f"not in the prompts: {error}"[:LONGEST_REASON], **stamp)


def prepare(claims: Sequence[Claim], runs: Runs, parts: Given = ()) -> None:
    """Measures what many claims need in as few sweeps as their quantities can; `check` then finds it in the runs."""
    wanted: dict[str, list[tuple[Part, Parameters]]] = {}
    for claim in claims:
        parameters = {**parameters_of(claim, quantity(claim.quantity)), "control": claim.control}
        wanted.setdefault(claim.quantity, []).append((part_of(claim, *parts), parameters))
    for name, some in wanted.items():
        quantity(name).prepare(runs, some)


def part_of(claim: Claim, *given: Part | HasLatents | Tensor) -> Part:
    """The part that a claim is about.

    Of claims of schema 1, and of those written by hand, the parameter `component` or the subject's `site` will do.
    """
    subject, named = claim.subject, claim.parameters.get("component")
    if named is not None:
        return as_part(str(named))
    if subject.get("kind") == "circuit" and "members" in subject:
        return Together(tuple(as_part(str(name)) for name in subject["members"]))
    if "site" in subject and subject.get("kind", "") in ("", "head", "mlp", "neuron", "site"):
        return as_part(str(subject["site"]))
    ref = {key: value for key, value in subject.items() if key not in ("name", "model_hash")}
    return resolve(ref, *given)


def parameters_of(claim: Claim, of: Quantity) -> dict[str, Any]:
    """A claim's parameters, with the corruption and direction that its condition names.

    Raises UnknownNameError for a word of the condition that the quantity does not know.
    """
    known = ("corruption", *of.condition)
    for word in claim.condition:
        if word not in known and claim.schema > 1:
            raise UnknownNameError(f"condition of {of.name}", word, known)
    named = {key: claim.condition[key] for key in ("corruption", "direction") if key in claim.condition}
    return {**named, **claim.parameters}


def _runs(claim: Claim, model: Model | None, data: Data | None) -> Runs:
    if model is None or data is None:
        raise InputError("a check needs runs=, or model= and data= (what the ledger opened)")
    named = str(claim.condition.get("corruption", getattr(data, "corruption", "")))
    if isinstance(data, Pairs) and named != data.corruption:
        raise PairsError(f"the claim is about corruption {named!r}, but these pairs have {data.corruption!r}")
    return Runs(model, data, seed=claim.seed)


def _corruption(runs: Runs, parameters: Parameters) -> Pairs:
    name, _ = condition(runs, parameters)
    if name not in runs.corruptions:
        raise UnknownNameError("corruption", name, runs.corruptions)
    return runs.corruptions[name]


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


def _measured(
    claim: Claim, of: Quantity, runs: Runs, part: Part, parameters: Parameters, stamp: Mapping[str, Any]
) -> Evidence:
    before = runs.cost
    try:
        effects = of.measure(runs, part, parameters)
        control = of.control(runs, part, parameters, claim.control)
        nulls, diagnostics = of.nulls(runs, part, parameters), of.diagnostics(runs, part, parameters)
    except KeyError as error:
        raise InputError(f"{of.name} needs the parameter {error}; got {sorted(parameters)}") from error
    spent = runs.cost - before
    return Evidence(
        claim_id=claim.id,
        effects=_listed("effects", effects),
        control=None if control is None else _listed("control", control),
        nulls={name: _listed(f"null {name!r}", values) for name, values in nulls.items()},
        groups={name: tuple(labels) for name, labels in runs.groups.items()},
        example_hashes=runs.example_hashes,
        cost={"forwards": spent.spent, "naive_forwards": spent.naive},
        diagnostics=diagnostics,
        **stamp,
    )


def _listed(name: str, values: Tensor) -> tuple[float, ...]:
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        raise NotFiniteError(f"{name} of example {int(bad.nonzero()[0])} is {float(values[bad][0])}")
    return tuple(values.double().tolist())
