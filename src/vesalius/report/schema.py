"""The schema of summary.json, as data: `check` holds a summary against it, `markdown` prints it for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vesalius.errors import FileFormatError
from vesalius.jobs.untrusted import read_json
from vesalius.report.claim_schema import CLAIM, FAMILY
from vesalius.report.consistency import check_consistency
from vesalius.report.nodes import (
    Items,
    Named,
    Object,
    check_node,
    estimate,
    flag,
    interval,
    number,
    numbers,
    rows,
    text,
    whole,
)

NAME = "vesalius/summary/2"
ABLATIONS = ("zero", "mean", "resample")
DIRECTIONS = ("noising", "denoising")


QUESTION = Object(
    {
        "name": text("name of the task, or of the file with your own pairs"),
        "text": text("the question in words"),
        "corruptions": Items(text(""), "names of the corruptions, the first is the main one"),
        "bos": text('token text put before every prompt, or "none"'),
        "n": Object({"discovery": whole("pairs"), "validation": whole("pairs")}, "prompt pairs per split"),
        "used": Object(
            {"discovery": whole("pairs"), "validation": whole("pairs")},
            "prompt pairs that the study really used: without templates that failed the gate",
        ),
        "seed": whole("seed of everything random"),
        "prompts": Object(
            {
                "clean": text("clean prompt"),
                "answer": text("its answer"),
                "distractor": text("the answer it is measured against"),
            },
            "one example, of those that were used",
            rest=text("the same prompt under the corruption of that name"),
        ),
    },
    "what was asked",
)

MODEL = Object(
    {
        "name": text("name"),
        "hash": text("content hash of the weights"),
        "layers": whole("layers"),
        "heads": whole("query heads per layer"),
        "parameters": whole("number of parameters"),
        "note": text('what to know about these weights; may be ""'),
    },
    "which model",
)

GATE = Object(
    {
        "passed": flag("whether the model does the task"),
        "thresholds": Object(
            {
                "preference": number("least preference over all prompts", null=False),
                "template_preference": number("a template's preference has to be above it", null=False),
            },
            "fixed before any patching",
        ),
        "preference": estimate("share of prompts where the answer beats the distractor"),
        "top1": estimate("share of prompts where the answer is the likeliest of all tokens"),
        "answer_probability": estimate("probability of the answer"),
        "answer_rank": estimate("median rank of the answer among all tokens, 1 is the likeliest"),
        "logit_diff": estimate("logit of the answer minus logit of the distractor"),
        "templates": Items(
            Object(
                {
                    "template": text("label of the template (or other group)"),
                    "split": text("split it belongs to"),
                    "n": whole("prompts"),
                    "preference": number("share of its prompts where the answer beats the distractor"),
                    "top1": number("share of its prompts where the answer is the likeliest token"),
                    "logit_diff": number("mean logit difference"),
                    "passed": flag(
                        "whether it is above the template threshold; null on validation, whose rows are never chosen "
                        "by what the model answers",
                        null=True,
                    ),
                    "used": flag("whether its prompts were used"),
                }
            ),
            "every template, the failed ones too",
        ),
    },
    "does the model do the task at all",
)

EFFECTS = Object(
    {
        "components": Items(text(""), "site names; the arrays of every condition follow this order"),
        "unit": text("unit of the effects"),
        "conditions": Items(
            Object(
                {
                    "corruption": text("name of the corruption"),
                    "direction": text("which way was patched", one_of=DIRECTIONS),
                    "mean": numbers("mean effect per component; negative: the component suppresses the answer"),
                    "low": numbers("95 % interval, lower end"),
                    "high": numbers("upper end"),
                    "sd": numbers("standard deviation over prompts"),
                    "p": numbers("two-sided p-value"),
                    "q": numbers("Benjamini-Hochberg adjusted over the components"),
                    "sign_flips": numbers("share of prompts whose sign differs from the mean's"),
                }
            ),
            "corruption x direction; the first is the main one",
        ),
        "sign_conflicts": Items(text(""), "components whose significant effects differ in sign between conditions"),
        "significant": Items(text(""), "components with q <= .05"),
    },
    "exact patching of every component, on discovery; null when the study stopped before",
    null=True,
)

MEMBER = Object(
    {
        "component": text("name of the part: a site, a latent, a neuron, a direction, ..."),
        "kind": text("kind of part: head, mlp, embed, latent, ..."),
        "layer": whole("layer", null=True),
        "head": whole("head", null=True),
        "effect": interval("effect in the main condition"),
        "suppresses": flag("whether its effect works against the answer"),
        "uncertain": flag("whether the interval of its effect spans zero"),
        "marginal": Named(interval("what faithfulness loses without it"), "by ablation (minimality)"),
        "role": text('best role, or "no role fits"'),
        "role_scores": Named(number(), "score of every role tried"),
        "description": text("what it does, in one sentence"),
        "claims": Items(text(""), "ids of the claims about it"),
    }
)

CIRCUIT = Object(
    {
        "rule": text("how the members were chosen"),
        "members": Items(MEMBER, "the circuit"),
        "edges": Items(
            Object(
                {
                    "source": text('member, or "embed"'),
                    "target": text('member, or "logits"'),
                    "weight": number(
                        "share of the target's change, clean to corrupted, that the source alone brings about; to "
                        "logits: its direct effect as a share of the total effect; negative: works against",
                        null=False,
                    ),
                }
            ),
            "how members act on each other",
        ),
        "faithfulness": Items(
            interval(
                "",
                ablation=text("what the rest was replaced by", one_of=ABLATIONS),
                n=whole("examples"),
                per_example=numbers("one per example"),
                random=Object(
                    {
                        "draws": whole("random sets of the same size and composition"),
                        "median": number("their median"),
                        "q95": number("their 95 % quantile"),
                        "p": number("share of random sets (and the circuit) that do as well"),
                        "values": numbers("one per set"),
                    },
                    "the circuit against random sets",
                    null=True,
                ),
            ),
            "share of the total effect that the circuit keeps, per ablation of the rest",
        ),
        "completeness": Items(
            interval("", ablation=text("what the circuit was replaced by", one_of=ABLATIONS), n=whole("examples")),
            "what the rest still does when the circuit is removed (share of the total effect)",
        ),
    },
    "null when the study stopped before",
    null=True,
)

COST = Object(
    {
        "steps": Items(
            Object(
                {
                    "name": text("step"),
                    "forwards": number("forward passes spent (full-pass equivalents)"),
                    "naive_forwards": number("what a plain loop over patches would have spent"),
                }
            ),
            "per step",
        ),
        "forwards": number("total"),
        "naive_forwards": number("total"),
    },
    "forward passes",
)

TIMINGS = Object(
    {
        "steps": Items(Object({"name": text("step"), "seconds": number("wall time")}), "per step"),
        "seconds": number("total wall time"),
        "peak_memory_bytes": number("peak resident memory"),
        "created_at": text("when, ISO 8601"),
        "sealed_at": text("when the family of claims was sealed, ISO 8601", null=True),
        "ledger_head": text("last hash of the ledger; a shortened ledger no longer has it", null=True),
    },
    "the only part that differs between two runs with one seed",
)

REPRODUCE = Object(
    {
        "command": text("command line"),
        "version": text("version of vesalius"),
        "python": text("version"),
        "torch": text("version"),
        "transformers": text("version"),
        "ledger": text("file with claims, evidence and verdicts", null=True),
    },
    "how to get the same numbers",
)

SUMMARY = Object(
    {
        "schema": text("name of this schema", one_of=(NAME,)),
        "question": QUESTION,
        "model": MODEL,
        "control": text("null for a study of the model itself", null=True, one_of=("random-weights",)),
        "stopped": text("why the study stopped at the gate", null=True),
        "answer": Items(text(""), "the answer, one sentence each"),
        "gate": GATE,
        "total_effect": Named(estimate("clean minus corrupted, in logits"), "by corruption"),
        "effects": EFFECTS,
        "circuit": CIRCUIT,
        "attention": Items(
            Object(
                {
                    "component": text("site name of the head"),
                    "role": text("its role"),
                    "prompts": Items(
                        Object(
                            {
                                "tokens": Items(text(""), "token texts of the prompt"),
                                "pattern": Items(numbers(""), "attention, one row per query token"),
                            }
                        ),
                        "the same prompts for every head",
                    ),
                }
            ),
            "key heads on a few prompts",
        ),
        "claims": Items(CLAIM, "every claim with its verdict"),
        "family": FAMILY,
        "trained_claims_on_control": Items(CLAIM, "the trained model's claims, tested on the control", null=True),
        "cost": COST,
        "timings": TIMINGS,
        "reproduce": REPRODUCE,
    },
    "a study, from its question to its verdicts",
)


def check(summary: Mapping[str, Any]) -> None:
    """Raises unless the summary follows the schema and its parts fit each other, naming the path of the difference.

    UnknownNameError for an unknown key (listing the known), NotFiniteError for NaN or infinity, InputError for a
    missing key, a wrong type, arrays of different lengths, or a reference to a component or claim that is not there.
    """
    check_node(SUMMARY, summary, "summary")
    check_consistency(summary)


def read(path: Path) -> dict[str, Any]:
    """The summary in a file, checked. Raises FileFormatError for what cannot be read as JSON, else as `check`."""
    try:
        summary = read_json(path)
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} cannot be read as a summary: {error}") from error
    check(summary)
    found: dict[str, Any] = summary
    return found


def markdown() -> str:
    """The schema as a Markdown page: one table per top-level key with path, type and meaning."""
    parts = [
        "# The schema of summary.json",
        f'Every study writes `summary.json` with `"schema": "{NAME}"` beside its report. Every key is always there; '
        "what was not measured is `null`; every number is finite. Intervals are 95 % and respect the groups of "
        "prompts. This page is generated from the description that every summary is checked against.",
    ]
    for name, node in SUMMARY.fields.items():
        parts.append(f"## {name}\n\n| path | type | meaning |\n| --- | --- | --- |\n{_table(rows(node, name))}")
    return "\n\n".join(parts) + "\n"


def _table(found: Any) -> str:
    return "\n".join(f"| `{path}` | {kind} | {doc} |" for path, kind, doc in found)
