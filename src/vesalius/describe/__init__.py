"""DESCRIBE: what each member of a circuit does, as predictions from which claims are made."""

from __future__ import annotations

from vesalius.describe.attribution import attribute, integrated_gradients
from vesalius.describe.circuit import describe_circuit
from vesalius.describe.description import (
    FITS,
    Describer,
    Description,
    Descriptions,
    Discovery,
    Prediction,
    best_of,
    claim_of,
    claims_of,
    describe,
    short_name,
)
from vesalius.describe.example import Example, PartExamples
from vesalius.describe.examples import ActivatingExamples, collect_examples
from vesalius.describe.illusion import Illusion, across_corpora
from vesalius.describe.learned import Learned, LearnedRules, learn
from vesalius.describe.predictions import claim_about
from vesalius.describe.roles import GOES_FIRST, NO_ROLE, ROLES, Role, causal
from vesalius.describe.stored_examples import load_examples, merge_examples, save_examples
from vesalius.describe.synthesis import synthesise
from vesalius.describe.synthetic import Synthesis, Synthetic
from vesalius.describe.token_shares import Attribution

__all__ = [
    "FITS",
    "GOES_FIRST",
    "NO_ROLE",
    "ROLES",
    "ActivatingExamples",
    "Attribution",
    "Describer",
    "Description",
    "Descriptions",
    "Discovery",
    "Example",
    "Illusion",
    "Learned",
    "LearnedRules",
    "PartExamples",
    "Prediction",
    "Role",
    "Synthesis",
    "Synthetic",
    "across_corpora",
    "attribute",
    "best_of",
    "causal",
    "claim_about",
    "claim_of",
    "claims_of",
    "collect_examples",
    "describe",
    "describe_circuit",
    "integrated_gradients",
    "learn",
    "load_examples",
    "merge_examples",
    "save_examples",
    "short_name",
    "synthesise",
]
