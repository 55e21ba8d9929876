"""The answer of a study in two sentences, computed from its verdicts and estimates; and the same for a notebook."""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import TYPE_CHECKING

from vesalius.circuits import clusters, share
from vesalius.protocol import Claim, Verdict
from vesalius.stats import clustered_t

if TYPE_CHECKING:
    from vesalius.studies.task_circuit import Study

_NOUNS = {
    "previous-token": "previous-token head",
    "duplicate-token": "duplicate-token head",
    "induction": "induction head",
    "S-inhibition": "S-inhibition head",
    "MLP writes toward the answer": "MLP writing toward the answer",
    "MLP writes toward the distractor": "MLP writing toward the distractor",
}
"""What to call a member by its role, where that is not the role's name."""


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


def html(study: Study) -> str:
    """The answer and a table of claims, for notebooks."""
    answer = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences(study))
    if study.family is None:
        return answer
    rows = "".join(map(_row, study.family.claims, study.verdicts))
    heads = "".join(f"<th>{name}</th>" for name in ("verdict", "claim", "estimate", "95 % interval", "n"))
    return f"{answer}<table><tr>{heads}</tr>{rows}</table>"


def _row(claim: Claim, verdict: Verdict) -> str:
    outcome = f"{verdict.outcome} ({verdict.reason})" if verdict.reason else verdict.outcome
    estimate = "" if verdict.estimate is None else f"{verdict.estimate:+.3g}"
    interval = "" if verdict.low is None or verdict.high is None else f"{verdict.low:+.3g} to {verdict.high:+.3g}"
    cells = (outcome, claim.statement, estimate, interval, str(verdict.n))
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _short(name: str) -> str:
    """`layers.17.z[3]` -> 17.3; `layers.20.mlp_out` -> 20."""
    return name.removeprefix("layers.").replace(".z[", ".").replace("]", "").removesuffix(".mlp_out")


def _found(study: Study) -> str:
    assert study.circuit is not None and study.tested is not None and study.effects is not None
    nothing = _no_effect(study)
    if nothing:
        return nothing
    runs = study.tested.kept["resample"]
    keeps = share(study.tested.bench, runs[0], runs[1], "resample")
    size = f"{len(study.circuit)} of {len(study.effects.components)} components"
    kept = (
        f"{'keep' if len(study.circuit) > 1 else 'keeps'} {keeps.estimate:.0%} [{keeps.low:.0%}, {keeps.high:.0%}] of "
        "the effect on fresh prompts when all others are corrupted"
    )
    roles = supported_roles(study)
    if not roles:
        return f"{size} {kept}; no description of any of them was supported."
    listed = [_named(role, names) for role, names in sorted(roles.items(), key=lambda item: -len(item[1]))]
    return f"{size} {kept}; among them, with every claim supported: {_join(listed)}."


def _no_effect(study: Study) -> str:
    """A sentence when the corruption's total effect on the test prompts cannot be told from zero; else empty.

    Shares of such an effect would be quotients of noise.
    """
    assert study.tested is not None
    bench = study.tested.bench
    total = clustered_t(bench.total(bench.main).double().numpy(), *clusters(bench))
    if not total.low <= 0 <= total.high:
        return ""
    return (
        f"On fresh prompts the corruption changes the logit difference by {total.estimate:+.2f} [{total.low:+.2f}, "
        f"{total.high:+.2f}] ({total.n} prompts in {total.n_groups} independent groups): too uncertain to be told from "
        "nothing, so no share of it is stated."
    )


def _named(role: str, members: list[str]) -> str:
    """ "3 name movers (17.3, 18.1, 20.2)"."""
    first, space, rest = _NOUNS.get(role, role).partition(" writing")
    many = "s" if len(members) > 1 else ""
    return f"{len(members)} {first}{many}{space}{rest} ({', '.join(map(_short, members))})"


def _stood(study: Study) -> str:
    count = Counter(verdict.outcome for verdict in study.verdicts)
    assert study.circuit is not None and study.descriptions is not None
    bare = sum(fit is None for name, fit in study.descriptions.fits.items() if name != "embed")
    supported = count["SUPPORTED"]
    return (
        f"Of {len(study.verdicts)} claims, sealed before the test prompts were opened, {supported} "
        f"{'was' if supported == 1 else 'were'} supported, {count['REFUTED']} refuted and {count['INCONCLUSIVE']} left "
        f"open{_scope(study.verdicts)}; {bare} {'member has' if bare == 1 else 'members have'} no role that fits."
    )


def _scope(verdicts: tuple[Verdict, ...]) -> str:
    limited = sum(v.outcome == "SUPPORTED" and v.scope != "general" for v in verdicts)
    return f" ({limited} of the supported ones only within a stated scope)" if limited else ""


def _join(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
