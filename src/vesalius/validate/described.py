"""When a description has earned its name."""

from __future__ import annotations

from collections.abc import Iterable

from vesalius.protocol import Verdict


def described(verdicts: Iterable[Verdict]) -> bool:
    """Whether a description is a supported feature: it made claims, and ALL of them are SUPPORTED."""
    outcomes = [verdict.outcome for verdict in verdicts]
    return bool(outcomes) and all(outcome == "SUPPORTED" for outcome in outcomes)
