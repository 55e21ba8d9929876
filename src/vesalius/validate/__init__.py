"""VALIDATE: claims against fresh data, controls and nulls. Alone turns a measurement into Evidence."""

from __future__ import annotations

from collections.abc import Iterable

from vesalius.protocol import Verdict
from vesalius.quantities import Matched, matched_controls
from vesalius.validate.controls import reinitialised
from vesalius.validate.evidence import check, part_of, prepare


def all_supported(verdicts: Iterable[Verdict]) -> bool:
    """Whether a description has earned its name: it made claims, and ALL of them are SUPPORTED."""
    outcomes = [verdict.outcome for verdict in verdicts]
    return bool(outcomes) and all(outcome == "SUPPORTED" for outcome in outcomes)


__all__ = ["Matched", "all_supported", "check", "matched_controls", "part_of", "prepare", "reinitialised"]
