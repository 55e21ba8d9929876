"""Models of tables that are interpretable by design, as networks whose parts are claimed about and tested like any.

Linear and logistic ones, generalised additive models, explainable boosting machines, concept bottlenecks,
Kolmogorov-Arnold networks; and a multi-layer perceptron to compare them with.
"""

from __future__ import annotations

from vesalius.interpretable.additive import TERMS, fit_gam, fit_linear
from vesalius.interpretable.boosted import fit_ebm, from_ebm
from vesalius.interpretable.bottleneck import CONCEPTS, Curve, Leakage, fit_bottleneck, intervened, leakage
from vesalius.interpretable.fitted import Fitted, describe_columns, fit_mlp
from vesalius.interpretable.kan import KAN, KANConfig, fit_kan, fit_kan_to, prune, update_grid, weights_of
from vesalius.interpretable.symbolic import LIBRARY, Suggestion, name_edges, suggest

__all__ = [
    "CONCEPTS",
    "KAN",
    "LIBRARY",
    "TERMS",
    "Curve",
    "Fitted",
    "KANConfig",
    "Leakage",
    "Suggestion",
    "describe_columns",
    "fit_bottleneck",
    "fit_ebm",
    "fit_gam",
    "fit_kan",
    "fit_kan_to",
    "fit_linear",
    "fit_mlp",
    "from_ebm",
    "intervened",
    "leakage",
    "name_edges",
    "prune",
    "suggest",
    "update_grid",
    "weights_of",
]
