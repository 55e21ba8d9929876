"""The schema of the summary of an explanation: what `studies.summarise_explained` gives and the pages are made from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vesalius.report.claim_schema import EXPLAINED_CLAIM, FAMILY, VERDICTS
from vesalius.report.nodes import Items, Named, Object, check_node, flag, number, rows, text, whole

NAME = "vesalius/explain/1"
_SPLITS = {"discovery": whole("for descriptions"), "validation": whole("for verdicts")}

PART = Object(
    {
        "part": text("name"),
        "page": text("its page, relative to the index"),
        "kind": text("unit, direction, latent, ..."),
        "density": number("share of the tokens for discovery that it fires on", null=False),
        "threshold": number("what it fires above", null=False),
        "fires": flag("whether it ever fires"),
        "sentence": text("the description with the figures of discovery, or why there is none"),
        "label": text("kind of description", null=True),
        "score": number("of its weakest prediction on discovery, 0 to 1; thresholds hold from .5 on"),
        "verdict": text("SUPPORTED when all of its claims are, else the worst of them", null=True, one_of=VERDICTS),
        "claims": Items(EXPLAINED_CLAIM, "what was claimed, and what became of it"),
        "rule_on_validation": Named(
            whole(""), "tokens; those that it fires on, that the rule picks, and both; null without a rule", null=True
        ),
        "rivals": Items(text("in words"), "rules that the documents for validation do not tell from the one above"),
        "given_up": Items(text("in words"), "what was said before, until inputs that were made to break it did"),
        "promoted": Items(Object({"token": text("token"), "effect": number("direct effect")}), "largest first"),
        "suppressed": Items(Object({"token": text("token"), "effect": number("direct effect")}), "smallest first"),
    }
)

EXPLAINED = Object(
    {
        "schema": text("name of this schema", one_of=(NAME,)),
        "model": Object({"name": text("name"), "hash": text("hash of the weights"), "note": text("what to know")}),
        "baseline": text(
            "random-directions, random-network, untrained-dictionary; null: the parts themselves", null=True
        ),
        "dictionary": Object(
            {
                "name": text("what it is"),
                "hash": text("content hash"),
                "latents": whole("latents in all"),
                "quality": text("its quality page, relative to the index; null when there is none", null=True),
                "l0": number("latents active per row, as its quality page says"),
                "fvu": number("fraction of variance unexplained"),
            },
            "of which the parts are latents",
            null=True,
        ),
        "texts": Object(
            {
                "tokens": Object(_SPLITS, "tokens of each half"),
                "documents": Object(_SPLITS, "documents of each half; none is in both"),
                "left_out": Named(whole(""), "documents, or contexts, that were left out, by why"),
                "context": whole("tokens run together"),
                "bos": text("token before every context"),
                "sha256": text("of the texts as they were given, where that is known", null=True),
            },
            "what was read",
        ),
        "seed": whole("seed of everything random"),
        "stopped": text("why the study went no further", null=True),
        "answer": Items(text(""), "what was found, in sentences"),
        "counts": Named(whole(""), "parts; described; never_fired; and by verdict"),
        "parts": Items(PART, "every part that was asked about, in that order"),
        "family": FAMILY,
        "timings": Object(
            {
                "sealed_at": text("when the documents for validation were opened", null=True),
                "ledger_head": text("hash of the ledger's last record", null=True),
                "seconds": number("wall time of this run"),
                "peak_memory_bytes": whole("most memory held", null=True),
                "created_at": text("when", null=True),
            },
            "what differs between two runs",
        ),
        "reproduce": Object(
            {
                "command": text("what was typed"),
                "version": text("of vesalius"),
                "python": text("version"),
                "torch": text("version"),
                "transformers": text("version"),
                "ledger": text("file", null=True),
            },
            "how to get the same",
        ),
    },
    "parts explained",
)


def check(found: Mapping[str, Any]) -> None:
    """Raises InputError, UnknownNameError or NotFiniteError, naming the path, unless this follows the schema."""
    check_node(EXPLAINED, found, "summary")


def markdown() -> str:
    """The schema as a Markdown page, one table per top-level key."""
    parts = [
        "# The schema of an explanation's summary.json",
        f'`vesalius explain` writes `summary.json` with `"schema": "{NAME}"` beside its pages. Every key is always '
        "there; what was not measured is `null` or an empty list; every number is finite. This page is generated from "
        "the description that every file is checked against; [explain.md](explain.md) says what is done.",
    ]
    for name, node in EXPLAINED.fields.items():
        table = "\n".join(f"| `{path}` | {kind} | {doc} |" for path, kind, doc in rows(node, name))
        parts.append(f"## {name}\n\n| path | type | meaning |\n| --- | --- | --- |\n{table}")
    return "\n\n".join(parts) + "\n"
