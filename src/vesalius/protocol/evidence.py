"""What was found when a claim was tested, and what follows from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vesalius.errors import InputError, ProtocolError, UnknownNameError
from vesalius.protocol.canonical import build, content_hash, mapping, number, numbers

STATUSES = ("measured", "unmeasured")
OUTCOMES = ("SUPPORTED", "REFUTED", "NOT SPECIFIC", "INCONCLUSIVE")
RETRIED = ("out of memory", "interrupted", "device failed")
"""Why a claim was not measured, where the evidence had no part in it: it may be tried again, by the same plan."""
REASONS = (*RETRIED, "not finite", "not in the prompts", "too few examples", "left out")
"""Every reason for a claim, or an example, to be unmeasured. More may be said after a colon."""
TRIES, LONGEST_REASON = 3, 500
# When and how dearly something was measured does not change what was measured.
_NOT_IN_ID = ("cost", "created_at")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The measurement of one claim on one set of examples. Data only.

    effects        raw e_i per example, BEFORE the claim's sign, in the claim's unit, oriented so that one sign means
                   the same in every condition (say, positive: the part helps the answer)
    control        the matched control's effect per example, or None when the claim has no control
    nulls          null name -> its effect per example;  draws: leg name -> null draws of the mean effect (rank legs)
    groups         kind of group -> one label per example; several labels of one example are joined by "|"
    missing        examples that were handed out and not measured: hash -> why, a reason of `REASONS`. Since they could
                   have been chosen, a claim with any counts as unmeasured
    example_hashes one per example;  data_hash, model_hash, plan_hash: what was run on what, by which plan
    diagnostics    off-distribution figures and the like; `"other_conditions": {name: mean effect}` names the same
                   effect under other corruptions or directions
    created_at     ISO time, passed in

    `id` is the content hash without `cost` and `created_at`: a study resumed after a crash finds its own record.
    Raises InputError for lengths that differ, NotFiniteError naming the index.
    """

    claim_id: str
    status: str = "measured"
    reason: str = ""
    effects: tuple[float, ...] = ()
    control: tuple[float, ...] | None = None
    nulls: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    draws: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    example_hashes: tuple[str, ...] = ()
    data_hash: str = ""
    model_hash: str = ""
    plan_hash: str = ""
    seed: int = 0
    n: int = 0
    cost: Mapping[str, Any] = field(default_factory=dict)
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""
    commit: str = ""
    created_at: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise UnknownNameError("status of evidence", self.status, STATUSES)
        self._set("effects", numbers(self.effects, "effects"))
        self._set("control", None if self.control is None else numbers(self.control, "control"))
        for name in ("nulls", "draws"):
            self._set(name, {str(k): numbers(v, f"{name}.{k}") for k, v in getattr(self, name).items()})
        self._set("groups", {str(k): tuple(map(_label, v)) for k, v in self.groups.items()})
        self._set("missing", {str(k): _reason(str(v)) for k, v in self.missing.items()})
        self._set("example_hashes", tuple(map(str, self.example_hashes)))
        for name in ("cost", "diagnostics"):
            self._set(name, mapping(getattr(self, name), name))
        for name, value in mapping(self.diagnostics.get("other_conditions", {}), "other_conditions").items():
            number(value, f"diagnostics.other_conditions.{name}")
        if self.n not in (0, len(self.effects)):
            raise InputError(f"n is {self.n} but there are {len(self.effects)} effects")
        self._set("n", len(self.effects))
        self._check_lengths()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_lengths(self) -> None:
        if self.status == "unmeasured":
            if self.effects or not self.reason:
                raise InputError("unmeasured evidence needs a reason and has no effects")
            return
        if not self.effects:
            raise InputError("measured evidence needs at least one effect; say unmeasured(reason) when there is none")
        both = set(self.missing) & set(self.example_hashes)
        if both:
            raise InputError(f"example {min(both)[:12]} is measured and missing at once")
        columns: dict[str, tuple[Any, ...]] = {"example_hashes": self.example_hashes, **self.columns}
        for name, column in (columns | {f"groups.{k}": v for k, v in self.groups.items()}).items():
            if len(column) != self.n:
                raise InputError(f"{name} has {len(column)} entries for {self.n} effects; give one per example")

    @cached_property
    def id(self) -> str:
        """Content hash of what was found."""
        return content_hash({k: v for k, v in self.to_json().items() if k not in _NOT_IN_ID})

    @property
    def measured(self) -> bool:
        return self.status == "measured"

    @property
    def counts(self) -> bool:
        """Whether a verdict can rest on it: it was measured, and on every example that was handed out."""
        return self.measured and not self.missing

    @property
    def columns(self) -> dict[str, tuple[float, ...]]:
        """Effects, control and nulls by name, one value per example each."""
        control = {} if self.control is None else {"control": self.control}
        return {"effects": self.effects, **control, **{f"nulls.{name}": values for name, values in self.nulls.items()}}

    @property
    def why(self) -> str:
        """The reason without what was said about it."""
        return self.reason.split(":")[0].strip()

    def check_reason(self) -> None:
        """Raises ProtocolError for unmeasured evidence whose reason is none of `REASONS`, or too long."""
        if self.why not in REASONS or len(self.reason) > LONGEST_REASON:
            raise ProtocolError(
                f"claim {self.claim_id[:12]} is unmeasured because of {self.reason[:80]!r}; the reason must be one of "
                f"{', '.join(REASONS)}, and may go on after a colon, up to {LONGEST_REASON} characters"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists; `Evidence.from_json` gives equal evidence back."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        # Evidence that was written before the field was there keeps its hash.
        return mapping({k: v for k, v in plain.items() if k != "missing" or v}, "evidence")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evidence:
        """Raises UnknownNameError for an unknown key, InputError for a missing one."""
        return build(cls, data)


def unmeasured(claim_id: str, reason: str, *, plan_hash: str = "", **rest: Any) -> Evidence:
    """Evidence that a claim could not be measured, and why. It counts as p = 1.

    reason: one of `REASONS`, and more after a colon where there is more to say. After one of `RETRIED` the same plan
    may try again, `TRIES` times in all; every try counts as a test in the p-value of what is found in the end.
    """
    return Evidence(claim_id=claim_id, status="unmeasured", reason=reason, plan_hash=plan_hash, **rest)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What follows from the evidence for one claim; computed, never typed in.

    outcome      SUPPORTED, REFUTED, NOT SPECIFIC (the effect holds, and the control or a null does as well) or
                 INCONCLUSIVE
    reason       of REFUTED: absent, opposite, too_small, not_specific (the control does as well, and the effect itself
                 is not sure); of INCONCLUSIVE: unmeasured, n_too_small, or None when more examples would not decide
                 (null draws are too few); else None
    p_supported  largest leg p-value of H0: theta <= 0;  p_refuted: K times the smallest of H0: theta >= 0;
                 `_holm`: adjusted over the family
    estimate, low, high   mean RAW effect (before the sign) and its 95 % clustered interval; None when unmeasured
    legs         dicts of name, theta, low, high, p_greater, p_less, on signed effects
    n_to_decide  examples with which the outcome would likely be decided (80 % power), None when unknown
    scope        "general", or what it is limited to
    """

    claim_id: str
    outcome: str
    reason: str | None
    p_supported: float
    p_supported_holm: float
    p_refuted: float
    p_refuted_holm: float
    estimate: float | None
    low: float | None
    high: float | None
    n: int
    n_groups: int
    legs: tuple[Mapping[str, Any], ...] = ()
    n_to_decide: int | None = None
    scope: str = "general"
    exploratory: bool = False

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            raise UnknownNameError("outcome", self.outcome, OUTCOMES)
        for name in ("estimate", "low", "high"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else number(value, name))
        object.__setattr__(self, "legs", tuple(mapping(leg, "leg") for leg in self.legs))

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists; `Verdict.from_json` gives an equal verdict back."""
        return mapping({f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, "verdict")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Verdict:
        """Raises UnknownNameError for an unknown key, InputError for a missing one."""
        return build(cls, data)


def _label(label: Any) -> str:
    return "|".join(map(str, label)) if isinstance(label, (tuple, list)) else str(label)


def _reason(text: str) -> str:
    if text.split(":")[0].strip() not in REASONS:
        raise UnknownNameError("reason of a missing example", text[:80], REASONS)
    return text
