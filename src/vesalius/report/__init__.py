"""Self-contained HTML pages of a study and of a dictionary's quality, and the schemas of what they are made from."""

from __future__ import annotations

from vesalius.report import fragments, quality_schema, schema
from vesalius.report.html import render, write
from vesalius.report.quality_page import quality_answer, render_quality, write_quality

__all__ = [
    "fragments",
    "quality_answer",
    "quality_schema",
    "render",
    "render_quality",
    "schema",
    "write",
    "write_quality",
]
