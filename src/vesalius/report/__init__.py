"""Self-contained HTML reports of a study, and the schema of the summary they are made from."""

from __future__ import annotations

from vesalius.report import fragments, schema
from vesalius.report.html import render, write

__all__ = ["fragments", "render", "schema", "write"]
