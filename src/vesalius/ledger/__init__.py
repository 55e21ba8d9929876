"""The ledger: an append-only SQLite file that enforces the protocol of a claim.

Claims are sealed as a family before their data are opened; the ledger hands out the data; evidence is appended once and
verdicts are computed from it whenever asked, stored nowhere.
"""

from __future__ import annotations

from vesalius.ledger.book import Examples, Ledger, Report, Splittable
from vesalius.ledger.rules import Opening

__all__ = ["Examples", "Ledger", "Opening", "Report", "Splittable"]
