"""The schema of summary.json, as data: `check` holds a summary against it, `markdown` prints it for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vesalius.report.consistency import check_consistency
from vesalius.report.nodes import Items, Named, Node, Record, Value, check_node, rows

NAME = "vesalius/summary/1"
VERDICTS = ("SUPPORTED", "REFUTED", "INCONCLUSIVE")
ABLATIONS = ("zero", "mean", "resample")
DIRECTIONS = ("noising", "denoising")


def _text(doc: str, *, null: bool = False, one_of: tuple[str, ...] = ()) -> Value:
    return Value("text", doc, null, one_of)


def _number(doc: str = "", *, null: bool = True) -> Value:
    return Value("number", doc, null)


def _whole(doc: str, *, null: bool = False) -> Value:
    return Value("whole number", doc, null)


def _flag(doc: str) -> Value:
    return Value("true or false", doc)


def _numbers(doc: str, *, null: bool = False) -> Items:
    return Items(_number(), doc, null)


def _interval(doc: str, **more: Node) -> Record:
    bounds = {"estimate": _number("mean"), "low": _number("95 % interval, lower end"), "high": _number("upper end")}
    return Record({**bounds, **more}, doc)


def _estimate(doc: str) -> Record:
    return _interval(doc, n=_whole("examples"))


QUESTION = Record(
    {
        "name": _text("name of the task, or of the file with your own pairs"),
        "text": _text("the question in words"),
        "corruptions": Items(_text(""), "names of the corruptions, the first is the main one"),
        "bos": _text('token text put before every prompt, or "none"'),
        "n": Record({"discovery": _whole("pairs"), "validation": _whole("pairs")}, "prompt pairs per split"),
        "seed": _whole("seed of everything random"),
        "prompts": Record(
            {
                "clean": _text("clean prompt"),
                "answer": _text("its answer"),
                "distractor": _text("the answer it is measured against"),
            },
            "one example",
            rest=_text("the same prompt under the corruption of that name"),
        ),
    },
    "what was asked",
)

MODEL = Record(
    {
        "name": _text("name"),
        "hash": _text("content hash of the weights"),
        "layers": _whole("layers"),
        "heads": _whole("query heads per layer"),
        "parameters": _whole("number of parameters"),
        "note": _text('what to know about these weights; may be ""'),
    },
    "which model",
)

GATE = Record(
    {
        "passed": _flag("whether the model does the task"),
        "thresholds": Record(
            {
                "accuracy": _number("least accuracy over all prompts", null=False),
                "template_accuracy": _number("least accuracy of one template", null=False),
            },
            "fixed before any patching",
        ),
        "accuracy": _estimate("share of prompts where the answer beats the distractor"),
        "logit_diff": _estimate("logit of the answer minus logit of the distractor"),
        "templates": Items(
            Record(
                {
                    "template": _text("label of the template (or other group)"),
                    "split": _text("split it belongs to"),
                    "n": _whole("prompts"),
                    "accuracy": _number("share of prompts answered right"),
                    "logit_diff": _number("mean logit difference"),
                    "passed": _flag("whether it is above the template threshold"),
                }
            ),
            "every template, the failed ones too",
        ),
    },
    "does the model do the task at all",
)

EFFECTS = Record(
    {
        "components": Items(_text(""), "site names; the arrays of every condition follow this order"),
        "unit": _text("unit of the effects"),
        "conditions": Items(
            Record(
                {
                    "corruption": _text("name of the corruption"),
                    "direction": _text("which way was patched", one_of=DIRECTIONS),
                    "mean": _numbers("mean effect per component; negative: the component suppresses the answer"),
                    "low": _numbers("95 % interval, lower end"),
                    "high": _numbers("upper end"),
                    "sd": _numbers("standard deviation over prompts"),
                    "p": _numbers("two-sided p-value"),
                    "q": _numbers("Benjamini-Hochberg adjusted over the components"),
                    "sign_flips": _numbers("share of prompts whose sign differs from the mean's"),
                }
            ),
            "corruption x direction; the first is the main one",
        ),
        "sign_conflicts": Items(_text(""), "components whose significant effects differ in sign between conditions"),
        "significant": Items(_text(""), "components with q <= .05"),
    },
    "exact patching of every component, on discovery; null when the study stopped before",
    null=True,
)

MEMBER = Record(
    {
        "component": _text("site name"),
        "kind": _text("kind of component", one_of=("head", "mlp", "embed")),
        "layer": _whole("layer", null=True),
        "head": _whole("head", null=True),
        "effect": _interval("effect in the main condition"),
        "suppresses": _flag("whether its effect works against the answer"),
        "marginal": Named(_interval("what faithfulness loses without it"), "by ablation (minimality)"),
        "role": _text('best role, or "no role fits"'),
        "role_scores": Named(_number(), "score of every role tried"),
        "description": _text("what it does, in one sentence"),
        "claims": Items(_text(""), "ids of the claims about it"),
    }
)

CIRCUIT = Record(
    {
        "rule": _text("how the members were chosen"),
        "members": Items(MEMBER, "the circuit"),
        "edges": Items(
            Record(
                {
                    "source": _text('member, or "embed"'),
                    "target": _text('member, or "logits"'),
                    "weight": _number("measured weight; negative: works against", null=False),
                }
            ),
            "how members act on each other",
        ),
        "faithfulness": Items(
            _interval(
                "",
                ablation=_text("what the rest was replaced by", one_of=ABLATIONS),
                n=_whole("examples"),
                per_example=_numbers("one per example"),
                random=Record(
                    {
                        "draws": _whole("random sets of the same size and composition"),
                        "median": _number("their median"),
                        "q95": _number("their 95 % quantile"),
                        "p": _number("share of random sets (and the circuit) that do as well"),
                        "values": _numbers("one per set"),
                    },
                    "the circuit against random sets",
                    null=True,
                ),
            ),
            "share of the total effect that the circuit keeps, per ablation of the rest",
        ),
        "completeness": Items(
            _interval("", ablation=_text("what the circuit was replaced by", one_of=ABLATIONS), n=_whole("examples")),
            "what the rest still does when the circuit is removed (share of the total effect)",
        ),
    },
    "null when the study stopped before",
    null=True,
)

CLAIM = Record(
    {
        "id": _text("content hash"),
        "statement": _text("what is claimed"),
        "component": _text("site name, or what else it is about", null=True),
        "role": _text("role it follows from", null=True),
        "kind": _text("kind of claim", one_of=("predictive", "causal", "circuit")),
        "check": _text("name of the check that measured it"),
        "verdict": _text("computed from the evidence", one_of=VERDICTS),
        "reason": _text("absent, opposite, too_small, not_specific; unmeasured, n_too_small; ...", null=True),
        "estimate": _number("mean effect, as measured"),
        "interval": Items(_number(), "95 % interval", null=True, length=2),
        "low": _number("its lower end"),
        "high": _number("its upper end"),
        "unit": _text("unit of estimate, interval, delta and values"),
        "delta": _number("smallest effect worth claiming"),
        "delta_c": _number("margin over the control"),
        "control": _text("what the matched control is", null=True),
        "control_estimate": _number("its mean effect"),
        "n": _whole("examples"),
        "n_groups": _whole("groups of examples (templates)"),
        "p": _number("p-value of the verdict's side"),
        "p_holm": _number("adjusted over the family"),
        "n_to_decide": _whole("examples that would decide, if undecided", null=True),
        "scope": _text('"general", or what the verdict is limited to'),
        "condition": Record(
            {
                "corruption": _text("corruption", null=True),
                "direction": _text("noising or denoising", null=True),
                "effect": _text("total or direct", null=True),
            },
            "under which it was tested",
            null=True,
        ),
        "values": _numbers("effect per example"),
        "control_values": _numbers("control per example", null=True),
        "templates": Items(_text(""), "template per example; empty when there are none"),
        "exploratory": _flag("registered after its data had been opened"),
    }
)

COST = Record(
    {
        "steps": Items(
            Record(
                {
                    "name": _text("step"),
                    "forwards": _number("forward passes spent (full-pass equivalents)"),
                    "naive_forwards": _number("what a plain loop over patches would have spent"),
                }
            ),
            "per step",
        ),
        "forwards": _number("total"),
        "naive_forwards": _number("total"),
    },
    "forward passes",
)

TIMINGS = Record(
    {
        "steps": Items(Record({"name": _text("step"), "seconds": _number("wall time")}), "per step"),
        "seconds": _number("total wall time"),
        "peak_memory_bytes": _number("peak resident memory"),
        "created_at": _text("when, ISO 8601"),
        "sealed_at": _text("when the family of claims was sealed, ISO 8601", null=True),
        "ledger_head": _text("last hash of the ledger; a shortened ledger no longer has it", null=True),
    },
    "the only part that differs between two runs with one seed",
)

REPRODUCE = Record(
    {
        "command": _text("command line"),
        "version": _text("version of vesalius"),
        "python": _text("version"),
        "torch": _text("version"),
        "transformers": _text("version"),
        "ledger": _text("file with claims, evidence and verdicts", null=True),
    },
    "how to get the same numbers",
)

FAMILY = Record(
    {"id": _text("content hash"), "m": _whole("claims corrected for")},
    "all claims of the study, sealed before validation was opened; null when there are none",
    null=True,
)

SUMMARY = Record(
    {
        "schema": _text("name of this schema", one_of=(NAME,)),
        "question": QUESTION,
        "model": MODEL,
        "control": _text("null for a study of the model itself", null=True, one_of=("random-weights",)),
        "stopped": _text("why the study stopped at the gate", null=True),
        "answer": Items(_text(""), "the answer, one sentence each"),
        "gate": GATE,
        "total_effect": Named(_estimate("clean minus corrupted, in logits"), "by corruption"),
        "effects": EFFECTS,
        "circuit": CIRCUIT,
        "attention": Items(
            Record(
                {
                    "component": _text("site name of the head"),
                    "role": _text("its role"),
                    "tokens": Items(_text(""), "token texts of the example"),
                    "pattern": Items(_numbers(""), "attention, one row per query token"),
                }
            ),
            "key heads on the example prompt",
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
