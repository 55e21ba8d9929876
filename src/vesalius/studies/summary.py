"""The summary of a study of a task: everything the report shows, as plain data (schema: docs/summary-schema.md)."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from vesalius import __version__
from vesalius.circuits import Circuit, edges_to_json, share
from vesalius.describe import NO_ROLE, Description
from vesalius.inputs.beginning import speller
from vesalius.parts import Part
from vesalius.patching.plan import Cost
from vesalius.protocol import Claim, Evidence, Verdict
from vesalius.protocol.legs import clusters_of
from vesalius.quantities import Runs
from vesalius.quantities.circuit import ABLATIONS
from vesalius.quantities.contrast import EMBED
from vesalius.stats import Measurement, group_mean, measure, rank_p
from vesalius.studies.gate import Gate, estimate
from vesalius.studies.question import example_texts
from vesalius.studies.study import Study
from vesalius.studies.task_circuit import CIRCUIT, DESCRIPTIONS, DISCOVERY, EFFECTS, FAMILY, GATE, TESTED, Tested

SCHEMA = "vesalius/summary/2"
KINDS = {"z": "head", "mlp_out": "mlp", "mlp_post": "neuron"}
# Heads whose attention is shown, and on how many prompts.
PICTURES, PROMPTS = 8, 3


def summarise(
    study: Study, *, command: str, timings: Mapping[str, Any], on_control: Sequence[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The summary as a dict.

    timings: what differs between two runs with one seed. on_control: claim rows of the random-weights control.
    """
    tested = study.get(TESTED)
    return {
        "schema": SCHEMA,
        "question": _question(study, tested),
        "model": _model(study),
        "control": study.options.control,
        "stopped": study.stopped,
        "answer": list(study.answer),
        "gate": _gate(study, tested),
        "total_effect": _totals(study),
        "effects": study[EFFECTS].to_json() if EFFECTS in study else None,
        "circuit": None if tested is None else _circuit(study, study[CIRCUIT], tested),
        "attention": [] if tested is None else _attention(study),
        "claims": [] if tested is None else claim_rows(study, study.verdicts, tested.evidence),
        "family": {"id": study[FAMILY].id, "m": study[FAMILY].m} if FAMILY in study else None,
        "trained_claims_on_control": None if on_control is None else list(on_control),
        "cost": _cost(study.costs),
        "timings": {"sealed_at": None, "ledger_head": study.ledger_head or None, **timings},
        "reproduce": _reproduce(command, study),
    }


def _question(study: Study, tested: Tested | None) -> dict[str, Any]:
    question, used = study.question, study[GATE].used
    tested_on = tested.runs.n if tested else question.sizes["validation"]
    return {
        "name": question.name,
        "text": question.text,
        "corruptions": list(question.corruptions),
        "bos": question.bos,
        "n": question.sizes,
        "seed": question.seed,
        "used": {"discovery": 0 if study.stopped else len(used), "validation": 0 if study.stopped else tested_on},
        "prompts": example_texts(question, study.model, used[0]),
    }


def _model(study: Study) -> dict[str, Any]:
    _, layout = study.model.architecture
    return {
        "name": study.model.name,
        "hash": study.model.content_hash,
        "layers": layout.n_layers,
        "heads": layout.n_heads,
        "parameters": sum(p.numel() for p in study.model.module.parameters()),
        "note": study.model.note,
    }


def _gate(study: Study, tested: Tested | None) -> dict[str, Any]:
    gates: list[Gate] = [study[GATE], *([tested.gate] if tested else [])]
    rows = [row for found in gates for row in found.templates]
    used = {} if study.stopped is None else {"used": False}
    return {**gates[0].to_json(), "templates": [{**row.to_json(), **used} for row in rows]}


def _measured(runs: Runs, values: Any, name: str) -> Measurement:
    return measure(name, values, groups=runs.groups, clusters=runs.clusters)


def _totals(study: Study) -> dict[str, Any]:
    if DISCOVERY not in study:
        return {}
    runs = study[DISCOVERY]
    totals = {name: runs.total(name).double().numpy() for name in runs.corruptions}
    return {name: estimate(_measured(runs, values, name)) for name, values in totals.items()}


def _circuit(study: Study, circuit: Circuit, tested: Tested) -> dict[str, Any]:
    reached = "" if circuit.reached else " No tried size kept enough: this is the best of them."
    return {
        "rule": circuit.rule + reached,
        "members": [_member(study, tested, number, part) for number, part in enumerate(circuit.members)],
        "edges": edges_to_json(circuit.edges),
        "faithfulness": [_faithfulness(tested, ablation) for ablation in ABLATIONS],
        "completeness": [_share(tested, tested.without[ablation], 0, ablation) for ablation in ABLATIONS],
    }


def _member(study: Study, tested: Tested, number: int, part: Part) -> dict[str, Any]:
    effects, found, site = study[EFFECTS], study[DESCRIPTIONS], part.writes[0]
    effect = effects.conditions[0].effects[effects.components.index(part)]
    fit, name = found.fits.get(str(part)), str(part)
    assert effect.low is not None and effect.high is not None
    return {
        "component": name,
        "kind": "embed" if part == EMBED else KINDS.get(site.kind, str(part.ref["kind"])),
        "layer": site.layer,
        "head": site.index if site.kind == "z" else None,
        "effect": {key: getattr(effect, key) for key in ("estimate", "low", "high")},
        "suppresses": effect.estimate < 0,
        "uncertain": effect.low <= 0 <= effect.high,
        "marginal": {"resample": _marginal(tested, number)},
        "role": "input" if part == EMBED else NO_ROLE if fit is None else fit.label,
        "role_scores": {label: float(score) for label, score in found.scores.get(name, {}).items()},
        "description": _description(part, fit),
        "claims": [claim.id for claim in found.claims if claim.subject.get("name") == name],
    }


def _description(part: Part, fit: Description | None) -> str:
    if part == EMBED:
        return "The token embeddings: where clean and corrupted prompts begin to differ."
    return "No role of the library describes it." if fit is None else fit.sentence


def _marginal(tested: Tested, number: int) -> dict[str, Any]:
    alone = tested.with_only["resample"]
    whole = tested.runs.mean(tested.runs.metric("clean").double() - torch.from_numpy(alone[1]))
    lost = (alone[0] - tested.smaller[number]) / whole
    found = _measured(tested.runs, lost, "marginal")
    return {key: getattr(found, key) for key in ("estimate", "low", "high")}


def _share(tested: Tested, values: Any, number: int, ablation: str) -> dict[str, Any]:
    return {"ablation": ablation, **estimate(share(tested.runs, values[number], values[1], ablation))}


def _faithfulness(tested: Tested, ablation: str) -> dict[str, Any]:
    values = tested.with_only[ablation]
    circuit = share(tested.runs, values[0], values[1], ablation)
    draws = np.array([share(tested.runs, some, values[1], ablation).estimate for some in values[2:]])
    # Near 1 is faithful, so a random set does as well when it comes as near; more than all of the effect is no better.
    distance, theirs = -abs(1 - circuit.estimate), -np.abs(1 - draws)
    random = {
        "draws": len(draws),
        "median": float(np.median(draws)),
        "q95": float(np.quantile(draws, 0.95)),
        "p": rank_p(distance, theirs),
        "values": draws.tolist(),
    }
    return {"ablation": ablation, **estimate(circuit), "per_example": list(circuit.values), "random": random}


def claim_rows(study: Study, verdicts: Sequence[Verdict], evidence: Mapping[str, Evidence]) -> list[dict[str, Any]]:
    """Rows of the claims table, one for each claim of a study's family."""
    discovery = study[DESCRIPTIONS].estimates
    rows = zip(study[FAMILY].claims, verdicts, strict=True)
    return [claim_row(claim, verdict, evidence.get(claim.id), discovery.get(claim.id)) for claim, verdict in rows]


def claim_row(
    claim: Claim, verdict: Verdict, evidence: Evidence | None, discovery: float | None = None
) -> dict[str, Any]:
    """One row of the claims table. discovery: the estimate that the claim was made from."""
    control = None if evidence is None or evidence.control is None else list(evidence.control)
    refuted = verdict.outcome in ("REFUTED", "NOT SPECIFIC")
    interval = None if verdict.low is None or verdict.high is None else [verdict.low, verdict.high]
    compared = None
    if evidence is not None and control is not None:
        compared = group_mean(control, clusters_of(claim, evidence)[0])
    return {
        "id": claim.id,
        "statement": claim.statement,
        "measured": _in_words(claim, verdict, compared),
        "component": claim.subject.get("name", claim.subject.get("site")),
        "role": claim.role,
        "kind": claim.kind,
        "quantity": claim.quantity,
        "verdict": verdict.outcome,
        "reason": verdict.reason,
        "estimate": verdict.estimate,
        "interval": interval,
        "low": verdict.low,
        "high": verdict.high,
        "discovery": discovery,
        "unit": claim.unit,
        "delta": claim.delta,
        "delta_c": claim.delta_c,
        "control": _control_text(claim),
        "control_estimate": compared,
        "n": verdict.n,
        "n_groups": verdict.n_groups,
        "n_to_decide": verdict.n_to_decide,
        "scope": verdict.scope,
        "p": verdict.p_refuted if refuted else verdict.p_supported,
        "p_holm": verdict.p_refuted_holm if refuted else verdict.p_supported_holm,
        "condition": {key: claim.condition.get(key) for key in ("corruption", "direction", "effect")},
        "values": [] if evidence is None else list(evidence.effects),
        "control_values": control,
        "templates": [] if evidence is None else list(evidence.groups.get("template", ())),
        "exploratory": verdict.exploratory,
    }


def _in_words(claim: Claim, verdict: Verdict, compared: float | None) -> str:
    """What was tested, and what validation measured."""
    side, unit = "at least" if claim.sign > 0 else "at most", f" {claim.unit}" if claim.unit else ""
    margin = f", and {claim.control_margin:.3g} beyond its control" if claim.control else ""
    tested = f"Tested: {side} {claim.sign * claim.delta:+.3g}{unit}{margin}."
    if verdict.estimate is None:
        return f"{tested} Not measured."
    interval = "" if verdict.low is None or verdict.high is None else f" [{verdict.low:+.3g}, {verdict.high:+.3g}]"
    control = "" if compared is None else f"; the control {compared:+.3g}"
    where = f"{verdict.n} fresh prompts in {verdict.n_groups} groups{_effective(verdict)}"
    return f"{tested} Measured on {where}: {verdict.estimate:+.3g}{interval}{unit}{control}.{_would_decide(verdict)}"


def _effective(verdict: Verdict) -> str:
    """How many independent groups would be as sure, where these are fewer."""
    effective = verdict.legs[0].get("effective_groups") if verdict.legs else None
    fewer = effective is not None and verdict.n_groups - effective >= 0.05
    return f" (as sure as {effective:.1f} independent ones)" if fewer else ""


def _would_decide(verdict: Verdict) -> str:
    """With how many groups an open claim would be decided, one way or the other."""
    if verdict.n_to_decide is None or not verdict.n:
        return ""
    groups = math.ceil(verdict.n_to_decide * verdict.n_groups / verdict.n)
    return f" About {groups} groups like these would decide."


def short_row(
    claim: Claim, verdict: Verdict, evidence: Evidence | None, discovery: float | None = None
) -> dict[str, Any]:
    """`claim_row` without what is one number per text: that is in the ledger."""
    row = claim_row(claim, verdict, evidence, discovery)
    return {name: value for name, value in row.items() if name not in ("values", "control_values", "templates")}


def _control_text(claim: Claim) -> str | None:
    if not claim.control:
        return None
    parts = [one if isinstance(one, str) else _named(one) for one in claim.control.get("parts", [])]
    return str(claim.control.get("rule", "")) + (f": {', '.join(parts)}" if parts else "")


def _named(ref: Mapping[str, Any]) -> str:
    """A part by its reference, as short as can be where the rule says what it is one of."""
    return f"latent {ref['index']}" if ref.get("kind") == "latent" else str(ref.get("label") or dict(ref))


def _attention(study: Study) -> list[dict[str, Any]]:
    """Attention of the heads with a role, strongest first, on a few discovery prompts."""
    found, effects = study[DESCRIPTIONS], study[EFFECTS]
    heads = [p for p in study[CIRCUIT].members if p.writes[0].kind == "z" and found.fits.get(str(p)) is not None]
    strength = {part: effects.strength[effects.components.index(part)] for part in heads}
    chosen = sorted(heads, key=lambda part: -strength[part])[:PICTURES]
    few = study[DISCOVERY].few(range(min(PROMPTS, study[DISCOVERY].n)))
    sizes = [int(size) for size in few.pairs.size]
    tokens = [_token_texts(study, few.pairs.clean[row, :size].tolist()) for row, size in enumerate(sizes)]
    rows = []
    for part in sorted(chosen, key=lambda p: p.writes[0].order):
        fit, pattern = found.fits[str(part)], few.pattern(part).double()
        prompts = [
            {"tokens": tokens[row], "pattern": pattern[row, :size, :size].tolist()} for row, size in enumerate(sizes)
        ]
        rows.append({"component": str(part), "role": fit.label if fit else NO_ROLE, "prompts": prompts})
    return rows


def _token_texts(study: Study, ids: list[int]) -> list[str]:
    return list(map(speller(study.model.tokenizer), ids))


def _cost(costs: Sequence[tuple[str, Cost]]) -> dict[str, Any]:
    steps = [{"name": name, "forwards": round(c.spent, 3), "naive_forwards": c.naive} for name, c in costs]
    return {
        "steps": steps,
        "forwards": round(sum(c.spent for _, c in costs), 3),
        "naive_forwards": sum(c.naive for _, c in costs),
    }


def _reproduce(command: str, study: Study) -> dict[str, Any]:
    return {
        "command": command,
        "version": __version__,
        "python": platform.python_version(),
        "torch": version("torch").split("+")[0],
        "transformers": version("transformers"),
        "ledger": "ledger.sqlite" if FAMILY in study else None,
    }
