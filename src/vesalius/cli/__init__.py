"""The command line."""

from __future__ import annotations

from vesalius.cli.app import main

__all__ = ["main"]
