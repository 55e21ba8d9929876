"""ATTRIBUTION: why a model gives this number for this input, feature by feature, and whether that can be believed.

This is about one input at a time. What a part of a network does over many inputs is `vesalius.describe`'s subject.
"""

from __future__ import annotations

from vesalius.attribution.asking import question_of
from vesalius.attribution.explain import METHODS, explain, explained
from vesalius.attribution.explanation import Explanation
from vesalius.attribution.maps import coarse_map
from vesalius.attribution.question import ALWAYS, Question
from vesalius.attribution.trials import Curve, Trials, agreement_between, examine, over_inputs, rank_correlation

__all__ = [
    "ALWAYS",
    "METHODS",
    "Curve",
    "Explanation",
    "Question",
    "Trials",
    "agreement_between",
    "coarse_map",
    "examine",
    "explain",
    "explained",
    "over_inputs",
    "question_of",
    "rank_correlation",
]
