"""Long work that can be interrupted: atomic files, resumable blocks, estimates and progress events."""

from __future__ import annotations

from vesalius.jobs.blocks import Arrays, Blocks, write_atomic
from vesalius.jobs.progress import Estimate, Event, Sink, silent, track

__all__ = ["Arrays", "Blocks", "Estimate", "Event", "Sink", "silent", "track", "write_atomic"]
