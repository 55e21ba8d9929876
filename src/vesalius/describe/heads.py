"""What heads do in any text: where they look, and whether they write what they look at.

The roles of a task (`roles`) speak of places of its prompts. These speak of places that every text has, so that every
head of a model can be described on ordinary documents, and tested on others. Thresholds were fixed on discovery data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vesalius.describe.description import FITS, Discovery, Prediction
from vesalius.describe.predictions import LOOKS, above, mean_of
from vesalius.describe.roles import Predicted, Role, is_head
from vesalius.parts import Part
from vesalius.quantities import LOOKS_AT, WRITES_WHAT_IT_SEES

CLEARLY = 2.0
"""A head looks somewhere when it looks there so many times as much as at as many other places."""
RESTS = 0.5
LEAST_LOGITS = 0.05
"""Of a head that writes what it sees, in logits, at the mean token: most heads write less than .01."""
LABELS: Mapping[str, str] = {
    "previous": "previous-token head",
    "two back": "head that looks two tokens back",
    "itself": "current-token head",
    "repeated": "duplicate-token head",
    "punctuation": "punctuation head",
    "line break": "line-break head",
    "capitalised": "head that looks at capitalised words",
    "digits": "digit head",
}
INDUCTION, AFTER_REPEATED, RESTING = "induction head", "head that looks after a repetition", "attention sink"


def looks_at(discovery: Discovery, part: Part, to: str, at_least: float = LOOKS) -> Prediction:
    """It looks at a place of any text, and more than at as many others."""
    mean = mean_of(discovery, LOOKS_AT, part, to=to)
    other = discovery.runs.mean(LOOKS_AT.nulls(discovery.runs, part, {"to": to})["elsewhere"])
    said = LOOKS_AT.phrase({"to": to})
    return Prediction(
        LOOKS_AT.name,
        {"to": to},
        mean,
        min(above(mean, at_least), above(mean, CLEARLY * other)),
        f"{said} ({mean:.2f} of its attention; as many other tokens get {other:.2f})",
        f"{said}, and more than at as many others",
        size=mean / 2 if mean > 0 else None,
        scale=1.0,
        nulls=(("elsewhere", mean / 4),),
    )


def writes_what_it_sees(discovery: Discovery, part: Part) -> Prediction:
    """The tokens that it looks at become likelier, or less likely, by its own write."""
    mean = mean_of(discovery, WRITES_WHAT_IT_SEES, part)
    verb = "raises" if mean > 0 else "lowers"
    return Prediction(
        WRITES_WHAT_IT_SEES.name,
        {},
        mean,
        above(abs(mean), LEAST_LOGITS),
        f"{verb} the logits of the tokens that it looks at ({mean:+.2f}, against those that it could have looked at)",
        f"{verb} the logits of the tokens that it looks at, directly",
        1 if mean >= 0 else -1,
        size=abs(mean) / 2 or None,
        scale=1.0,
    )


def _looking(to: str, at_least: float = LOOKS) -> Callable[[Discovery, Part], Predicted]:
    """Where it looks, and beside that what it writes, where that is anything."""

    def predict(discovery: Discovery, part: Part) -> Predicted:
        seen, written = looks_at(discovery, part, to, at_least), _written(discovery, part)
        return [seen, written if written is not None and written.strength >= FITS else None]

    return predict


def _written(discovery: Discovery, part: Part) -> Prediction | None:
    if WRITES_WHAT_IT_SEES.refuses(discovery.runs, part):
        return None
    return writes_what_it_sees(discovery, part)


def _induction(discovery: Discovery, part: Part) -> Predicted:
    """After a token that has occurred before, it looks at what came next, and writes that (Olsson et al. 2022)."""
    written = _written(discovery, part)
    if written is None or written.sign < 0:
        return None
    return [looks_at(discovery, part, "after repeated"), written]


HEADS_IN_TEXT: tuple[Role, ...] = (
    Role(INDUCTION, is_head, _induction),
    *(Role(label, is_head, _looking(to)) for to, label in LABELS.items()),
)
OTHERWISE_IN_TEXT: tuple[Role, ...] = (
    Role(AFTER_REPEATED, is_head, _looking("after repeated")),
    Role(RESTING, is_head, _looking("first", RESTS)),
)
"""For heads that none of the others fits."""
