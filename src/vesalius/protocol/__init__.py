"""Claim, Family, Evidence, Verdict: data only, each with one canonical JSON and one content hash.

Standard library only. What a verdict follows from is in `vesalius.protocol.verdict`.
"""

from __future__ import annotations

from vesalius.protocol.canonical import canonical_json, content_hash
from vesalius.protocol.claim import Claim, Family, default_delta
from vesalius.protocol.evidence import Evidence, Verdict, unmeasured

__all__ = ["Claim", "Evidence", "Family", "Verdict", "canonical_json", "content_hash", "default_delta", "unmeasured"]
