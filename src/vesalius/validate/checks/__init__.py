"""Checks by name, and from claims to evidence."""

from __future__ import annotations

from vesalius.validate.checks.evidence import check, prefetch
from vesalius.validate.checks.figures import CHECKS, Check, Measures, measure

__all__ = ["CHECKS", "Check", "Measures", "check", "measure", "prefetch"]
