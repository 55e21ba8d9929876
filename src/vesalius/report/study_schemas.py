"""Schemas of the summaries of `vesalius heads`, `find` and `probe`: what is written is held against them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vesalius.errors import UnknownNameError
from vesalius.report.claim_schema import EXPLAINED_CLAIM, FAMILY, VERDICTS
from vesalius.report.nodes import Items, Named, Object, check_node, estimate, number, rows, text, whole

_CLAIM = Object({name: node for name, node in EXPLAINED_CLAIM.fields.items() if name != "legs"})
_MODEL = Object({"name": text("name"), "hash": text("hash of the weights"), "note": text("what to know")})
_SPLITS = {"discovery": whole("to discover on"), "validation": whole("to test on")}
_TIMINGS = Object(
    {
        "sealed_at": text("when the data for validation were opened", null=True),
        "ledger_head": text("hash of the ledger's last record", null=True),
        "seconds": number("wall time of this run"),
        "peak_memory_bytes": whole("most memory held", null=True),
        "created_at": text("when", null=True),
    }
)
_ANSWER = Items(text(""), "what was found, in sentences")
_CLAIMS = Items(_CLAIM, "what was claimed, and what became of it")
_SEED, _COMMAND = whole("seed of everything random"), text("what was typed")
_STOPPED = text("why the study went no further", null=True)

HEADS = Object(
    {
        "schema": text("name of this schema", one_of=("vesalius/heads/1",)),
        "model": _MODEL,
        "baseline": text("random-network; null: the model itself", null=True),
        "places": Named(text(""), "what a head can look at, in words"),
        "texts": Object(
            {
                "tokens": Object(_SPLITS, "tokens"),
                "documents": Object(_SPLITS, "documents; none is in both"),
                "left_out": Named(whole(""), "documents, or contexts, that were left out, by why"),
                "context": whole("tokens run together"),
                "bos": text("token before every context"),
                "sha256": text("of the texts as they were given, where that is known", null=True),
            }
        ),
        "seed": _SEED,
        "stopped": _STOPPED,
        "answer": _ANSWER,
        "heads": Items(
            Object(
                {
                    "part": text("name"),
                    "layer": whole("layer"),
                    "head": whole("number in its layer"),
                    "label": text("role; null where none fits", null=True),
                    "sentence": text("the role with the figures of discovery"),
                    "score": number("of its weakest prediction on discovery; thresholds hold from .5 on"),
                    "verdict": text("SUPPORTED when all its claims are, else the worst", null=True, one_of=VERDICTS),
                    "looks_at": Named(number("attention"), "on discovery, by place"),
                    "claims": _CLAIMS,
                }
            ),
            "every head of the model",
        ),
        "family": FAMILY,
        "timings": _TIMINGS,
        "reproduce": Object(
            {"command": _COMMAND, "version": text("of vesalius"), "ledger": text("file with the evidence")}
        ),
    }
)

FIND = Object(
    {
        "schema": text("name of this schema", one_of=("vesalius/find/1",)),
        "what": text("the concept"),
        "model": _MODEL,
        "parts": whole("parts that were ranked"),
        "texts": Object(_SPLITS, "texts"),
        "answer": _ANSWER,
        "stopped": _STOPPED,
        "claims": Items(_CLAIM, "the best parts; estimates are AUROCs less one half"),
        "timings": _TIMINGS,
        "command": _COMMAND,
    }
)

_CONTROL = Object({"words": text("what it is"), "value": number(""), "low": number(""), "high": number("")})
_SCORE = Object({**estimate("").fields, "n_groups": whole("groups of examples")})
PROBE = Object(
    {
        "schema": text("name of this schema", one_of=("vesalius/probe-study/1",)),
        "concept": text("the concept"),
        "question": text("in words"),
        "model": _MODEL,
        "examples": Named(Named(whole("")), "labels and groups of each split"),
        "answer": _ANSWER,
        "labels": Items(
            Object({"label": text("label"), "verdict": text("used; present, not used; not there; can't tell")})
        ),
        "best": text("the site that was chosen on discovery"),
        "probes": Object(
            {
                "concept": text("the concept"),
                "kind": text("kind of probe"),
                "at": text("token that was read"),
                "best": text("site"),
                "sites": Items(
                    Object(
                        {
                            "site": text("site"),
                            "train": number("accuracy on the examples that it was fitted to"),
                            "cross_validated": number("accuracy by which the site was chosen"),
                            "validation": _SCORE,
                            "shifted": Named(_SCORE, "on other distributions, by name"),
                            "calibration_error": number("expected calibration error"),
                            "controls": Named(_CONTROL, "what the accuracy stands beside"),
                            "flags": Items(text(""), "what to beware of"),
                            "p": number("of the accuracy against the commonest label"),
                        }
                    ),
                    "every site",
                ),
            }
        ),
        "transfer": Named(Named(estimate("")), "split that was fitted to -> split that was scored on -> accuracy"),
        "after_erasure": Items(
            Object(
                {
                    "reader": text("kind of reader"),
                    "before": estimate("accuracy on fresh examples"),
                    "after": estimate("the same after erasure"),
                    "fitted_before": number("accuracy on the examples that the eraser was fitted to"),
                    "fitted_after": number("the same after erasure"),
                }
            )
        ),
        "claims": _CLAIMS,
        "seed": _SEED,
        "timings": _TIMINGS,
        "command": _COMMAND,
    }
)
SCHEMAS: Mapping[str, Object] = {"vesalius heads": HEADS, "vesalius find": FIND, "vesalius probe": PROBE}
_BY_NAME = {schema.fields["schema"].one_of[0]: schema for schema in SCHEMAS.values()}  # type: ignore[union-attr]


def check(found: Mapping[str, Any]) -> None:
    """Raises InputError, UnknownNameError or NotFiniteError, naming the path, unless this follows the schema that it
    names."""
    name = str(found.get("schema"))
    if name not in _BY_NAME:
        raise UnknownNameError("schema of a study's summary", name, _BY_NAME)
    check_node(_BY_NAME[name], found, "summary")


def markdown() -> str:
    """The schemas as a Markdown page, one table each."""
    parts = [
        "# The schemas of other studies",
        "`summary.json` of these commands. Every key is always there; what was not measured is `null` or an empty "
        "list; every number is finite. This page is generated from the description that every file is checked "
        "against. Of the others: [`study`](summary-schema.md), [`explain`](explain-schema.md), "
        "[`quality`](quality-schema.md).",
    ]
    for command, schema in SCHEMAS.items():
        lines = [line for name, node in schema.fields.items() for line in rows(node, name)]
        table = "\n".join(f"| `{path}` | {kind} | {doc} |" for path, kind, doc in lines)
        parts.append(f"## {command}\n\n| path | type | meaning |\n| --- | --- | --- |\n{table}")
    return "\n\n".join(parts) + "\n"
