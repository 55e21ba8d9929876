"""How good a dictionary is: what it rebuilds, what a model loses by it, what its latents are like."""

from __future__ import annotations

from vesalius.dictionaries.judging.figures import WORDS, Figure
from vesalius.dictionaries.judging.geometry import Geometry, Shared, geometry, shared
from vesalius.dictionaries.judging.measure import quality
from vesalius.dictionaries.judging.result import Compared, Quality, Seed
from vesalius.dictionaries.judging.superposition import SUPERPOSED, Superposition, dimensionality, superposition
from vesalius.dictionaries.judging.verify import Verified, verify

__all__ = [
    "SUPERPOSED",
    "WORDS",
    "Compared",
    "Figure",
    "Geometry",
    "Quality",
    "Seed",
    "Shared",
    "Superposition",
    "Verified",
    "dimensionality",
    "geometry",
    "quality",
    "shared",
    "superposition",
    "verify",
]
