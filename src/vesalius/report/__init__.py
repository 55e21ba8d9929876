"""Self-contained HTML pages of studies, circuits, concepts, dictionaries, parts and steering, and their schemas."""

from __future__ import annotations

from vesalius.report import explain_schema, fragments, quality_schema, schema, study_schemas
from vesalius.report.by_design_page import render_by_design, write_by_design
from vesalius.report.edges_page import render_edges, write_edges
from vesalius.report.explain_page import page_names, write_explained
from vesalius.report.heads_page import render_heads, write_heads
from vesalius.report.html import render, write
from vesalius.report.probe_page import render_probed, write_probed
from vesalius.report.quality_page import link_explained, quality_answer, render_quality, write_quality
from vesalius.report.seeing_pages import summarise_channel, summarise_input, write_channel, write_curves, write_input
from vesalius.report.shortcut_page import render_shortcut, write_shortcut
from vesalius.report.steering_page import render_steering, steering_answer, write_steering

__all__ = [
    "explain_schema",
    "fragments",
    "link_explained",
    "page_names",
    "quality_answer",
    "quality_schema",
    "render",
    "render_by_design",
    "render_edges",
    "render_heads",
    "render_probed",
    "render_quality",
    "render_shortcut",
    "render_steering",
    "schema",
    "steering_answer",
    "study_schemas",
    "summarise_channel",
    "summarise_input",
    "write",
    "write_by_design",
    "write_channel",
    "write_curves",
    "write_edges",
    "write_explained",
    "write_heads",
    "write_input",
    "write_probed",
    "write_quality",
    "write_shortcut",
    "write_steering",
]
