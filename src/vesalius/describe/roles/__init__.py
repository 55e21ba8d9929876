"""The role library: one executable role a file."""

from __future__ import annotations

from vesalius.describe.context import Role
from vesalius.describe.roles.attention_sink import AttentionSink
from vesalius.describe.roles.duplicate_token import DuplicateToken
from vesalius.describe.roles.induction import Induction
from vesalius.describe.roles.mlp_writer import TOWARD_ANSWER, TOWARD_DISTRACTOR, MlpWriter
from vesalius.describe.roles.name_mover import NameMover
from vesalius.describe.roles.negative_mover import NegativeMover
from vesalius.describe.roles.previous_token import PreviousToken
from vesalius.describe.roles.s_inhibition import SInhibition, promising
from vesalius.describe.roles.s_suppressor import SSuppressor

MOVER = NameMover().name
"""The role that others speak about."""
BY_SIGN = NegativeMover().name
"""The role that goes before all others where it fits: what works against the answer is not named by where it looks."""
NEEDS_MOVERS = (SInhibition().name,)

# Of equal scores the first counts.
ROLES: tuple[Role, ...] = (
    NameMover(),
    SSuppressor(),
    NegativeMover(),
    SInhibition(),
    Induction(),
    DuplicateToken(),
    PreviousToken(),
    AttentionSink(),
    TOWARD_ANSWER,
    TOWARD_DISTRACTOR,
)

__all__ = [
    "BY_SIGN",
    "MOVER",
    "NEEDS_MOVERS",
    "ROLES",
    "AttentionSink",
    "DuplicateToken",
    "Induction",
    "MlpWriter",
    "NameMover",
    "NegativeMover",
    "PreviousToken",
    "SInhibition",
    "SSuppressor",
    "promising",
]
