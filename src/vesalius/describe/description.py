"""Descriptions: a part, a sentence about it, and what the sentence predicts; and how predictions become claims.

A description is made on discovery data and is a hypothesis: each of its predictions names a quantity, the sign and the
smallest size it should have on fresh data. Roles are one kind of describer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any, Protocol

from vesalius.errors import InputError, UnknownNameError
from vesalius.jobs import Sink, silent, track
from vesalius.parts import Part, Unit
from vesalius.protocol import Claim
from vesalius.protocol.claim import default_delta
from vesalius.quantities import Contrast, Matched, Quantity, Runs, quantity
from vesalius.quantities.base import PerExample
from vesalius.refs import resolve
from vesalius.stats import measure

FITS = 0.5
"""A description fits from this score on: every one of its thresholds holds."""


@dataclass(frozen=True)
class Prediction:
    """One thing that a description predicts.

    quantity, parameters: what is measured, alike on discovery and validation. mean: on discovery. strength: 0 to 1, how
    far that passes its threshold (.5 at the threshold). words: with the figures of discovery; statement: what is
    claimed, without them. size: the smallest value worth claiming, in the quantity's unit; None: nothing is claimed
    (the figure only helped to choose the description). scale: what size is measured against; nulls: (name, margin).
    control: what a claim is compared with; None: the quantity's matched control.
    """

    quantity: str
    parameters: Mapping[str, Any]
    mean: float
    strength: float
    words: str
    statement: str = ""
    sign: int = 1
    size: float | None = None
    scale: float | None = None
    nulls: tuple[tuple[str, float], ...] = ()
    control: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Description:
    """What a part is said to be. label: a role's name, or another describer's word; "" for a claim without a role."""

    part: Part
    label: str
    predictions: tuple[Prediction, ...]
    note: str = ""
    """What was seen beside the predictions, and decides nothing."""
    name: str = ""
    """What to call the part in a sentence; default a short name."""
    history: tuple[Mapping[str, Any], ...] = ()
    """What was said before and given up on discovery data, the oldest first; it goes into the claims' `origin`."""
    rivals: tuple[Mapping[str, Any], ...] = ()
    """Parameters that would do as well in the first prediction, as far as discovery tells."""

    @property
    def score(self) -> float:
        """0 to 1, of the weakest prediction; thresholds hold from .5 on."""
        return min((prediction.strength for prediction in self.predictions), default=0.0)

    @property
    def fits(self) -> bool:
        return self.score >= FITS

    @property
    def sentence(self) -> str:
        """With the figures of discovery."""
        listed = "; ".join(prediction.words for prediction in self.predictions)
        return f"{self.called}{f' as {self.label}' if self.label else ''}: {listed}{self.note}."

    @property
    def called(self) -> str:
        """The part, in a sentence."""
        return self.name or short_name(self.part)

    def to_json(self) -> dict[str, Any]:
        predictions = [dict(vars(prediction)) for prediction in self.predictions]
        own: dict[str, Any] = {name: getattr(self, name) for name in ("label", "note", "name")}
        own |= {name: [dict(one) for one in getattr(self, name)] for name in ("history", "rivals")}
        return {"part": self.part.ref, "predictions": predictions, **own}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *given: Part) -> Description:
        """What `to_json` gave. given: see `resolve`."""
        predictions = tuple(
            Prediction(**{**one, "nulls": tuple((name, margin) for name, margin in one["nulls"])})
            for one in data["predictions"]
        )
        part, more = resolve(data["part"], *given), [tuple(data[name]) for name in ("history", "rivals")]
        return cls(part, data["label"], predictions, data["note"], data["name"], *more)

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.sentence)}</p>"


@dataclass(frozen=True, eq=False)
class Discovery:
    """What descriptions are made from: runs on discovery data, a circuit's members, and what was described already.

    total: R, the mean total effect of the main corruption, in the metric's unit. delta: the smallest effect worth
    claiming. parents: content hashes of the discovery data, as the ledger handed them out. n: examples planned for
    validation.
    """

    runs: Runs
    members: tuple[Part, ...]
    total: float
    delta: float
    found: tuple[Description, ...] = ()
    study: str = ""
    parents: tuple[str, ...] = ()
    n: int = 1
    seed: int = 0

    @classmethod
    def of(cls, runs: Runs, members: Sequence[Part], *, study: str = "", n: int | None = None) -> Discovery:
        """On these runs; n defaults to as many examples as they have. A corpus or a table has no total effect.

        Raises InputError when clean and corrupted runs do not differ.
        """
        planned = runs.n if n is None else n
        if not isinstance(runs.data, Contrast):
            return cls(runs, tuple(members), 0.0, 0.0, (), study, (runs.data.source_hash,), planned, runs.seed)
        total = runs.mean(runs.total(runs.main))
        parents = tuple(pairs.source_hash for pairs in runs.corruptions.values())
        return cls(runs, tuple(members), total, default_delta(total), (), study, parents, planned, runs.seed)

    def called(self, label: str) -> tuple[Part, ...]:
        """Parts that are described by this label so far."""
        return tuple(one.part for one in self.found if one.label == label)


class Describer(Protocol):
    """Makes descriptions of parts from discovery data."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> tuple[str, ...]:
        """Labels of the descriptions that it asks for: those are made first."""
        ...

    def prepare(self, discovery: Discovery, parts: Sequence[Part]) -> None:
        """Measure for all parts what costs less together."""
        ...

    def describe(self, discovery: Discovery, part: Part) -> Description | None:
        """None when the part cannot be this, or the prompts lack what it speaks about."""
        ...


@dataclass(frozen=True)
class Descriptions:
    """fits: member -> its best fitting description, or None. scores: member -> score of every describer tried.

    claims: what is to be tested on fresh data. estimates: claim id -> its mean on discovery.
    """

    fits: Mapping[str, Description | None]
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()
    estimates: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, part: Part | str) -> Description | None:
        if str(part) not in self.fits:
            raise UnknownNameError("member", str(part), self.fits)
        return self.fits[str(part)]

    def to_json(self) -> dict[str, Any]:
        # JSON objects are sorted; members have an order that must stay.
        fits = [[name, None if fit is None else fit.to_json()] for name, fit in self.fits.items()]
        scores = [[name, list(of.items())] for name, of in self.scores.items()]
        return {
            "fits": fits,
            "scores": scores,
            "claims": [claim.to_json() for claim in self.claims],
            "estimates": dict(self.estimates),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *given: Part) -> Descriptions:
        """What `to_json` gave. given: parts that are named by hash, see `resolve`."""
        return cls(
            {name: None if fit is None else Description.from_json(fit, *given) for name, fit in data["fits"]},
            {name: dict(of) for name, of in data["scores"]},
            tuple(map(Claim.from_json, data["claims"])),
            data["estimates"],
        )


def describe(
    discovery: Discovery, describers: Sequence[Describer], first: str = "", otherwise: Sequence[Describer] = ()
) -> Descriptions:
    """The best fitting description of every member, on discovery.

    Describers that need others' descriptions go last. first: a label that goes before all others where it fits.
    otherwise: describers that are asked about the members that none of the others fits.
    """
    found = _described(discovery, describers, first)
    bare = tuple(member for member in discovery.members if found.fits[str(member)] is None)
    if not otherwise or not bare:
        return found
    more = _described(replace(discovery, members=bare, found=discovery.found), otherwise, first)
    scores = {name: {**of, **more.scores.get(name, {})} for name, of in found.scores.items()}
    return replace(found, fits={**found.fits, **more.fits}, scores=scores)


def _described(discovery: Discovery, describers: Sequence[Describer], first: str) -> Descriptions:
    tried: dict[Part, list[Description]] = {member: [] for member in discovery.members}
    for some in ([one for one in describers if not one.needs], [one for one in describers if one.needs]):
        best = tuple(one for found in tried.values() if (one := best_of(found, first)) is not None)
        now = _knowing(discovery, best)
        for describer in some:
            describer.prepare(now, discovery.members)
            for member in discovery.members:
                made = describer.describe(now, member)
                tried[member] += [made] if made is not None else []
    order = {describer.name: number for number, describer in enumerate(describers)}
    for found in tried.values():
        found.sort(key=lambda one: order.get(one.label, len(order)))
    return Descriptions(
        {str(member): best_of(found, first) for member, found in tried.items()},
        {str(member): {one.label: one.score for one in found} for member, found in tried.items()},
    )


def _knowing(discovery: Discovery, found: tuple[Description, ...]) -> Discovery:
    return replace(discovery, found=(*discovery.found, *found))


def best_of(found: Sequence[Description], first: str = "") -> Description | None:
    """The best-scoring description that fits, `first` before all others; ties go to the first."""
    return max((one for one in found if one.fits), key=lambda one: (one.label == first, one.score), default=None)


def claims_of(description: Description, discovery: Discovery) -> tuple[tuple[Claim, float], ...]:
    """What a description predicts, as claims, each with its mean on discovery; () for one that does not fit."""
    claimed = [one for one in description.predictions if one.size is not None]
    return tuple((claim_of(description, one, discovery), one.mean) for one in claimed) if description.fits else ()


def claimed_apart(found: Descriptions, discovery: Discovery, sink: Sink = silent) -> Descriptions:
    """With the claims of all descriptions, each about one part: the others may be among its controls."""
    fits = [fit for fit in found.fits.values() if fit is not None]
    claims = [
        both
        for fit in track(fits, "make claims", sink=sink)
        for both in claims_of(fit, replace(discovery, members=(fit.part,)))
    ]
    return replace(found, claims=tuple(c for c, _ in claims), estimates={c.id: mean for c, mean in claims})


def claim_of(description: Description, prediction: Prediction, discovery: Discovery) -> Claim:
    """One prediction as a claim, with the quantity's matched control, unit and condition."""
    assert prediction.size is not None
    of, runs, part = quantity(prediction.quantity), discovery.runs, description.part
    unit, control = of.unit(runs), prediction.control
    side, bound = "at least" if prediction.sign > 0 else "at most", prediction.sign * prediction.size
    if control is None:
        control = control_of(of.matched(runs, part, discovery.members, prediction.parameters))
    return Claim(
        statement=f"{description.called} {prediction.statement}: {side} {bound:+.3g} {unit}",
        subject=subject_of(part, runs.model.content_hash),
        quantity=of.name,
        parameters=prediction.parameters,
        kind=of.kind,
        unit=unit,
        sign=prediction.sign,
        delta=prediction.size,
        scale=prediction.scale,
        scale_name=of.scale,
        control=control,
        nulls=prediction.nulls,
        condition=of.condition_on(runs),
        n=discovery.n,
        seed=discovery.seed,
        parents=discovery.parents,
        study=discovery.study,
        role=description.label or None,
        origin=_origin(of, runs, description, prediction),
    )


def _origin(of: Quantity, runs: Runs, description: Description, prediction: Prediction) -> dict[str, Any]:
    """What discovery showed: the quantity itself, the scale that its threshold is measured against, and what was said
    before and given up."""
    part = description.part
    found: dict[str, Any] = {"effect": _measured(runs, prediction.mean, of.measure(runs, part, prediction.parameters))}
    if prediction.scale is not None:
        found["scale"] = _measured(runs, prediction.scale, of.scale_values(runs, part, prediction.parameters))
    if description.history:
        found["given_up"] = [dict(one) for one in description.history]
    return found


def _measured(runs: Runs, estimate: float, values: PerExample | None) -> dict[str, Any]:
    """With the interval, where the estimate is the mean of values and there are groups enough for one."""
    found: dict[str, Any] = {"estimate": estimate, "low": None, "high": None, "n": runs.n}
    found["data_hash"] = runs.source_hash
    if values is None or not math.isclose(runs.mean(values), estimate, rel_tol=1e-4, abs_tol=1e-6):
        return found
    try:
        interval = measure("origin", values.double().numpy(), groups=runs.groups, clusters=runs.clusters)
    except InputError:
        return found
    return {**found, "low": interval.low, "high": interval.high}


def subject_of(part: Part, model_hash: str) -> dict[str, Any]:
    """What a claim is about: the part's reference and name, and the model."""
    return {**part.ref, "name": str(part), "model_hash": model_hash}


def control_of(matched: Matched) -> dict[str, Any]:
    """Without any part to compare with, the claim has no control leg."""
    if matched.made:
        return {"rule": matched.rule, **matched.made}
    named = [str(part) if isinstance(part, Unit) else part.ref for part in matched.parts]
    return {"rule": matched.rule, "parts": named} if named else {}


def short_name(part: Part) -> str:
    """ "head 17.3", "MLP 20"."""
    site = part.writes[0]
    if not isinstance(part, Unit):
        return str(part)
    if site.kind == "z" and site.index is not None:
        return f"head {site.layer}.{site.index}"
    if site.kind == "mlp_post" and site.index is not None:
        return f"neuron {site.layer}.{site.index}"
    return f"MLP {site.layer}" if site.kind == "mlp_out" and site.index is None else str(part)
