"""Made-up summaries that look like real studies, for tests of the report; seeds are fixed."""

from __future__ import annotations

import numpy as np

from summary_parts import (
    PROMPTS,
    ROLES,
    TOKENS,
    Summary,
    attention_of,
    circuit_of,
    claims_of,
    count,
    effects_of,
    estimate,
    faithfulness_of,
    frame,
    names_of,
    refute,
)


def ioi(seed: int = 0) -> Summary:
    """30 layers x 9 heads, two corruptions, 20 members, 46 claims of every verdict and reason."""
    rng = np.random.default_rng(seed)
    components = names_of(30, 9)
    members = [(name, role) for name, role in ROLES]
    effects = effects_of(rng, components, members, ["swap", "abc"])
    claims = claims_of(rng, members)
    circuit = circuit_of(rng, effects, members, claims)
    summary = frame("ioi", ["swap", "abc"], claims) | {
        "effects": effects,
        "circuit": circuit,
        "attention": [
            attention_of(rng, name, role, PROMPTS) for name, role in members if role in ("name mover", "S-inhibition")
        ],
    }
    kept = circuit["faithfulness"][1]["estimate"]
    summary["answer"] = [
        "The model finds the name that occurs once: 3 duplicate-token and induction heads notice the repeated name, "
        "3 S-inhibition heads turn attention away from it, and 3 name movers copy the other one "
        f"(the circuit of 20 parts keeps {100 * kept:.0f} % of the effect under mean ablation).",
        f"Of 46 claims about these parts {count(claims, 'SUPPORTED')} were supported on fresh prompts, "
        f"{count(claims, 'REFUTED')} were refuted, {count(claims, 'NOT SPECIFIC')} were not specific and "
        f"{count(claims, 'INCONCLUSIVE')} stay open.",
    ]
    return summary


def stopped() -> Summary:
    """The model does not do the task."""
    summary = ioi()
    for entry in summary["gate"]["templates"]:
        judged = entry["split"] == "discovery"
        entry.update(preference=0.25, top1=0.0, logit_diff=-0.4, passed=False if judged else None, used=False)
    summary["question"]["used"] = {"discovery": 0, "validation": 0}
    summary["gate"].update(passed=False, preference=estimate(0.41, 0.12, 64), logit_diff=estimate(-0.3, 0.4, 64))
    return summary | {
        "stopped": "A preference of .41 is below the .80 that was required; there is nothing to explain.",
        "answer": [
            "The model does not do this task: it prefers the answer in 41 % of 64 prompts.",
            "Nothing was patched.",
        ],
        "total_effect": {},
        "effects": None,
        "circuit": None,
        "attention": [],
        "claims": [],
        "family": None,
    }


def control() -> Summary:
    """Random weights: nothing supported, and the trained model's claims fail too."""
    summary = ioi()
    rng = np.random.default_rng(5)
    for claim in summary["claims"]:
        refute(rng, claim)
    trained = [dict(claim) for claim in ioi()["claims"][:12]]
    for claim in trained:
        refute(rng, claim)
    summary["circuit"]["faithfulness"] = [faithfulness_of(rng, name, 0.04) for name in ("zero", "mean", "resample")]
    answer = ["With random weights no circuit does the task: 0 of 46 claims were supported.", "That was expected."]
    return summary | {"control": "random-weights", "answer": answer, "trained_claims_on_control": trained}


def without_groups() -> Summary:
    """User pairs from a file: one template label for everything, no template per example."""
    summary = ioi()
    summary["question"].update(name="mine.jsonl", text="How does the model complete my own prompts?")
    summary["gate"]["templates"] = []
    for claim in summary["claims"]:
        claim.update(templates=[], n_groups=claim["n"], scope="on these prompts only")
    return summary


def one_corruption() -> Summary:
    """Swap only."""
    summary = ioi()
    summary["question"]["corruptions"] = ["swap"]
    del summary["question"]["prompts"]["abc"], summary["total_effect"]["abc"]
    summary["effects"]["conditions"] = [c for c in summary["effects"]["conditions"] if c["corruption"] == "swap"]
    return summary


def tiny() -> Summary:
    """Two layers of two heads, a circuit of three parts."""
    rng = np.random.default_rng(1)
    members = [
        ("layers.0.z[1]", "previous token"),
        ("layers.1.z[0]", "induction"),
        ("layers.1.mlp_out", "no role fits"),
    ]
    effects = effects_of(rng, names_of(2, 2), members, ["swap", "abc"])
    claims = claims_of(rng, members)
    summary = frame("induction", ["swap", "abc"], claims)
    summary["model"].update(layers=2, heads=2, parameters=12_345, name="tiny", note="")
    attention = [attention_of(rng, "layers.1.z[0]", "induction", [TOKENS[:5]])]
    return summary | {"effects": effects, "circuit": circuit_of(rng, effects, members, claims), "attention": attention}


def long_statements() -> Summary:
    """Sentences and names far longer than anyone planned for."""
    summary = ioi()
    for claim in summary["claims"][::5]:
        claim["statement"] = (
            "When the head is removed " + "and the other heads of the same layer are kept as they were " * 9
        )
        claim["control"] = ", ".join(f"layers.{i}.z[{i % 9}]" for i in range(30))
    summary["claims"][1]["statement"] = "a" * 400
    summary["gate"]["templates"][0]["template"] = "word " * 60
    summary["answer"][0] *= 3
    return summary


def hostile() -> Summary:
    """HTML wherever a text of the user or the tokenizer can come from."""
    summary = ioi()
    attack = "<script>alert(1)</script>"
    for head in summary["attention"]:
        head["prompts"][0]["tokens"][3] = attack
    summary["question"]["prompts"].update(clean=f"{attack} said", swap='"><img src=x onerror=alert(2)>', abc="&lt;")
    summary["question"]["text"] = summary["model"]["name"] = attack
    summary["claims"][0].update(statement=attack, control=attack)
    summary["circuit"]["members"][0].update(description=attack)
    summary["gate"]["templates"][0]["template"] = attack
    return summary


VARIANTS = {
    "ioi": ioi,
    "stopped": stopped,
    "control": control,
    "without_groups": without_groups,
    "one_corruption": one_corruption,
    "tiny": tiny,
    "long_statements": long_statements,
    "hostile": hostile,
}
