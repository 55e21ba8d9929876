"""The schema of summary.json: what follows it is taken, what does not is refused by its path."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from summaries import VARIANTS, ioi
from summary_parts import Summary
from vesalius import report
from vesalius.errors import InputError, NotFiniteError, UnknownNameError

DOCS = Path(__file__).parent.parent / "docs" / "summary-schema.md"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_follows_the_schema_also_after_json(name: str) -> None:
    summary = VARIANTS[name]()
    report.schema.check(summary)
    report.schema.check(json.loads(json.dumps(summary, allow_nan=False)))


def _set(*path: Any) -> Callable[[Summary], None]:
    *inner, last, value = path

    def change(summary: Summary) -> None:
        at: Any = summary
        for key in inner:
            at = at[key]
        at[last] = value

    return change


def _drop(*path: Any) -> Callable[[Summary], None]:
    def change(summary: Summary) -> None:
        at: Any = summary
        for key in path[:-1]:
            at = at[key]
        del at[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (_set("extra", 1), UnknownNameError, r"unknown key in summary 'extra'; known: answer, attention"),
        (_set("claims", 3, "verdikt", "x"), UnknownNameError, r"key in summary\.claims\[3\] 'verdikt'"),
        (
            _drop("claims", 2, "n"),
            InputError,
            r"summary\.claims\[2\] lacks the key\(s\) n; what was not measured is null",
        ),
        (_drop("timings"), InputError, r"summary lacks the key\(s\) timings"),
        (_set("claims", 0, "estimate", float("nan")), NotFiniteError, r"summary\.claims\[0\]\.estimate is nan"),
        (
            _set("claims", 0, "verdict", "PROVEN"),
            InputError,
            r'verdict must be one of "SUPPORTED", "REFUTED", .*PROVEN',
        ),
        (_set("claims", 0, "n", 3.5), InputError, r"claims\[0\]\.n must be whole number; got 3\.5 \(float\)"),
        (_set("claims", 0, "n", True), InputError, r"claims\[0\]\.n must be whole number; got True"),
        (_set("answer", "one"), InputError, r"summary\.answer must be list of text; got 'one' \(str\)"),
        (
            _set("claims", 0, "verdict", "NOT_SPECIFIC"),
            InputError,
            r'must be one of "SUPPORTED", "REFUTED", "NOT SPECIFIC", "INCONCLUSIVE"; got .NOT_SPECIFIC',
        ),
        (_drop("claims", 0, "measured"), InputError, r"claims\[0\] lacks the key\(s\) measured"),
        (
            _set("claims", 0, "check", "attends"),
            UnknownNameError,
            r"key in summary\.claims\[0\] 'check'; known: .*quantity",
        ),
        (_set("question", "used", "discovery", 33), InputError, r"used\.discovery is 33 but there are 32 prompts"),
        (_drop("gate", "answer_rank"), InputError, r"summary\.gate lacks the key\(s\) answer_rank"),
        (
            _set("gate", "templates", -1, "passed", True),
            InputError,
            r"templates\[23\]\.passed is True; validation templates are not judged, so it must be null",
        ),
        (
            _set("circuit", "members", 0, "uncertain", True),
            InputError,
            r"members\[0\]\.uncertain is True but its interval is \[0\.",
        ),
        (_set("circuit", "members", 3, "uncertain", False), InputError, r"members\[3\]\.uncertain is False but"),
        (_set("attention", 1, "prompts", []), InputError, r"attention\[1\]\.prompts has 0 entries .* has 2"),
        (
            _set("attention", 1, "prompts", 0, "tokens", 3, "x"),
            InputError,
            r"attention\[1\]\.prompts\[0\]\.tokens differ .*every head has the same prompts",
        ),
        (_set("gate", None), InputError, r"summary\.gate is null; it must be object"),
        (_set("schema", "vesalius/summary/1"), InputError, r"summary\.schema must be one of"),
        (_set("claims", 0, "interval", [1.0]), InputError, r"interval has 1 entries; it must have 2"),
        (
            _set("claims", 0, "interval", [0.0, 9.0]),
            InputError,
            r"claims\[0\]\.interval is \[0\.0, 9\.0\] but low and high",
        ),
        (
            _set("claims", 0, "templates", ["a"]),
            InputError,
            r"claims\[0\]\.templates has 1 entries but .*values has 32",
        ),
        (_set("claims", 0, "control_values", [1.0]), InputError, r"control_values has 1 entries"),
        (
            _set("effects", "conditions", 1, "sd", [0.1]),
            InputError,
            r"conditions\[1\]\.sd has 1 entries but .*components has 301",
        ),
        (
            _set("effects", "conditions", 0, "corruption", "abd"),
            UnknownNameError,
            r"corruption in .*conditions\[0\] 'abd'; known: abc, swap",
        ),
        (
            _set("effects", "conditions", 0, "direction", "up"),
            InputError,
            r'direction must be one of "noising", "denoising"',
        ),
        (_set("effects", "sign_conflicts", ["layers.99.z[0]"]), UnknownNameError, r"layers\.99\.z\[0\].*301 in all"),
        (
            _set("circuit", "members", 0, "component", "layers.77.mlp_out"),
            UnknownNameError,
            r"members\[0\] 'layers\.77",
        ),
        (
            _set("circuit", "members", 0, "claims", ["nope"]),
            UnknownNameError,
            r"claim in summary\.circuit\.members\[0\] 'nope'",
        ),
        (
            _set("circuit", "edges", 4, "target", "layers.2.z[0]"),
            UnknownNameError,
            r"target of summary\.circuit\.edges\[4\]",
        ),
        (
            _set("attention", 0, "prompts", 0, "tokens", ["a", "b"]),
            InputError,
            r"attention\[0\]\.prompts\[0\]\.pattern has 16 entries but .*tokens has 2",
        ),
        (
            _set("attention", 1, "prompts", 0, "pattern", 3, [0.5]),
            InputError,
            r"attention\[1\]\.prompts\[0\]\.pattern\[3\] has 1 entries",
        ),
        (
            _drop("question", "prompts", "abc"),
            UnknownNameError,
            r"without an example in summary\.question\.prompts: 'abc'",
        ),
    ],
)
def test_what_breaks_the_schema_is_refused_by_its_path(
    change: Callable[[Summary], None], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    summary = copy.deepcopy(ioi())
    report.schema.check(summary)
    change(summary)
    with pytest.raises(kind, match=message):
        report.schema.check(summary)
    with pytest.raises(InputError, match=message):
        report.write(summary, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_documented_schema_is_the_one_that_is_checked() -> None:
    assert DOCS.read_text(encoding="utf-8") == report.schema.markdown()
    documented = set(re.findall(r"^\| `([^`]+)`", report.schema.markdown(), flags=re.M))
    assert _paths(json.loads(json.dumps(ioi())), "") <= documented | {""}
    assert all(row.count("|") == 4 for row in report.schema.markdown().splitlines() if row.startswith("| `"))


def _paths(value: Any, path: str) -> set[str]:
    """All paths of a JSON value as the documentation writes them; free names are recognised by their parents."""
    if isinstance(value, list):
        inner = [item for item in value if isinstance(item, (dict, list))]
        return {path}.union(*(_paths(item, path if isinstance(item, list) else f"{path}[]") for item in inner)) - {
            f"{path}[]"
        }
    if not isinstance(value, dict):
        return {path}
    free = path in ("total_effect", "circuit.members[].marginal", "circuit.members[].role_scores")
    found = {path} if path and not path.endswith("[]") else set()
    for key, item in value.items():
        name = "<name>" if free or (path == "question.prompts" and key in ("swap", "abc")) else key
        leaf = free and not isinstance(item, dict)
        found |= (
            {path}
            if leaf
            else _paths(item, f"{path}.{name}" if path else name) - ({f"{path}.<name>"} if free else set())
        )
    return found
