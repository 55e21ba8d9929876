"""The role library: what a head or an MLP of a circuit can be, as executable predictions.

A role says where a head looks, what it writes, and what giving it its corrupted value does. It fits when every
threshold holds on discovery; what it claims is tested on fresh data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from vesalius.describe.description import FITS, Description, Discovery, Prediction
from vesalius.describe.predictions import (
    NotMeasuredError,
    acts_at,
    copies,
    looks,
    matters,
    mean_of,
    quiet,
    turns,
    writes,
)
from vesalius.parts import Part, Unit
from vesalius.quantities import ATTENDS, EFFECT_AT, MOVES_ATTENTION
from vesalius.quantities.attends import FIRST_QUERY
from vesalius.quantities.contrast import EMBED
from vesalius.quantities.moves_attention import later
from vesalius.quantities.places import in_words, present

NAME_MOVER, NEGATIVE_MOVER = "name mover", "negative mover"
NO_ROLE = "no role fits"
# More than half: at rest, whatever the rest of the attention does.
RESTS = 0.5
# Averaged over positions, any head that looks near itself reaches .2: a previous-token head does twice that.
MOSTLY = 0.4
# Query, key and the repeated token itself: the repeated distractor, or a last token that the prompt has seen before.
REPETITIONS = (
    ("distractor_last", "distractor_first+1", "distractor_first"),
    ("end", "earlier_end+1", "earlier_end"),
)
LOOKED_AT = ("answer", "distractor_first", "distractor_last", "end", "first")
SUBJECT = "changed_last"
"""Where a recall prompt names its subject: the last token that the corruption changes."""

Predicted = Sequence[Prediction | None] | None


@dataclass(frozen=True)
class Role:
    """A describer. predict: None when the prompts lack what the role speaks about; a missing prediction is left out.

    A role that speaks of a quantity which is not to be had here (a direct effect on another metric than the logit
    difference, attention that is not recorded) is not tried.
    """

    name: str
    suits: Callable[[Part], bool]
    predict: Callable[[Discovery, Part], Predicted]
    needs: tuple[str, ...] = ()
    note: Callable[[Discovery, Part], str] = lambda _discovery, _part: ""
    together: Callable[[Discovery, Sequence[Part]], None] = lambda _discovery, _parts: None

    def prepare(self, discovery: Discovery, parts: Sequence[Part]) -> None:
        """Measure for all parts what costs less together."""
        with suppress(NotMeasuredError):
            self.together(discovery, [part for part in parts if self.suits(part)])

    def describe(self, discovery: Discovery, part: Part) -> Description | None:
        """How well the role describes the part."""
        predicted: Predicted = None
        if self.suits(part):
            with suppress(NotMeasuredError):
                predicted = self.predict(discovery, part)
        if predicted is None:
            return None
        made = tuple(one for one in predicted if one is not None)
        return Description(part, self.name, made, self.note(discovery, part))


def is_head(part: Part) -> bool:
    site = part.writes[0]
    return isinstance(part, Unit) and site.kind == "z" and site.index is not None


def is_mlp(part: Part) -> bool:
    site = part.writes[0]
    return isinstance(part, Unit) and site.kind == "mlp_out" and site.index is None


def _name_mover(discovery: Discovery, part: Part) -> Predicted:
    """Attends to the answer, copies it, and so raises its logit (Wang et al. 2022, section 3.1)."""
    if not present(discovery.runs, "answer", "distractor_first"):
        return None
    seen = looks(discovery, part, "end", "answer", "distractor_first")
    return [seen, copies(discovery, part, "answer", 1), writes(discovery, part, 1)]


def _copy_suppression(discovery: Discovery, part: Part) -> Predicted:
    """Attends to the repeated name and lowers that name's logit, which helps the answer (McDougall et al. 2023)."""
    mentions = ("distractor_first", "distractor_last")
    if not present(discovery.runs, *mentions, "answer"):
        return None
    views = {place: looks(discovery, part, "end", place, "answer") for place in mentions}
    key = max(views, key=lambda place: views[place].mean)
    return [views[key], copies(discovery, part, key, -1), writes(discovery, part, 1)]


def _negative_mover(discovery: Discovery, part: Part) -> Predicted:
    """Works against the answer, whatever it looks at (Wang et al. 2022, section 3.4).

    The role is given by the sign of the effect; where the head looks is noted, but decides nothing.
    """
    return [writes(discovery, part, -1), matters(discovery, part, -1)]


def _most_attended(discovery: Discovery, part: Part) -> str:
    known = [place for place in LOOKED_AT if present(discovery.runs, place)]
    seen = {place: mean_of(discovery, ATTENDS, part, query="end", key=place) for place in known}
    most = max(seen, key=lambda place: seen[place])
    return f"; from the last position it looks most at {in_words(most)} ({seen[most]:.2f})"


def _s_inhibition(discovery: Discovery, part: Part) -> Predicted:
    """Reads the repeated name and turns the name movers from it (Wang et al. 2022, section 3.2)."""
    if not later(part, discovery.called(NAME_MOVER)) or not _repeats(discovery):
        return None
    cheap = _reads_the_repetition(discovery, part)
    # The sweep that watches the movers is dear: only for heads that pass the rest.
    return [*cheap, turns(discovery, part, NAME_MOVER) if _hold(cheap) else None]


def _watched_together(discovery: Discovery, parts: Sequence[Part]) -> None:
    """Measures how parts turn the movers in as few sweeps as there are sets of movers."""
    movers = discovery.called(NAME_MOVER)
    wanted = [
        (part, {"movers": [str(mover) for mover in later(part, movers)]})
        for part in parts
        if later(part, movers) and _repeats(discovery) and _hold(_reads_the_repetition(discovery, part))
    ]
    MOVES_ATTENTION.prepare(discovery.runs, wanted)


def _repeats(discovery: Discovery) -> bool:
    return present(discovery.runs, "distractor_first", "distractor_last", "answer")


def _reads_the_repetition(discovery: Discovery, part: Part) -> list[Prediction]:
    return [looks(discovery, part, "end", "distractor_last", "answer"), matters(discovery, part, 1)]


def _hold(predictions: Sequence[Prediction]) -> bool:
    return min(one.strength for one in predictions) >= FITS


def _induction(discovery: Discovery, part: Part) -> Predicted:
    """A repeated token attends to what came after it the last time (Elhage et al. 2021)."""
    places = [found for found in REPETITIONS if present(discovery.runs, *found)]
    if not places:
        return None
    seen = max((looks(discovery, part, *found) for found in places), key=lambda look: look.strength)
    return [seen, matters(discovery, part, 1)]


def _duplicate_token(discovery: Discovery, part: Part) -> Predicted:
    """A repeated token attends to its first mention (Wang et al. 2022, section 3.3)."""
    if not _repeats(discovery):
        return None
    return [looks(discovery, part, "distractor_last", "distractor_first", "answer"), matters(discovery, part)]


def _previous_token(discovery: Discovery, part: Part) -> Predicted:
    """Every position attends to the one before it (Olsson et al. 2022)."""
    if bool((discovery.runs.named_positions["end"] < FIRST_QUERY).any()):
        return None
    return [looks(discovery, part, "every", "previous", "two back", at_least=MOSTLY), matters(discovery, part)]


def _attention_sink(discovery: Discovery, part: Part) -> Predicted:
    """Rests on the first position and writes next to nothing (Xiao et al. 2023)."""
    if bool((discovery.runs.named_positions["end"] < 1).any()):
        return None
    seen = looks(discovery, part, "end", "first", "others", at_least=RESTS)
    return [seen, quiet(discovery, part), matters(discovery, part)]


def _attribute_mover(discovery: Discovery, part: Part) -> Predicted:
    """Recall: attends from the end to the subject and writes the answer, which the prompt does not hold, onto the
    logits (Geva et al. 2023, section 6, "attribute extraction")."""
    if not _recalls(discovery):
        return None
    return [looks(discovery, part, "end", SUBJECT, "others"), writes(discovery, part, 1)]


def _subject_reader(discovery: Discovery, part: Part) -> Predicted:
    """Recall: attends from the end to the subject, which matters, and leaves the writing to later parts."""
    if not _recalls(discovery):
        return None
    seen = looks(discovery, part, "end", SUBJECT, "others")
    return [seen, quiet(discovery, part), matters(discovery, part, 1)]


def _recalls(discovery: Discovery) -> bool:
    """Whether the answer has to be recalled: no prompt holds it, and each names a subject before its end."""
    at = discovery.runs.named_positions
    return bool((at["answer"] < 0).all()) and bool(((at[SUBJECT] >= 1) & (at[SUBJECT] < at["end"])).all())


def _writer(sign: int) -> Callable[[Discovery, Part], Predicted]:
    """What an MLP writes straight onto the logit difference: toward the answer, or toward the distractor."""
    return lambda discovery, part: [writes(discovery, part, sign)]


def _acting(place: str) -> Callable[[Discovery, Part], Predicted]:
    def predict(discovery: Discovery, part: Part) -> Predicted:
        # Only what matters at all is worth patching place by place.
        if matters(discovery, part).strength < FITS or not present(discovery.runs, place):
            return None
        return [acts_at(discovery, part, place)]

    return predict


def _patched_at(place: str) -> Callable[[Discovery, Sequence[Part]], None]:
    def together(discovery: Discovery, parts: Sequence[Part]) -> None:
        if present(discovery.runs, place):
            some = [part for part in parts if matters(discovery, part).strength >= FITS]
            EFFECT_AT.prepare(discovery.runs, [(part, {"place": place}) for part in some])

    return together


# Of equal scores the first counts.
ROLES: tuple[Role, ...] = (
    Role(NAME_MOVER, is_head, _name_mover),
    Role("copy suppression", is_head, _copy_suppression),
    Role(NEGATIVE_MOVER, is_head, _negative_mover, note=_most_attended),
    Role("S-inhibition", is_head, _s_inhibition, needs=(NAME_MOVER,), together=_watched_together),
    Role("induction", is_head, _induction),
    Role("duplicate-token", is_head, _duplicate_token),
    Role("previous-token", is_head, _previous_token),
    Role("attention sink", is_head, _attention_sink),
    Role("attribute mover", is_head, _attribute_mover),
    Role("subject reader", is_head, _subject_reader),
    Role("MLP writes toward the answer", is_mlp, _writer(1)),
    Role("MLP writes toward the distractor", is_mlp, _writer(-1)),
)
WHERE_IT_ACTS: tuple[Role, ...] = tuple(
    Role(f"acts at {in_words(place)}", lambda part: part != EMBED, _acting(place), together=_patched_at(place))
    for place in ("end", "changed_last", "changed", "distractor_last", "earlier_end+1")
)
"""For members that no role fits: at which place of the prompt they act. Subject enrichment (Geva et al. 2023) is an MLP
that acts at the subject of a recall prompt."""
GOES_FIRST = NEGATIVE_MOVER
"""What works against the answer is not named by where it looks."""


def causal(discovery: Discovery, part: Part) -> Description | None:
    """A description without a role: the part is needed. None for the embeddings, and for an effect under delta."""
    found = Description(part, "", (matters(discovery, part),))
    return found if found.fits and part != EMBED else None
