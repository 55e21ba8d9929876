"""The summary of a study: everything the report shows, as plain data (schema: docs/summary-schema.md)."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from vesalius import __version__
from vesalius.bench import EMBED, Bench
from vesalius.circuits import ABLATIONS, Circuit, clusters, share
from vesalius.patching.cost import Cost
from vesalius.protocol import Claim, Evidence, Verdict
from vesalius.site import Site
from vesalius.stats import clustered_t, rank_p
from vesalius.studies.answer import sentences
from vesalius.studies.gate import ACCURACY, TEMPLATE_ACCURACY, Gate
from vesalius.studies.question import example_texts
from vesalius.studies.task_circuit import Study
from vesalius.studies.testing import Tested

NO_ROLE = "no role fits"
KINDS = {"z": "head", "mlp_out": "mlp", "embed": "embed"}
PICTURES = 8


def summarise(
    study: Study, *, command: str, timings: Mapping[str, Any], on_control: Sequence[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The summary as a dict.

    timings: what differs between two runs with one seed. on_control: claim rows of the random-weights control.
    """
    claims = [claim_row(claim, verdict, study.evidence.get(claim.id)) for claim, verdict in _tested(study)]
    return {
        "schema": "vesalius/summary/1",
        "question": _question(study),
        "model": _model(study),
        "control": study.options.control,
        "stopped": study.stopped,
        "answer": sentences(study),
        "gate": _gate(study.gate, study.tested.gate if study.tested else None),
        "total_effect": _totals(study),
        "effects": None if study.effects is None else study.effects.to_json(),
        "circuit": None if study.circuit is None else _circuit(study, study.circuit),
        "attention": _attention(study),
        "claims": claims,
        "family": None if study.family is None else {"id": study.family.id, "m": study.family.m},
        "trained_claims_on_control": None if on_control is None else list(on_control),
        "cost": _cost(study.costs),
        "timings": {"sealed_at": None, "ledger_head": study.ledger_head or None, **timings},
        "reproduce": _reproduce(command, study),
    }


def _tested(study: Study) -> list[tuple[Claim, Verdict]]:
    return [] if study.family is None else list(zip(study.family.claims, study.verdicts, strict=True))


def _question(study: Study) -> dict[str, Any]:
    question = study.question
    return {
        "name": question.name, "text": question.text, "corruptions": list(question.corruptions),
        "bos": question.bos, "n": question.sizes, "seed": question.seed,
        "prompts": example_texts(question, study.model),
    }  # fmt: skip


def _model(study: Study) -> dict[str, Any]:
    _, layout = study.model.architecture
    return {
        "name": study.model.name, "hash": study.model.content_hash, "layers": layout.n_layers, "heads": layout.n_heads,
        "parameters": sum(p.numel() for p in study.model.module.parameters()), "note": study.model.note,
    }  # fmt: skip


def _gate(discovery: Gate, validation: Gate | None) -> dict[str, Any]:
    rows = [*discovery.templates, *(validation.templates if validation else ())]
    return {
        "passed": discovery.passed,
        "thresholds": {"accuracy": ACCURACY, "template_accuracy": TEMPLATE_ACCURACY},
        "accuracy": discovery.accuracy,
        "logit_diff": discovery.logit_diff,
        "templates": [row.to_json() for row in rows],
    }


def _estimate(values: Any, groups: tuple[tuple[str, ...], ...]) -> dict[str, Any]:
    test = clustered_t(values, *groups)
    return {"estimate": test.estimate, "low": test.low, "high": test.high, "n": test.n}


def _totals(study: Study) -> dict[str, Any]:
    bench = study.discovery
    if bench is None:
        return {}
    return {name: _estimate(bench.total(name).double().numpy(), clusters(bench)) for name in bench.corruptions}


def _circuit(study: Study, circuit: Circuit) -> dict[str, Any]:
    assert study.tested is not None
    reached = "" if circuit.reached else " No tried size kept enough: this is the best of them."
    return {
        "rule": circuit.rule + reached,
        "members": [_member(study, number, part) for number, part in enumerate(circuit.members)],
        "edges": [{"source": e.source, "target": e.target, "weight": e.weight} for e in circuit.edges],
        "faithfulness": [_faithfulness(study.tested, ablation) for ablation in ABLATIONS],
        "completeness": [_completeness(study.tested, ablation) for ablation in ABLATIONS],
    }


def _member(study: Study, number: int, part: Site) -> dict[str, Any]:
    assert (
        study.effects is not None
        and study.descriptions is not None
        and study.tested is not None
        and study.circuit is not None
    )
    index = study.effects.components.index(part)
    condition = study.effects.conditions[0]
    fit = study.descriptions.fits.get(str(part))
    effect = {"estimate": condition.mean[index], "low": condition.low[index], "high": condition.high[index]}
    role = "input" if part == EMBED else NO_ROLE if fit is None else fit.role
    return {
        "component": str(part), "kind": KINDS[part.kind], "layer": part.layer, "head": part.index,
        "effect": {name: float(value) for name, value in effect.items()}, "suppresses": bool(condition.mean[index] < 0),
        "marginal": {"resample": _marginal(study.tested, number)}, "role": role,
        "role_scores": {name: float(score) for name, score in study.descriptions.scores.get(str(part), {}).items()},
        "description": _description(part, fit), "claims": [] if fit is None else [claim.id for claim in fit.claims],
    }  # fmt: skip


def _description(part: Site, fit: Any) -> str:
    if part == EMBED:
        return "The token embeddings: where clean and corrupted prompts begin to differ."
    return "No role of the library describes it." if fit is None else str(fit.description)


def _marginal(tested: Tested, number: int) -> dict[str, Any]:
    runs = tested.kept["resample"]
    full = tested.bench.metric("clean").double().numpy()
    lost = (runs[0] - tested.without[number]) / (full - runs[1]).mean()
    test = clustered_t(lost, *clusters(tested.bench))
    return {"estimate": test.estimate, "low": test.low, "high": test.high}


def _faithfulness(tested: Tested, ablation: str) -> dict[str, Any]:
    runs = tested.kept[ablation]
    circuit = share(tested.bench, runs[0], runs[1], ablation)
    draws = np.array([share(tested.bench, values, runs[1], ablation).estimate for values in runs[2:]])
    # Near 1 is faithful, so a random set does as well when it comes as near; more than all of the effect is no better.
    distance, theirs = -abs(1 - circuit.estimate), -np.abs(1 - draws)
    random = {
        "draws": len(draws), "median": float(np.median(draws)), "q95": float(np.quantile(draws, 0.95)),
        "p": rank_p(distance, theirs), "values": draws.tolist(),
    }  # fmt: skip
    return {**circuit.to_json(), "per_example": circuit.per_example.tolist(), "random": random}


def _completeness(tested: Tested, ablation: str) -> dict[str, Any]:
    runs = tested.removed[ablation]
    return share(tested.bench, runs[0], runs[1], ablation).to_json()


def claim_row(claim: Claim, verdict: Verdict, evidence: Evidence | None) -> dict[str, Any]:
    """One row of the claims table."""
    control = None if evidence is None or evidence.control is None else list(evidence.control)
    refuted = verdict.outcome == "REFUTED"
    interval = None if verdict.low is None or verdict.high is None else [verdict.low, verdict.high]
    return {
        "id": claim.id, "statement": claim.statement, "component": claim.subject.get("site"), "role": claim.role,
        "kind": claim.kind, "check": claim.check, "verdict": verdict.outcome, "reason": verdict.reason,
        "estimate": verdict.estimate, "interval": interval, "low": verdict.low, "high": verdict.high,
        "unit": claim.unit, "delta": claim.delta, "delta_c": claim.delta_c,
        "control": _control_text(claim), "control_estimate": None if control is None else float(np.mean(control)),
        "n": verdict.n, "n_groups": verdict.n_groups, "n_to_decide": verdict.n_to_decide, "scope": verdict.scope,
        "p": verdict.p_refuted if refuted else verdict.p_supported,
        "p_holm": verdict.p_refuted_holm if refuted else verdict.p_supported_holm,
        "condition": {key: claim.condition.get(key) for key in ("corruption", "direction", "effect")},
        "values": [] if evidence is None else list(evidence.effects), "control_values": control,
        "templates": [] if evidence is None else list(evidence.groups.get("template", ())),
        "exploratory": verdict.exploratory,
    }  # fmt: skip


def _control_text(claim: Claim) -> str | None:
    if not claim.control:
        return None
    parts = claim.control.get("parts", [])
    return str(claim.control.get("rule", "")) + (f": {', '.join(map(str, parts))}" if parts else "")


def _attention(study: Study) -> list[dict[str, Any]]:
    """Pictures of the members with a role, strongest first, on one discovery prompt."""
    bench, circuit, found, effects = study.discovery, study.circuit, study.descriptions, study.effects
    if bench is None or circuit is None or found is None or effects is None:
        return []
    heads = [p for p in circuit.members if p.kind == "z" and found.fits.get(str(p)) is not None]
    strength = {part: effects.strength[effects.components.index(part)] for part in heads}
    chosen = sorted(heads, key=lambda part: -strength[part])[:PICTURES]
    few = Bench(bench.model, {bench.main: bench.pairs.subset([0])}, bench.seed, check=False)
    size = int(few.pairs.size[0])
    tokens = _token_texts(study, few.pairs.clean[0, :size].tolist())
    rows = []
    for part in sorted(chosen, key=lambda p: p.order):
        fit = found.fits[str(part)]
        pattern = few.pattern(part)[0, :size, :size]
        rows.append(
            {
                "component": str(part),
                "role": fit.role if fit else NO_ROLE,
                "tokens": tokens,
                "pattern": pattern.double().tolist(),
            }
        )
    return rows


def _token_texts(study: Study, ids: list[int]) -> list[str]:
    tokenizer = study.model.tokenizer
    return [str(i) for i in ids] if tokenizer is None else [str(tokenizer.decode([i])) for i in ids]


def _cost(costs: Sequence[tuple[str, Cost]]) -> dict[str, Any]:
    steps = [{"name": name, "forwards": round(c.spent, 3), "naive_forwards": c.naive} for name, c in costs]
    return {
        "steps": steps,
        "forwards": round(sum(c.spent for _, c in costs), 3),
        "naive_forwards": sum(c.naive for _, c in costs),
    }


def _reproduce(command: str, study: Study) -> dict[str, Any]:
    return {
        "command": command, "version": __version__, "python": platform.python_version(),
        "torch": version("torch").split("+")[0], "transformers": version("transformers"),
        "ledger": None if study.family is None else "ledger.sqlite",
    }  # fmt: skip
