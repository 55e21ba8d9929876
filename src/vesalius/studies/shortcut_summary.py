"""The summary of the medical case, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vesalius.inputs.table import DISCOVERY, VALIDATION
from vesalius.stats import Measurement
from vesalius.studies.cytology import AT_HOME, CONCEPTS, ELSEWHERE, MARK
from vesalius.studies.shortcut import AUDIT, COMPARISON, INSPECTION, TESTED
from vesalius.studies.study import Study
from vesalius.studies.summary import short_row

SCHEMA = "vesalius/shortcut/1"
DISCLAIMER = (
    "Nothing on this page is medical advice. The measurements are real and thirty years old; the hospitals, the "
    "scanner's mark and the network were made for this page, to show how such a fault is found."
)
BEFORE_USE = (
    "Patients of the hospitals where it would be used, enrolled in order and not chosen, each of them once.",
    "The share of false alarms and of missed cancers that clinicians can accept, fixed before any result is seen.",
    "Every device, staining and preparation in use there, since the next shortcut will be another one.",
    "A comparison with the cytologist's own reading, and with reading and network together.",
    "Approval by the authority in charge, a plan for what happens when the network is wrong, and monitoring since.",
)


def summarise_shortcut(study: Study, *, command: str, timings: Mapping[str, Any]) -> dict[str, Any]:
    """The summary as a dict: accuracies by model and place, what an audit, attribution and the claims said of the mark,
    and per claim `verdict`, `estimate`, `interval` and `n`."""
    asked, found, compared = study.question, study[INSPECTION], study[COMPARISON]
    evidence = study.get(TESTED) or {}
    claims = [
        {**short_row(claim, verdict, evidence.get(claim.id)), "split": claim.parameters.get("on", VALIDATION)}
        for claim, verdict in zip(study.claims, study.verdicts, strict=True)
    ]
    return {
        "schema": SCHEMA,
        "question": asked.text,
        "planted": asked.planted,
        "mark": MARK,
        "with_diagnosis_at_home": AT_HOME,
        "patients": {name: asked.table.splits.count(name) for name in (DISCOVERY, VALIDATION, ELSEWHERE)},
        "concepts": {name: list(columns) for name, columns in CONCEPTS.items()},
        "answer": list(study.answer),
        "audit": [{"column": name, "auroc": value} for name, value in study[AUDIT].aurocs],
        "attribution": {
            method: [{"column": name, "share": value} for name, value in some]
            for method, some in found.attributed.items()
        },
        "attribution_beats_random": _short(found.beats),
        "permutation": [{"column": name, "nats": value} for name, value in found.permuted],
        "accuracy": {name: {at: _short(one) for at, one in of.items()} for name, of in compared.accuracy.items()},
        "rates": {at: {name: _short(one) for name, one in of.items()} for at, of in compared.rates.items()},
        "claims": claims,
        "disclaimer": DISCLAIMER,
        "before_use": list(BEFORE_USE),
        "model": {"name": study.model.name, "hash": study.model.content_hash},
        "seed": asked.seed,
        "timings": {"sealed_at": study.sealed_at, "ledger_head": study.ledger_head or None, **timings},
        "command": command,
    }


def _short(found: Measurement) -> dict[str, Any]:
    return {name: getattr(found, name) for name in ("estimate", "low", "high", "n")}
