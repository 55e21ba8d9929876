"""How many claims one correction is for: it follows the data that are opened, and not the name of a study."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vesalius.protocol import Family
from vesalius.protocol.state import State


def corrected_together(state: State, family: Family) -> tuple[Family, ...]:
    """The families whose claims share one correction with this one, in the order in which they were sealed.

    All that were sealed on the same data before these were first opened, whatever study they belong to: every one of
    them could have had its evidence there. A family sealed later is exploratory, counts all before it, and changes
    nothing for those. A family of earlier rules is corrected alone, as it was then.
    """
    if state.rules[family.id] < 2:
        return (family,)
    until = _first_opened(state, family)
    return tuple(
        other
        for other in state.families.values()
        if other.id == family.id
        or (
            state.rules[other.id] > 1
            and state.sealed_at[other.id] < until
            and (family.exploratory or state.sealed_at[family.id] < _first_opened(state, other))
            and _same_data(state, family, other)
        )
    )


def _first_opened(state: State, family: Family) -> float:
    """Number of the record by which data that a family can be tested on were first opened after it was sealed."""
    parents = _parents(family)
    seen, world = state.examples(parents), state.world(parents)
    for opening in state.openings:
        fresh = state.data[opening.data_hash].examples - seen
        if opening.seq > state.sealed_at[family.id] and fresh and (not parents or fresh & world):
            return opening.seq
    return math.inf


def _same_data(state: State, family: Family, other: Family) -> bool:
    """Whether they are about the same data sets; without parents, a claim may be about any."""
    ours, theirs = _parents(family), _parents(other)
    return not ours or not theirs or bool(state.world(ours) & state.world(theirs))


def _parents(family: Family) -> Sequence[str]:
    return sorted({parent for claim in family.claims for parent in claim.parents})
