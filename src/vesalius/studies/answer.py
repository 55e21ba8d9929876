"""The answer of a study of a task in two sentences, computed from its verdicts and measurements."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from vesalius.circuits import share
from vesalius.protocol import Verdict
from vesalius.quantities.circuit import ABLATIONS
from vesalius.stats import Measurement, measure
from vesalius.validate import all_supported

_NOUNS = {
    "previous-token": "previous-token head",
    "duplicate-token": "duplicate-token head",
    "induction": "induction head",
    "S-inhibition": "S-inhibition head",
    "copy suppression": "copy-suppression head",
    "MLP writes toward the answer": "MLP writing toward the answer",
    "MLP writes toward the distractor": "MLP writing toward the distractor",
}
"""What to call a member by its role, where that is not the role's name."""
_REST = {
    "resample": "when the rest gets corrupted values",
    "mean": "when it gets its mean",
    "zero": "when it gets zeros",
}

Made = Mapping[str, Any]
"""The artefacts of a finished study, by name."""


def sentences(made: Made) -> list[str]:
    """Two sentences: what was found, and how it stood the test; none where nothing was tested."""
    if "tested" not in made:
        return []
    return [_found(made), stood(made)]


def supported_roles(made: Made, verdicts: tuple[Verdict, ...]) -> dict[str, list[str]]:
    """Role -> members all of whose claims of that role are SUPPORTED."""
    by_member: dict[tuple[str, str], list[Verdict]] = {}
    for claim, verdict in zip(made["family"].claims, verdicts, strict=True):
        by_member.setdefault((str(claim.subject.get("name")), str(claim.role)), []).append(verdict)
    found: dict[str, list[str]] = {}
    for name, fit in made["descriptions"].fits.items():
        if fit is not None and all_supported(by_member.get((name, fit.label), [])):
            found.setdefault(fit.label, []).append(name)
    return found


def _short(name: str) -> str:
    """`layers.17.z[3]` -> 17.3; `layers.20.mlp_out` -> 20."""
    return name.removeprefix("layers.").replace(".z[", ".").replace("]", "").removesuffix(".mlp_out")


def _found(made: Made) -> str:
    nothing = _no_effect(made)
    if nothing:
        return nothing
    circuit, tested = made["circuit"], made["tested"]
    kept = {
        ablation: share(tested.runs, runs[0], runs[1], f"faithfulness, {ablation}")
        for ablation, runs in tested.with_only.items()
    }
    # The demanding one first; all three, because they differ, and one alone would flatter or shame.
    order = ("resample", *(ablation for ablation in ABLATIONS if ablation != "resample"))
    shares = ", ".join(f"{percent(kept[ablation])} {_REST[ablation]}" for ablation in order)
    size = f"{len(circuit)} of {len(made['effects'].components)} components"
    keeps = f"{size} {'keep' if len(circuit) > 1 else 'keeps'}, of the effect on fresh prompts, {shares}"
    roles = supported_roles(made, made["verdicts"])
    if not roles:
        return f"{keeps}; no member has a role with every claim supported."
    listed = [_named(role, names) for role, names in sorted(roles.items(), key=lambda item: -len(item[1]))]
    return f"{keeps}; among them, with every claim supported: {_join(listed)}."


def percent(measured: Measurement) -> str:
    """A share with its interval: "84% [71%, 97%]"."""
    interval = "" if measured.low is None or measured.high is None else f" [{measured.low:.0%}, {measured.high:.0%}]"
    return f"{measured.estimate:.0%}{interval}"


def _no_effect(made: Made) -> str:
    """A sentence when the corruption's total effect on the test prompts cannot be told from zero; else empty.

    Shares of such an effect would be quotients of noise.
    """
    runs = made["tested"].runs
    total = measure("total effect", runs.total(runs.main).double().numpy(), groups=runs.groups, clusters=runs.clusters)
    assert total.low is not None and total.high is not None
    if not total.low <= 0 <= total.high:
        return ""
    return (
        f"On fresh prompts the corruption changes the metric ({runs.contrast.metric.name}) by {total.estimate:+.2f} "
        f"[{total.low:+.2f}, {total.high:+.2f}] ({total.n} prompts in {total.n_groups} independent groups): too "
        "uncertain to be told from nothing, so no share of it is stated."
    )


def _named(role: str, members: list[str]) -> str:
    """ "3 name movers (17.3, 18.1, 20.2)"."""
    noun = _NOUNS.get(role, role.replace("acts at", "part acting at", 1))
    # What the plural is of: the word before the participle.
    first, participle, rest = re.match(r"(.*?)( writing| acting|$)(.*)", noun).groups()  # type: ignore[union-attr]
    many = "s" if len(members) > 1 else ""
    return f"{len(members)} {first}{many}{participle}{rest} ({', '.join(map(_short, members))})"


def stood(made: Made) -> str:
    """How the claims stood the test."""
    verdicts, count = made["verdicts"], Counter(verdict.outcome for verdict in made["verdicts"])
    bare = sum(fit is None for name, fit in made["descriptions"].fits.items() if name != "embed")
    supported = count["SUPPORTED"]
    few = sum(v.outcome == "INCONCLUSIVE" and v.reason == "n_too_small" for v in verdicts)
    left = count["INCONCLUSIVE"]
    why = " for too few prompts" if few == left > 0 else f" ({few} of them for too few prompts)" if few else ""
    special = f", {count['NOT SPECIFIC']} true but not specific" if count["NOT SPECIFIC"] else ""
    return (
        f"Of {len(verdicts)} claims, sealed before the test prompts were opened, {supported} "
        f"{'was' if supported == 1 else 'were'} supported, {count['REFUTED']} refuted{special} and "
        f"{left} left open{why}{_scope(verdicts)}; "
        f"{bare} {'member has' if bare == 1 else 'members have'} no role that fits."
    )


def _scope(verdicts: tuple[Verdict, ...]) -> str:
    limited = sum(v.outcome == "SUPPORTED" and v.scope != "general" for v in verdicts)
    return f" ({limited} of the supported ones only within a stated scope)" if limited else ""


def _join(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
