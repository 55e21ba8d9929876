"""IMAGES: networks that see."""

from __future__ import annotations

__all__: list[str] = []
