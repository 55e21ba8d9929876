"""How good a dictionary is: what it reconstructs, what a model loses by it, what its latents are like."""

from __future__ import annotations

from vesalius.dictionaries.evaluation.figures import WORDS, Figure
from vesalius.dictionaries.evaluation.geometry import Geometry, Shared, geometry, shared
from vesalius.dictionaries.evaluation.measure import quality
from vesalius.dictionaries.evaluation.result import Compared, Quality, Seed
from vesalius.dictionaries.evaluation.superposition import SUPERPOSED, Superposition, dimensionality, superposition
from vesalius.dictionaries.evaluation.verify import Verified, verify

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
