"""DESCRIBE: what each member of a circuit does, as predictions from which claims are made."""

from __future__ import annotations

from vesalius.describe.asked import Asked, ask_rules
from vesalius.describe.attribution import attribute, integrated_gradients
from vesalius.describe.challenge import Challenge, challenge, revise
from vesalius.describe.circuit import describe_circuit
from vesalius.describe.client import Chat, ModelChat, ServerChat, Usage
from vesalius.describe.contrast_vector import ContrastVector, contrast_vector
from vesalius.describe.counterexamples import counterexamples, rivals
from vesalius.describe.described import described
from vesalius.describe.description import (
    FITS,
    Describer,
    Description,
    Descriptions,
    Discovery,
    Prediction,
    best_of,
    claim_of,
    claimed_apart,
    claims_of,
    describe,
    short_name,
)
from vesalius.describe.effect_split import EffectSplit, split_effects
from vesalius.describe.example import Example, PartExamples
from vesalius.describe.examples import ActivatingExamples, collect_examples
from vesalius.describe.foretold import foretold
from vesalius.describe.heads import HEADS_IN_TEXT, OTHERWISE_IN_TEXT
from vesalius.describe.illusion import Illusion, across_corpora
from vesalius.describe.learned import LearnedRules
from vesalius.describe.learning import Learned, learn
from vesalius.describe.lenses import Lens, LensReading, LogitLens, read_lens
from vesalius.describe.model_answers import ModelAnswerer
from vesalius.describe.overlooked import Overlooked, overlooked
from vesalius.describe.patchscopes import (
    FEW_SHOT,
    TOKEN_IDENTITY,
    AffineFitter,
    AffineMap,
    Inspection,
    fit_map,
    patchscope,
)
from vesalius.describe.predictions import claim_about
from vesalius.describe.reasoning import (
    Answerer,
    Faithfulness,
    Hint,
    HintEffects,
    Question,
    Reasoned,
    Reasoner,
    reasoning_faithfulness,
    wrong_number,
)
from vesalius.describe.roles import GOES_FIRST, NO_ROLE, ROLES, WHERE_IT_ACTS, Role, causal
from vesalius.describe.steered import Steering
from vesalius.describe.steering import steer
from vesalius.describe.stored_examples import load_examples, merge_examples, save_examples
from vesalius.describe.synthesis import synthesise
from vesalius.describe.synthetic import Synthesis, Synthetic
from vesalius.describe.token_shares import Attribution
from vesalius.describe.tuned import Translator, TunedLens, TunedLensFitter, fit_tuned_lens
from vesalius.model.direct import Direct, direct_effects

__all__ = [
    "FEW_SHOT",
    "FITS",
    "GOES_FIRST",
    "HEADS_IN_TEXT",
    "NO_ROLE",
    "OTHERWISE_IN_TEXT",
    "ROLES",
    "TOKEN_IDENTITY",
    "WHERE_IT_ACTS",
    "ActivatingExamples",
    "AffineFitter",
    "AffineMap",
    "Answerer",
    "Asked",
    "Attribution",
    "Challenge",
    "Chat",
    "ContrastVector",
    "Describer",
    "Description",
    "Descriptions",
    "Direct",
    "Discovery",
    "EffectSplit",
    "Example",
    "Faithfulness",
    "Hint",
    "HintEffects",
    "Illusion",
    "Inspection",
    "Learned",
    "LearnedRules",
    "Lens",
    "LensReading",
    "LogitLens",
    "ModelAnswerer",
    "ModelChat",
    "Overlooked",
    "PartExamples",
    "Prediction",
    "Question",
    "Reasoned",
    "Reasoner",
    "Role",
    "ServerChat",
    "Steering",
    "Synthesis",
    "Synthetic",
    "Translator",
    "TunedLens",
    "TunedLensFitter",
    "Usage",
    "across_corpora",
    "ask_rules",
    "attribute",
    "best_of",
    "causal",
    "challenge",
    "claim_about",
    "claim_of",
    "claimed_apart",
    "claims_of",
    "collect_examples",
    "contrast_vector",
    "counterexamples",
    "describe",
    "describe_circuit",
    "described",
    "direct_effects",
    "fit_map",
    "fit_tuned_lens",
    "foretold",
    "integrated_gradients",
    "learn",
    "load_examples",
    "merge_examples",
    "overlooked",
    "patchscope",
    "read_lens",
    "reasoning_faithfulness",
    "revise",
    "rivals",
    "save_examples",
    "short_name",
    "split_effects",
    "steer",
    "synthesise",
    "wrong_number",
]
