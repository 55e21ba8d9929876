"""The answer of a study in two sentences, computed from its verdicts and estimates."""

from __future__ import annotations

from collections import Counter

from vesalius.circuits import share
from vesalius.records import Verdict
from vesalius.studies.task_circuit import Study

_PLURAL = {"previous-token": "previous-token heads", "duplicate-token": "duplicate-token heads", "induction": "induction heads",
           "S-inhibition": "S-inhibition heads", "name mover": "name movers", "S-suppressor": "S-suppressors",
           "negative mover": "negative movers", "attention sink": "attention sinks",
           "MLP writes toward the answer": "MLPs writing toward the answer",
           "MLP writes toward the distractor": "MLPs writing toward the distractor"}  # fmt: skip


def sentences(study: Study) -> list[str]:
    """Two sentences: what was found, and how it stood the test."""
    if study.stopped:
        return [study.stopped, "Nothing was taken apart and nothing is claimed."]
    return [_found(study), _stood(study)]


def supported_roles(study: Study) -> dict[str, list[str]]:
    """Role -> members all of whose claims are SUPPORTED."""
    assert study.family is not None and study.descriptions is not None
    outcome = {verdict.claim_id: verdict for verdict in study.verdicts}
    found: dict[str, list[str]] = {}
    for name, fit in study.descriptions.fits.items():
        if fit is not None and fit.claims and all(outcome[claim.id].outcome == "SUPPORTED" for claim in fit.claims):
            found.setdefault(fit.role, []).append(name)
    return found


def _short(name: str) -> str:
    """`layers.17.z[3]` -> 17.3; `layers.20.mlp_out` -> 20."""
    return name.removeprefix("layers.").replace(".z[", ".").replace("]", "").removesuffix(".mlp_out")


def _found(study: Study) -> str:
    assert study.circuit is not None and study.tested is not None and study.effects is not None
    runs = study.tested.kept["resample"]
    keeps = share(study.tested.bench, runs[0], runs[1], "resample")
    size = f"{len(study.circuit)} of {len(study.effects.components)} components"
    kept = f"keep {keeps.estimate:.0%} [{keeps.low:.0%}, {keeps.high:.0%}] of the effect on fresh prompts when all others are corrupted"
    roles = supported_roles(study)
    if not roles:
        return f"{size} {kept}; no description of any of them was supported."
    listed = [f"{len(names)} {_PLURAL.get(role, role) if len(names) > 1 else role} ({', '.join(map(_short, names))})"
              for role, names in sorted(roles.items(), key=lambda item: -len(item[1]))]  # fmt: skip
    return f"{size} {kept}; among them, with every claim supported: {_join(listed)}."


def _stood(study: Study) -> str:
    count = Counter(verdict.outcome for verdict in study.verdicts)
    assert study.circuit is not None and study.descriptions is not None
    bare = sum(fit is None for name, fit in study.descriptions.fits.items() if name != "embed")
    return (
        f"Of {len(study.verdicts)} claims, sealed before the test prompts were opened, {count['SUPPORTED']} were supported, "
        f"{count['REFUTED']} refuted and {count['INCONCLUSIVE']} left open{_scope(study.verdicts)}; {bare} members have no role that fits."
    )


def _scope(verdicts: tuple[Verdict, ...]) -> str:
    limited = sum(v.outcome == "SUPPORTED" and v.scope != "general" for v in verdicts)
    return f" ({limited} of the supported ones only within a stated scope)" if limited else ""


def _join(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
