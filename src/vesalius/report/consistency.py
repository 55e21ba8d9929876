"""What a summary's parts must have in common: lengths that match, names and ids that exist."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from typing import Any

from vesalius.errors import InputError, UnknownNameError

PER_COMPONENT = ("mean", "low", "high", "sd", "p", "q", "sign_flips")
OUTSIDE = ("embed", "logits")


def check_consistency(summary: Mapping[str, Any]) -> None:
    """Raises InputError or UnknownNameError, naming the path. The summary already has the right keys and types."""
    question = summary["question"]
    for split, used in question["used"].items():
        # A template that fails the gate takes prompts away; none can come from elsewhere.
        if used > question["n"][split]:
            raise InputError(f"summary.question.used.{split} is {used} but there are {question['n'][split]} prompts")
    for corruption in question["corruptions"]:
        _known(corruption, question["prompts"], "corruption without an example in summary.question.prompts:")
    if summary["effects"] is not None:
        _check_effects(summary["effects"], question["corruptions"])
    if summary["circuit"] is not None:
        _check_circuit(summary["circuit"], summary["effects"], summary["claims"])
    for index, row in enumerate(summary["gate"]["templates"]):
        _check_template(row, f"summary.gate.templates[{index}]")
    for index, head in enumerate(summary["attention"]):
        _check_attention(head, summary["attention"][0], f"summary.attention[{index}]")
    for key in ("claims", "trained_claims_on_control"):
        for index, claim in enumerate(summary[key] or ()):
            _check_claim(claim, f"summary.{key}[{index}]")


def _check_template(row: Mapping[str, Any], path: str) -> None:
    # Choosing validation prompts by what the model answers on them would bias every verdict.
    if row["split"] == "validation" and row["passed"] is not None:
        raise InputError(f"{path}.passed is {row['passed']}; validation templates are not judged, so it must be null")


def _check_effects(effects: Mapping[str, Any], corruptions: Iterable[str]) -> None:
    count = len(effects["components"])
    for index, condition in enumerate(effects["conditions"]):
        path = f"summary.effects.conditions[{index}]"
        _known(condition["corruption"], corruptions, f"corruption in {path}")
        for name in PER_COMPONENT:
            _same_length(condition[name], count, f"{path}.{name}", "summary.effects.components")
    for name in ("sign_conflicts", "significant"):
        for component in effects[name]:
            _known(component, effects["components"], f"component in summary.effects.{name}")


def _check_circuit(circuit: Mapping[str, Any], effects: Mapping[str, Any] | None, claims: Any) -> None:
    ids = {claim["id"] for claim in claims}
    members = {member["component"] for member in circuit["members"]}
    for index, member in enumerate(circuit["members"]):
        path = f"summary.circuit.members[{index}]"
        if effects is not None:
            _known(member["component"], effects["components"], f"component in {path}")
        for claim in member["claims"]:
            _known(claim, ids, f"claim in {path}")
        _check_uncertain(member, path)
    for index, edge in enumerate(circuit["edges"]):
        for end in ("source", "target"):
            _known(edge[end], (*members, *OUTSIDE), f"{end} of summary.circuit.edges[{index}]")


def _check_uncertain(member: Mapping[str, Any], path: str) -> None:
    low, high = member["effect"]["low"], member["effect"]["high"]
    if low is None or high is None:
        return
    # An interval that ends at zero exactly may be called either.
    if (low < 0 < high and not member["uncertain"]) or (member["uncertain"] and not low <= 0 <= high):
        raise InputError(f"{path}.uncertain is {member['uncertain']} but its interval is [{low}, {high}]")


def _check_attention(head: Mapping[str, Any], first: Mapping[str, Any], path: str) -> None:
    _same_length(head["prompts"], len(first["prompts"]), f"{path}.prompts", "summary.attention[0].prompts")
    for number, (prompt, other) in enumerate(zip(head["prompts"], first["prompts"], strict=True)):
        here, count = f"{path}.prompts[{number}]", len(prompt["tokens"])
        if prompt["tokens"] != other["tokens"]:
            raise InputError(f"{here}.tokens differ from summary.attention[0]'s; every head has the same prompts")
        _same_length(prompt["pattern"], count, f"{here}.pattern", f"{here}.tokens")
        for index, row in enumerate(prompt["pattern"]):
            _same_length(row, count, f"{here}.pattern[{index}]", f"{here}.tokens")


def _check_claim(claim: Mapping[str, Any], path: str) -> None:
    count = len(claim["values"])
    if claim["control_values"] is not None:
        _same_length(claim["control_values"], count, f"{path}.control_values", f"{path}.values")
    if claim["templates"]:
        _same_length(claim["templates"], count, f"{path}.templates", f"{path}.values")
    if claim["interval"] is not None and [claim["low"], claim["high"]] != list(claim["interval"]):
        raise InputError(f"{path}.interval is {claim['interval']} but low and high are {claim['low']}, {claim['high']}")


def _same_length(value: Sized, count: int, path: str, other: str) -> None:
    if len(value) != count:
        raise InputError(f"{path} has {len(value)} entries but {other} has {count}")


def _known(name: str, known: Iterable[str], kind: str) -> None:
    listed = list(known)
    if name not in listed:
        shown = listed if len(listed) <= 12 else [*listed[:12], f"... ({len(listed)} in all)"]
        raise UnknownNameError(kind, name, shown)
