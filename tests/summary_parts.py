"""Parts of made-up summaries that look like real studies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Summary = dict[str, Any]

TEMPLATES = [
    "After {A} and {B} finished lunch at the {place}, {B} handed a {object} to",
    "While {A} and {B} were waiting near the {place}, {B} gave a {object} to",
    "When {A} and {B} left the {place}, {B} passed a {object} to",
    "Because {A} and {B} met in the {place}, {B} offered a {object} to",
    "Once {A} and {B} had cleaned the {place}, {B} sent a {object} to",
    "Since {A} and {B} shared the {place}, {B} brought a {object} to",
    "As {A} and {B} walked past the {place}, {B} threw a {object} to",
    "Before {A} and {B} closed the {place}, {B} lent a {object} to",
    "Today {A} and {B} came to the {place}, and {B} sold a {object} to",
    "Last week {A} and {B} worked at the {place}, and {B} mailed a {object} to",
    "In the morning {A} and {B} opened the {place}, and {B} showed a {object} to",
    "{A} and {B} sat in the {place}, and {B} returned a {object} to",
]
TOKENS = [
    "<|im_start|>", "After", " Anna", " and", " Paul", " finished", " lunch", " at", " the", " market", ",",
    " Paul", " handed", " a", " ticket", " to",
]  # fmt: skip
PROMPTS = [TOKENS, [{" Anna": " Lucy", " Paul": " Mark"}.get(token, token) for token in TOKENS[:12]] + [" to"]]
ROLES = [
    ("layers.0.mlp_out", "MLP toward the answer"),
    ("layers.3.z[1]", "duplicate token"),
    ("layers.4.z[7]", "previous token"),
    ("layers.5.mlp_out", "no role fits"),
    ("layers.7.z[2]", "duplicate token"),
    ("layers.9.z[5]", "induction"),
    ("layers.11.z[0]", "induction"),
    ("layers.13.z[4]", "S-inhibition"),
    ("layers.14.z[8]", "S-inhibition"),
    ("layers.15.z[3]", "S-inhibition"),
    ("layers.15.mlp_out", "no role fits"),
    ("layers.17.z[3]", "name mover"),
    ("layers.19.z[6]", "name mover"),
    ("layers.21.z[0]", "name mover"),
    ("layers.22.z[2]", "no role fits"),
    ("layers.24.z[1]", "negative mover"),
    ("layers.25.z[8]", "S-suppressor"),
    ("layers.26.mlp_out", "MLP toward the answer"),
    ("layers.28.z[4]", "negative mover"),
    ("layers.29.mlp_out", "MLP toward the distractor"),
]
SENTENCES = {
    "name mover": "Attends from the last token to the name that occurs once and copies it to the output.",
    "S-inhibition": "Removing it moves the name movers' attention to the repeated name.",
    "duplicate token": "Attends from the second occurrence of a name to its first.",
    "previous token": "Attends from each token to the one before it.",
    "induction": "Attends from a repeated name to the token after its first occurrence.",
    "negative mover": "Attends to the answer and writes against it.",
    "S-suppressor": "Attends to the repeated name and lowers its logit.",
    "MLP toward the answer": "Writes toward the answer at the last position.",
    "MLP toward the distractor": "Writes toward the distractor at the last position.",
    "no role fits": "No role in the library predicts what it does.",
}
REFUSALS = ["absent", "opposite", "too_small", "not_specific"]
NOT_SPECIFIC = 9
"""Every so many claims one is not specific."""


def frame(name: str, corruptions: list[str], claims: list[Summary]) -> Summary:
    """All of a summary but effects, circuit and attention."""
    prompts = {
        "clean": "After Anna and Paul finished lunch at the market, Paul handed a ticket to",
        "swap": "After Anna and Paul finished lunch at the market, Anna handed a ticket to",
        "abc": "After Lucy and Mark finished lunch at the market, Peter handed a ticket to",
    }
    steps = [
        ("gate", 4.0, 64.0),
        ("effects", 1204.0, 38528.0),
        ("circuit", 612.5, 9600.0),
        ("validate", 845.0, 5888.0),
    ]
    return {
        "schema": "vesalius/summary/2",
        "question": {
            "name": name,
            "text": "How does the model decide which of two names receives the object?",
            "corruptions": corruptions,
            "bos": "<|im_start|>",
            "n": {"discovery": 32, "validation": 32},
            "used": {"discovery": 29, "validation": 32},
            "seed": 0,
            "prompts": prompts | {"answer": " Anna", "distractor": " Paul"},
        },
        "model": {
            "name": "smollm2-135m-instruct",
            "hash": "9f2c" * 16,
            "layers": 30,
            "heads": 9,
            "parameters": 134_515_008,
            "note": "4-bit (Q4_1) weights, instruct",
        },
        "control": None,
        "stopped": None,
        "answer": ["The model attends to the earlier copy of a repeated token.", "It copies what came next."],
        "gate": gate(),
        "total_effect": {c: estimate(6.12 - 1.9 * i, 0.7, 32) for i, c in enumerate(corruptions)},
        "claims": claims,
        "family": {"id": "c01a" * 16, "m": len(claims)},
        "trained_claims_on_control": None,
        "cost": {
            "steps": [{"name": n, "forwards": f, "naive_forwards": g} for n, f, g in steps],
            "forwards": sum(f for _, f, _ in steps),
            "naive_forwards": sum(g for _, _, g in steps),
        },
        "timings": {
            "steps": [{"name": n, "seconds": 0.21 * f} for n, f, _ in steps],
            "seconds": 0.21 * sum(f for _, f, _ in steps),
            "peak_memory_bytes": 2_130_000_000,
            "created_at": "2026-02-03T10:19:40Z",
            "sealed_at": "2026-02-03T10:11:12Z",
            "ledger_head": "5eed" * 16,
        },
        "reproduce": {
            "command": f"vesalius study {name} --model smollm2-135m-instruct --n 32 --seed 0",
            "version": "0.1.0",
            "python": "3.11.2",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "ledger": "ledger.sqlite",
        },
    }


def gate() -> Summary:
    rng = np.random.default_rng(2)
    rows = []
    for split in ("discovery", "validation"):
        for number, template in enumerate(TEMPLATES):
            preference = 0.27 if number == 11 else float(rng.choice([1.0, 1.0, 1.0, 0.67]))
            text = template if split == "discovery" else template.replace("{place}", "{other place}")
            rows.append(
                {
                    "template": text,
                    "split": split,
                    "n": 3,
                    "preference": preference,
                    "top1": 0.8 * preference,
                    "logit_diff": 4.2 * preference - 0.8,
                    "passed": preference > 0.5 if split == "discovery" else None,
                    "used": preference > 0.5 or split == "validation",
                }
            )
    return {
        "passed": True,
        "thresholds": {"preference": 0.8, "template_preference": 0.5},
        "preference": estimate(0.92, 0.06, 64),
        "top1": estimate(0.71, 0.09, 64),
        "answer_probability": estimate(0.31, 0.05, 64),
        "answer_rank": {"estimate": 1.0, "low": 1.0, "high": 3.0, "n": 64},
        "logit_diff": estimate(3.05, 0.62, 64),
        "templates": rows,
    }


def names_of(layers: int, heads: int) -> list[str]:
    inner = [[*(f"layers.{i}.z[{h}]" for h in range(heads)), f"layers.{i}.mlp_out"] for i in range(layers)]
    return ["embed", *(name for layer in inner for name in layer)]


def estimate(value: float, half: float, n: int | None = None) -> Summary:
    bounds = {"estimate": value, "low": value - half, "high": value + half}
    return bounds if n is None else bounds | {"n": n}


def effects_of(
    rng: np.random.Generator, components: list[str], members: Sequence[tuple[str, str]], corruptions: list[str]
) -> Summary:
    base = rng.normal(0, 0.012, len(components))
    for name, role in members:
        size = rng.uniform(0.08, 0.3)
        against = role in ("negative mover", "S-suppressor", "MLP toward the distractor")
        base[components.index(name)] = -size if against else size
    base[0] = 0.98
    conditions = []
    for corruption in corruptions:
        for direction in ("noising", "denoising"):
            mean = base * rng.uniform(0.75, 1.15, len(base)) + rng.normal(0, 0.006, len(base))
            half = 0.25 * np.abs(mean) + 0.012
            p = np.exp(-6 * np.abs(mean) / half)
            conditions.append(
                {
                    "corruption": corruption,
                    "direction": direction,
                    "mean": mean.round(4).tolist(),
                    "low": (mean - half).round(4).tolist(),
                    "high": (mean + half).round(4).tolist(),
                    "sd": (2.2 * half).round(4).tolist(),
                    "p": p.round(6).tolist(),
                    "q": np.minimum(1, 4 * p).round(6).tolist(),
                    "sign_flips": (0.5 * np.exp(-np.abs(mean) / 0.05)).round(2).tolist(),
                }
            )
    conflicts = [members[-2][0], components[len(components) // 2]]
    return {
        "components": components,
        "unit": "share of the total effect",
        "conditions": conditions,
        "sign_conflicts": conflicts,
        "significant": [c for c, q in zip(components, conditions[0]["q"], strict=True) if q <= 0.05],
    }


def claims_of(rng: np.random.Generator, members: Sequence[tuple[str, str]]) -> list[Summary]:
    claims = []
    for name, role in members:
        for kind in ("causal", "predictive"):
            claims.append(claim(rng, len(claims), name, role, kind))
    extra = 46 - len(claims) if len(members) > 10 else 2
    for number in range(extra):
        claims.append(claim(rng, len(claims), "", "", "circuit") | {"statement": circuit_statement(number)})
    return claims


def circuit_statement(number: int) -> str:
    return f"The circuit keeps at least {90 - 8 * number} % of the effect when everything else is ablated."


def claim(rng: np.random.Generator, number: int, name: str, role: str, kind: str) -> Summary:
    verdict = ["SUPPORTED", "SUPPORTED", "SUPPORTED", "REFUTED", "SUPPORTED", "INCONCLUSIVE"][number % 6]
    if number % NOT_SPECIFIC == 1 and verdict == "SUPPORTED":
        verdict = "NOT SPECIFIC"
    unit, delta = ("attention", 0.15) if kind == "predictive" else ("share of the total effect", 0.05)
    size = (
        {"SUPPORTED": 4.5, "REFUTED": 0.2, "NOT SPECIFIC": 4.5, "INCONCLUSIVE": 1.6}[verdict]
        * delta
        * rng.uniform(0.8, 1.6)
    )
    of_template = rng.normal(0, 0.25 * size + 0.1 * delta, 12)
    templates = [index % 12 for index in range(32)]
    values = size + of_template[templates] + rng.normal(0, 0.3 * size + 0.2 * delta, 32)
    control_values = rng.normal(0.2 * delta, 0.5 * delta, 32)
    reason = REFUSALS[number // 6 % 4] if verdict == "REFUTED" else None
    if reason == "opposite":
        values = values - 2.5 * delta
    if verdict == "NOT SPECIFIC":
        reason, control_values = "not_specific", control_values + values.mean()
    elif reason == "not_specific":
        values, control_values = values + 2 * delta, control_values + 2 * delta
    half = 0.35 * delta + (1.4 * delta if verdict == "INCONCLUSIVE" else 0.22 * size)
    mean = float(values.mean())
    if verdict == "INCONCLUSIVE":
        reason = [None, "n_too_small", "unmeasured"][number // 6 % 3]
    found = {
        "id": f"claim-{number:02d}",
        "statement": f"Removing {name or 'the circuit'} lowers the logit difference ({role or 'the circuit'}, {kind}).",
        "component": name or None,
        "role": role or None,
        "kind": kind,
        "quantity": "total_effect",
        "measured": f"Tested: at least {delta} {unit} on fresh prompts. Measured: {mean:.2f}.",
        "verdict": verdict,
        "reason": reason,
        "estimate": mean,
        "discovery": 1.2 * mean,
        "interval": [mean - half, mean + half],
        "low": mean - half,
        "high": mean + half,
        "unit": unit,
        "delta": delta,
        "delta_c": delta / 2,
        "control": "8 matched heads: layers.16.z[0], layers.18.z[4], layers.20.z[7], ..."
        if kind != "circuit"
        else None,
        "control_estimate": float(control_values.mean()) if kind != "circuit" else None,
        "n": 32,
        "n_groups": 12 if number % 4 else 11,
        "p": 0.00002 if verdict in ("SUPPORTED", "NOT SPECIFIC") else 0.0004 if verdict == "REFUTED" else 0.08,
        "p_holm": 0.0009 if verdict == "SUPPORTED" else 0.0142 if verdict == "REFUTED" else 1.0,
        "n_to_decide": 96 if reason == "n_too_small" else None,
        "scope": "general" if number % 4 else "on these templates only",
        "condition": {"corruption": "swap", "direction": "noising", "effect": "direct" if number % 5 == 0 else "total"},
        "values": values.tolist(),
        "control_values": control_values.tolist() if kind != "circuit" else None,
        "templates": [TEMPLATES[index].replace("{place}", "{other place}") for index in templates],
        "exploratory": number == 20,
    }
    return found | (UNMEASURED if reason == "unmeasured" else {})


UNMEASURED: Summary = {
    "estimate": None, "interval": None, "low": None, "high": None, "control_estimate": None, "n": 0, "n_groups": 0,
    "p": None, "values": [], "control_values": None, "templates": [],
}  # fmt: skip


def refute(rng: np.random.Generator, claim: Summary) -> None:
    if claim["verdict"] != "INCONCLUSIVE":
        values = rng.normal(0, claim["delta"], len(claim["values"]))
        mean, half = float(values.mean()), 0.4 * claim["delta"]
        claim.update(verdict="REFUTED", reason="absent", estimate=mean, interval=[mean - half, mean + half])
        claim.update(low=mean - half, high=mean + half, values=values.tolist())


def circuit_of(
    rng: np.random.Generator, effects: Summary, members: Sequence[tuple[str, str]], claims: list[Summary]
) -> Summary:
    main = effects["conditions"][0]
    rows = []
    for name, role in members:
        index = effects["components"].index(name)
        _, layer, part = name.split(".")
        effect = {"estimate": main["mean"][index], "low": main["low"][index], "high": main["high"][index]}
        if role == "no role fits" and len(rows) % 2:
            effect["low"] = -0.01
        rows.append(
            {
                "component": name,
                "kind": "mlp" if part == "mlp_out" else "head",
                "layer": int(layer),
                "head": None if part == "mlp_out" else int(part[2]),
                "effect": effect,
                "suppresses": effect["estimate"] < 0,
                "uncertain": effect["low"] < 0 < effect["high"],
                "marginal": {a: estimate(float(rng.uniform(0, 0.2)), 0.03) for a in ("zero", "mean", "resample")},
                "role": role,
                "role_scores": {} if role == "no role fits" else {role: 0.8, "attention sink": 0.1},
                "description": SENTENCES[role],
                "claims": [c["id"] for c in claims if c["component"] == name],
            }
        )
    return {
        "rule": "The smallest set of parts that keeps 80 % of the total effect under mean ablation of the rest, parts "
        "added by size of effect in either direction.",
        "members": rows,
        "edges": edges_of(rng, rows),
        "faithfulness": [
            faithfulness_of(rng, name, at) for name, at in (("zero", 0.61), ("mean", 0.83), ("resample", 0.74))
        ],
        "completeness": [{"ablation": a, **estimate(0.11, 0.05, 32)} for a in ("zero", "mean", "resample")],
    }


def edges_of(rng: np.random.Generator, rows: list[Summary]) -> list[Summary]:
    order = [(row["layer"], row["kind"] == "mlp", row["component"], row["suppresses"]) for row in rows]
    edges = [{"source": "embed", "target": row[2], "weight": 0.2} for row in order[:5]]
    for source in order:
        for target in order:
            if source[:2] < target[:2] and target[0] - source[0] < 12 and rng.uniform() < 0.38:
                weight = float(rng.gamma(1.2, 0.06)) * (-1 if source[3] or rng.uniform() < 0.1 else 1)
                edges.append({"source": source[2], "target": target[2], "weight": weight})
    late = [row for row in order if row[0] >= order[-1][0] * 0.55]
    return edges + [{"source": r[2], "target": "logits", "weight": -0.15 if r[3] else 0.25} for r in late]


def faithfulness_of(rng: np.random.Generator, ablation: str, at: float) -> Summary:
    values = rng.normal(0.05, 0.06, 199)
    return {
        "ablation": ablation,
        **estimate(at, 0.07, 32),
        "per_example": rng.normal(at, 0.16, 32).tolist(),
        "random": {
            "draws": 199,
            "median": float(np.median(values)),
            "q95": float(np.quantile(values, 0.95)),
            "p": float((1 + (values >= at).sum()) / 200),
            "values": values.tolist(),
        },
    }


def attention_of(rng: np.random.Generator, name: str, role: str, prompts: Sequence[list[str]]) -> Summary:
    looked_at = 2 if role == "name mover" else 11
    found = [{"tokens": list(tokens), "pattern": pattern_of(rng, len(tokens), looked_at)} for tokens in prompts]
    return {"component": name, "role": role, "prompts": found}


def pattern_of(rng: np.random.Generator, size: int, looked_at: int) -> list[list[float]]:
    scores = rng.normal(0, 0.7, (size, size))
    scores[:, 0] += 2.2
    scores[-1, min(looked_at, size - 2)] += 4.5
    scores[np.triu_indices(size, 1)] = -np.inf
    weights = np.exp(scores)
    pattern: list[list[float]] = (weights / weights.sum(1, keepdims=True)).round(4).tolist()
    return pattern


def count(claims: list[Summary], verdict: str) -> int:
    return sum(claim["verdict"] == verdict for claim in claims)
