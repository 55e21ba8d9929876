"""The front door: a name becomes a `Model`."""

from __future__ import annotations

from vesalius.model.loading.front import DEMO, load

__all__ = ["DEMO", "load"]
