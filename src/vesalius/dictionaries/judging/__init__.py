"""How good a dictionary is: what it rebuilds, what a model loses by it, what its latents are like."""

from __future__ import annotations

from vesalius.dictionaries.judging.figures import WORDS, Figure
from vesalius.dictionaries.judging.geometry import Geometry, Shared, geometry, shared
from vesalius.dictionaries.judging.measure import quality
from vesalius.dictionaries.judging.result import Compared, Quality, Seed

__all__ = ["WORDS", "Compared", "Figure", "Geometry", "Quality", "Seed", "Shared", "geometry", "quality", "shared"]
