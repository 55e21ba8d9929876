"""Quantities: what can be measured about a part, one file each, and the runs they are measured on."""

from __future__ import annotations

from collections.abc import Mapping

from vesalius.errors import UnknownNameError
from vesalius.quantities.activation import ACTIVATION
from vesalius.quantities.attends import Attends
from vesalius.quantities.base import Parameters, PerExample, Quantity
from vesalius.quantities.circuit import Completeness, Faithfulness
from vesalius.quantities.concept import Carries, Moves
from vesalius.quantities.contrast import Contrast, heads_and_mlps
from vesalius.quantities.copies import Copies
from vesalius.quantities.direct_effect import DirectEffect
from vesalius.quantities.effect_at import EffectAt
from vesalius.quantities.fails_where import FailsWhere
from vesalius.quantities.fires_where import FiresWhere
from vesalius.quantities.heads_in_text import TARGETS, LooksAt, WritesWhatItSees
from vesalius.quantities.matching import Matched, matched_controls
from vesalius.quantities.moves_attention import MovesAttention
from vesalius.quantities.rule_effects import Promotes, StandsIn
from vesalius.quantities.rule_scores import Auprc, Auroc, BalancedAuprc, Detection, Fuzzing, Simulation, ToldApart
from vesalius.quantities.runs import Runs
from vesalius.quantities.selects import Selects
from vesalius.quantities.separates import Separates
from vesalius.quantities.table_rows import COLUMNS, Helps, Raises, Repairs, column_part, coordinate
from vesalius.quantities.total_effect import TotalEffect

FIRES_WHERE, SEPARATES, ATTENDS, COPIES = FiresWhere(), Separates(), Attends(), Copies()
DIRECT_EFFECT, TOTAL_EFFECT, EFFECT_AT, MOVES_ATTENTION = DirectEffect(), TotalEffect(), EffectAt(), MovesAttention()
FAITHFULNESS, COMPLETENESS = Faithfulness(), Completeness()
AUROC, AUPRC, AUPRC_BALANCED, SIMULATION = Auroc(), Auprc(), BalancedAuprc(), Simulation()
DETECTION, FUZZING, TOLD_APART = Detection(), Fuzzing(), ToldApart()
STANDS_IN, PROMOTES, FAILS_WHERE = StandsIn(), Promotes(), FailsWhere()
CARRIES, MOVES = Carries(), Moves()
LOOKS_AT, WRITES_WHAT_IT_SEES = LooksAt(), WritesWhatItSees()
SELECTS = Selects()
HELPS, RAISES, REPAIRS = Helps(), Raises(), Repairs()

QUANTITIES: dict[str, Quantity] = {
    one.name: one
    for one in (
        ATTENDS,
        COPIES,
        DIRECT_EFFECT,
        TOTAL_EFFECT,
        EFFECT_AT,
        MOVES_ATTENTION,
        ACTIVATION,
        FIRES_WHERE,
        SEPARATES,
        AUROC,
        AUPRC,
        AUPRC_BALANCED,
        SIMULATION,
        DETECTION,
        FUZZING,
        TOLD_APART,
        STANDS_IN,
        PROMOTES,
        FAILS_WHERE,
        CARRIES,
        MOVES,
        LOOKS_AT,
        WRITES_WHAT_IT_SEES,
        SELECTS,
        HELPS,
        RAISES,
        REPAIRS,
        FAITHFULNESS,
        COMPLETENESS,
    )
}
"""By name; add your own to let claims be made about it."""


def quantity(name: str, known: Mapping[str, Quantity] = QUANTITIES) -> Quantity:
    """A quantity by name. Raises UnknownNameError for an unknown one."""
    if name not in known:
        raise UnknownNameError("quantity", name, known)
    return known[name]


__all__ = [
    "ACTIVATION",
    "ATTENDS",
    "AUPRC",
    "AUPRC_BALANCED",
    "AUROC",
    "CARRIES",
    "COLUMNS",
    "COMPLETENESS",
    "COPIES",
    "DETECTION",
    "DIRECT_EFFECT",
    "EFFECT_AT",
    "FAILS_WHERE",
    "FAITHFULNESS",
    "FIRES_WHERE",
    "FUZZING",
    "HELPS",
    "LOOKS_AT",
    "MOVES",
    "MOVES_ATTENTION",
    "PROMOTES",
    "QUANTITIES",
    "RAISES",
    "REPAIRS",
    "SELECTS",
    "SEPARATES",
    "SIMULATION",
    "STANDS_IN",
    "TARGETS",
    "TOLD_APART",
    "TOTAL_EFFECT",
    "WRITES_WHAT_IT_SEES",
    "Contrast",
    "Matched",
    "Parameters",
    "PerExample",
    "Quantity",
    "Runs",
    "column_part",
    "coordinate",
    "heads_and_mlps",
    "matched_controls",
    "quantity",
]
