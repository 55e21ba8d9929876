"""The summary of a study of a concept, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vesalius.stats import Measurement
from vesalius.studies.probing import CHOICE, LOOK, TESTED, said_of
from vesalius.studies.study import Study
from vesalius.studies.summary import short_row

SCHEMA = "vesalius/probe-study/1"


def summarise_probed(study: Study, *, command: str, timings: Mapping[str, Any]) -> dict[str, Any]:
    """The summary as a dict: per label its `verdict` in words, per claim `verdict`, `estimate`, `interval` and `n`,
    per site accuracies and controls, and the table of splits fitted to and scored on."""
    asked, look, evidence = study.question, study[LOOK], study.get(TESTED) or {}
    said = said_of(study.verdicts)
    rows = [short_row(claim, verdict, evidence.get(claim.id)) for claim, verdict in
            zip(study.claims, study.verdicts, strict=True)]  # fmt: skip
    return {
        "schema": SCHEMA,
        "concept": asked.concept.name,
        "question": asked.text,
        "model": {"name": study.model.name, "hash": study.model.content_hash, "note": study.model.note},
        "examples": asked.concept.balance(),
        "answer": list(study.answer),
        "labels": [{"label": label, "verdict": one} for label, one in zip(asked.targets, said, strict=True)],
        "best": str(study[CHOICE].best),
        "probes": look.probes.to_json(),
        "transfer": {own: {other: _short(one) for other, one in line.items()} for own, line in look.transfer.items()},
        "after_erasure": [
            {"reader": leak.kind, "before": _short(leak.before), "after": _short(leak.after),
             "fitted_before": leak.fitted_before, "fitted_after": leak.fitted_after} for leak in look.leaks
        ],
        "claims": rows,
        "seed": asked.seed,
        "timings": {"sealed_at": study.sealed_at, "ledger_head": study.ledger_head or None, **timings},
        "command": command,
    }  # fmt: skip


def _short(found: Measurement) -> dict[str, Any]:
    return {name: getattr(found, name) for name in ("estimate", "low", "high", "n")}
