"""Predictions that roles share: a quantity of a part on discovery, its threshold, and the claim it leads to.

Thresholds were fixed on discovery data before any claim was tested.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vesalius.describe.description import Description, Discovery, Prediction, claim_of
from vesalius.errors import InputError
from vesalius.metric import logit_diff
from vesalius.parts import Part, as_part
from vesalius.protocol import Claim
from vesalius.protocol.claim import DEFAULT_SHARE
from vesalius.protocol.claim import TOTAL_EFFECT as TOTAL_EFFECT_SCALE
from vesalius.quantities import (
    ATTENDS,
    COPIES,
    DIRECT_EFFECT,
    EFFECT_AT,
    MOVES_ATTENTION,
    TOTAL_EFFECT,
    Quantity,
    Runs,
    quantity,
)
from vesalius.quantities.moves_attention import later
from vesalius.quantities.places import in_words
from vesalius.site import Site

# Smallest attention worth claiming: uniform attention over the prompts of the built-in tasks gives .03 to .1.
LEAST_ATTENTION = 0.1
# A head looks somewhere when half its mean is still worth claiming: claims are made at half the mean.
LOOKS = 2 * LEAST_ATTENTION
# A head that moves the movers' attention does at least a tenth of what the whole corruption does to it, and no less
# than .02, because that may be near zero.
SHIFT_SHARE, LEAST_SHIFT = 0.1, 0.02


def above(value: float, threshold: float) -> float:
    """Strength of a figure that should be at least the threshold: 0 at 0 and below, .5 at it, towards 1 far above."""
    return value / (value + threshold) if value > 0 else 0.0


def within(value: float, limit: float) -> float:
    """Strength of a figure that should be at most the limit in size: 1 at 0, .5 at it, towards 0 far above."""
    return limit / (limit + abs(value))


class NotMeasuredError(InputError):
    """A quantity does not apply to a part, on these data or in this model."""


def mean_of(discovery: Discovery, of: Quantity, part: Part, **parameters: Any) -> float:
    """Mean of a quantity over the discovery prompts. Raises NotMeasuredError where it does not apply to the part."""
    refused = of.refuses(discovery.runs, part)
    if refused:
        raise NotMeasuredError(f"{of.name} of {part} cannot be measured: {refused}")
    return discovery.runs.mean(of.measure(discovery.runs, part, parameters))


def metric_in_words(discovery: Discovery) -> str:
    """ "the logit difference", or the metric's name."""
    name = discovery.runs.contrast.metric.name
    return "the logit difference" if name == logit_diff.name else f"the metric ({name})"


def looks(
    discovery: Discovery, part: Part, query: str, key: str, elsewhere: str, at_least: float = LOOKS
) -> Prediction:
    """It attends from `query` to `key`, and more than to `elsewhere`."""
    parameters = {"query": query, "key": key, "elsewhere": elsewhere}
    mean = mean_of(discovery, ATTENDS, part, **parameters)
    other = mean_of(discovery, ATTENDS, part, query=query, key=elsewhere)
    size = max(LEAST_ATTENTION, mean / 2)
    places = f"attends from {in_words(query)} to {in_words(key)}"
    return Prediction(
        ATTENDS.name,
        parameters,
        mean,
        min(above(mean, at_least), above(mean - other, at_least / 2)),
        f"{places} ({mean:.2f} of its attention; {in_words(elsewhere)} gets {other:.2f})",
        f"{places}, and more than to {in_words(elsewhere)}",
        size=size,
        nulls=(("elsewhere", size / 2),),
    )


def copies(discovery: Discovery, part: Part, key: str, sign: int) -> Prediction:
    """What it reads at `key` it writes (sign +1) or erases (-1) as the next token."""
    mean = mean_of(discovery, COPIES, part, key=key)
    verb, claimed = ("adds to" if one > 0 else "takes from" for one in (mean, sign))
    return Prediction(
        COPIES.name,
        {"key": key},
        mean,
        above(sign * mean, discovery.delta),
        f"{verb} that token's logit ({mean:+.2f} against other prompts' tokens, at full attention)",
        f"{claimed} the logit of the token at {in_words(key)}, if it attends to that alone",
        sign,
        discovery.delta,
        discovery.total,
    )


def writes(discovery: Discovery, part: Part, sign: int) -> Prediction:
    """It writes straight onto the logit difference, for the answer (+1) or for the distractor (-1)."""
    mean, metric = mean_of(discovery, DIRECT_EFFECT, part), metric_in_words(discovery)
    return Prediction(
        DIRECT_EFFECT.name,
        {},
        mean,
        above(sign * mean, discovery.delta),
        f"writes {mean:+.2f} onto {metric} directly",
        f"writes onto {metric} directly, towards the {'answer' if sign > 0 else 'distractor'}",
        sign,
        discovery.delta,
        discovery.total,
        (("shuffled labels", discovery.delta / 2),),
    )


def quiet(discovery: Discovery, part: Part) -> Prediction:
    """It writes nothing worth claiming onto the logit difference. Only helps to choose: no claim comes of it."""
    mean = mean_of(discovery, DIRECT_EFFECT, part)
    words = f"writes next to nothing ({mean:+.2f}) onto {metric_in_words(discovery)} directly"
    return Prediction(DIRECT_EFFECT.name, {}, mean, within(mean, discovery.delta), words)


def matters(discovery: Discovery, part: Part, sign: int = 0) -> Prediction:
    """Patching its corrupted value changes the metric; sign 0 takes the sign found on discovery."""
    mean, metric = mean_of(discovery, TOTAL_EFFECT, part), metric_in_words(discovery)
    sign = sign or (1 if mean >= 0 else -1)
    what, claimed = ("lowers" if one > 0 else "raises" for one in (mean, sign))
    return Prediction(
        TOTAL_EFFECT.name,
        {},
        mean,
        above(sign * mean, discovery.delta),
        f"giving it its corrupted value {what} {metric} by {abs(mean):.2f}",
        f"{'is needed' if sign > 0 else 'works against the answer'}: giving it its corrupted value {claimed} {metric}",
        sign,
        discovery.delta,
        discovery.total,
        (("shuffled labels", discovery.delta / 2),),
    )


def acts_at(discovery: Discovery, part: Part, place: str) -> Prediction:
    """Its effect arises at one place: there its corrupted value changes the metric, and more than everywhere else."""
    mean = mean_of(discovery, EFFECT_AT, part, place=place)
    elsewhere = mean_of(discovery, TOTAL_EFFECT, part) - mean
    sign = 1 if mean >= 0 else -1
    what, claimed = ("lowers" if one > 0 else "raises" for one in (mean, sign))
    where, metric = in_words(place), metric_in_words(discovery)
    return Prediction(
        EFFECT_AT.name,
        {"place": place},
        mean,
        min(above(sign * mean, discovery.delta), above(sign * mean, abs(elsewhere))),
        f"its corrupted value at {where} alone {what} {metric} by {abs(mean):.2f} ({elsewhere:+.2f} elsewhere)",
        f"acts at {where}: its corrupted value there alone {claimed} {metric}, and more than elsewhere",
        sign,
        discovery.delta,
        discovery.total,
        (("elsewhere", discovery.delta / 2),),
    )


def turns(discovery: Discovery, part: Part, movers: str) -> Prediction | None:
    """Its corrupted value turns the later movers' attention from the answer; None when there is no later mover.

    movers: the label of the heads whose attention is watched. The claim's scale is in its own unit: what the whole
    corruption does to their attention.
    """
    found = later(part, discovery.called(movers))
    if not found:
        return None
    parameters = {"movers": [str(mover) for mover in found]}
    mean = mean_of(discovery, MOVES_ATTENTION, part, **parameters)
    total = MOVES_ATTENTION.scale_of(discovery.runs, part, parameters) or 0.0
    return Prediction(
        MOVES_ATTENTION.name,
        parameters,
        mean,
        above(mean, max(LEAST_SHIFT, SHIFT_SHARE * abs(total))),
        f"giving it its corrupted value turns the {movers}s' attention by {mean:.2f} from answer to distractor",
        f"keeps the {movers}s' attention on the answer: giving it its corrupted value turns it to the distractor",
        size=max(mean / 2, DEFAULT_SHARE * abs(total), LEAST_SHIFT / 2),
        scale=total,
    )


def claim_about(
    runs: Runs,
    part: Part | Site | str,
    of: str | Quantity,
    parameters: Mapping[str, Any] | None = None,
    *,
    size: float | None = None,
    statement: str = "",
    members: Sequence[Part] = (),
    n: int | None = None,
    study: str = "",
) -> Claim:
    """A claim about any part and quantity, made from discovery data, to be registered and checked on fresh data.

    runs: on discovery. The sign is the one found there. size: the smallest value worth claiming, in the quantity's
    unit; default half of what was found, and on the scale of a total effect no less than 5 % of that. members: parts
    that must not be among its controls. n: examples planned, default as many as discovery has. The quantity's matched
    control and nulls go with it. Raises InputError where the quantity does not apply to the part.
    """
    subject, given = as_part(part), dict(parameters or {})
    measured = of if isinstance(of, Quantity) else quantity(of)
    refused = measured.refuses(runs, subject)
    if refused:
        raise InputError(f"{measured.name} of {subject} cannot be measured: {refused}")
    discovery = Discovery.of(runs, [*members, subject], study=study, n=n)
    try:
        mean = runs.mean(measured.measure(runs, subject, given))
    except KeyError as error:
        raise InputError(f"{measured.name} needs the parameter {error}; got {sorted(given)}") from error
    scale = measured.scale_of(runs, subject, given)
    least = DEFAULT_SHARE * abs(scale) if scale is not None and measured.scale == TOTAL_EFFECT_SCALE else 0.0
    margin = max(abs(mean) / 2, least) if size is None else size
    if not margin > 0:
        raise InputError(
            f"{measured.name} of {subject} is {mean:g} on discovery, so there is nothing to claim; give size="
        )
    nulls = tuple((name, margin / 2) for name in measured.nulls(runs, subject, given))
    words = statement or measured.phrase(given)
    prediction = Prediction(
        measured.name, given, mean, 1.0, f"{words}: {mean:+.3g}", words, 1 if mean >= 0 else -1, margin, scale, nulls
    )
    return claim_of(Description(subject, "", (prediction,)), prediction, discovery)
