"""Self-contained HTML pages of studies, dictionaries and steering, and the schemas of what they are made from."""

from __future__ import annotations

from vesalius.report import fragments, quality_schema, schema
from vesalius.report.html import render, write
from vesalius.report.quality_page import quality_answer, render_quality, write_quality
from vesalius.report.steering_page import render_steering, steering_answer, write_steering

__all__ = [
    "fragments",
    "quality_answer",
    "quality_schema",
    "render",
    "render_quality",
    "render_steering",
    "schema",
    "steering_answer",
    "write",
    "write_quality",
    "write_steering",
]
