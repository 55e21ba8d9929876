"""Networks whose mechanism is known, and their task: what a method says about them can be marked right or wrong."""

from __future__ import annotations

from vesalius.toys.planted import PLANTED, VOCAB, planted_induction, random_model
from vesalius.toys.tasks import CORRUPTIONS, planted_pairs

__all__ = ["CORRUPTIONS", "PLANTED", "VOCAB", "planted_induction", "planted_pairs", "random_model"]
