"""What you run: a network left as it is, with names for its tensors, and everything that reaches into it."""

from __future__ import annotations

from vesalius.model.model import Model

__all__ = ["Model"]
