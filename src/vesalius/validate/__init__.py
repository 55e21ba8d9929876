"""VALIDATE: claims against fresh data, controls and nulls. Alone turns a measurement into Evidence."""

from __future__ import annotations

from vesalius.validate.checks import CHECKS, Check, Measures, check, measure, prefetch
from vesalius.validate.circuit import circuit_claims, circuit_evidence
from vesalius.validate.controls import Matched, matched_controls, reinitialised
from vesalius.validate.described import described

__all__ = [
    "CHECKS",
    "Check",
    "Matched",
    "Measures",
    "check",
    "circuit_claims",
    "circuit_evidence",
    "described",
    "matched_controls",
    "measure",
    "prefetch",
    "reinitialised",
]
