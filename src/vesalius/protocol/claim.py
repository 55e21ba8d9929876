"""What is claimed, before it is tested."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vesalius.errors import InputError, UnknownNameError
from vesalius.protocol.canonical import build, content_hash, mapping, number, plain

KINDS = ("predictive", "causal", "circuit")
DIRECTIONS = ("noising", "denoising")
EFFECTS = ("total", "direct")
RESERVED_LEGS = ("effect", "control")
DEFAULT_SHARE, SMALLEST_SHARE = 0.05, 0.02


def default_delta(total_effect: float) -> float:
    """The smallest effect worth claiming unless stated otherwise: 5 % of |R|, R the total effect on discovery."""
    if number(total_effect, "total_effect") == 0:
        raise InputError("the total effect is 0: clean and corrupted runs do not differ, so no effect can be claimed")
    return DEFAULT_SHARE * abs(float(total_effect))


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One testable statement about a Part or a Circuit. Data only; its `id` is the hash of its content.

    statement      in words
    subject        reference to what it is about: kind, site, index, model hash ...
    check          name of the check that measures it, with `parameters`. The rule itself reads `"test": "rank"` (legs
                   with enough null draws use ranks) and `"clusters": [..]` (kinds of group that p-values respect)
    sign           +1 or -1: the predicted sign of the effect
    delta          smallest |effect| worth claiming, > 0, in `unit`; with a total effect R never under 2 % of |R|
    total_effect   R, clean minus corrupted, measured on discovery; required for causal claims
    control        how the matched control was chosen, and the chosen parts; empty: the claim has no control leg
    delta_c        margin over the control, default delta / 2
    nulls          (name, margin) of each further null hypothesis that must be beaten
    condition      corruption, positions, direction ("noising" or "denoising"), effect ("total" or "direct")
    n              planned number of examples
    parents        content hashes of the data it was made from
    role           free label;  study: the study whose family it belongs to

    Raises InputError for impossible values, UnknownNameError for an unknown kind, direction or effect.
    """

    statement: str
    subject: Mapping[str, Any]
    check: str
    delta: float
    n: int
    kind: str = "causal"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    sign: int = 1
    total_effect: float | None = None
    unit: str = ""
    control: Mapping[str, Any] = field(default_factory=dict)
    delta_c: float | None = None
    nulls: tuple[tuple[str, float], ...] = ()
    condition: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    parents: tuple[str, ...] = ()
    role: str | None = None
    study: str = ""

    def __post_init__(self) -> None:
        for name in ("subject", "parameters", "control", "condition"):
            object.__setattr__(self, name, mapping(getattr(self, name), name))
        object.__setattr__(self, "delta", number(self.delta, "delta"))
        margin = self.delta / 2 if self.delta_c is None else number(self.delta_c, "delta_c")
        object.__setattr__(self, "delta_c", margin)
        object.__setattr__(self, "nulls", tuple(_null(pair) for pair in self.nulls))
        object.__setattr__(self, "parents", tuple(map(str, self.parents)))
        self._check_words()
        self._check_numbers()
        self._check_share()

    def _check_words(self) -> None:
        for name in ("statement", "check"):
            if not str(getattr(self, name)).strip():
                raise InputError(f"a claim needs a {name}; got {getattr(self, name)!r}")
        _known("kind of claim", self.kind, KINDS)
        for key, known in (("direction", DIRECTIONS), ("effect", EFFECTS)):
            if key in self.condition:
                _known(key, str(self.condition[key]), known)
        names = [name for name, _ in self.nulls]
        if len({*names, *RESERVED_LEGS}) < len(names) + len(RESERVED_LEGS):
            raise InputError(f"null names must differ from each other and from {RESERVED_LEGS}; got {names}")

    def _check_numbers(self) -> None:
        if self.sign not in (1, -1):
            raise InputError(f"sign must be +1 or -1; got {self.sign!r}")
        if not self.delta > 0:
            raise InputError(f"delta must be positive; got {self.delta}")
        if self.control_margin < 0 or any(margin < 0 for _, margin in self.nulls):
            raise InputError(f"margins must not be negative; got delta_c {self.delta_c}, nulls {self.nulls}")
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise InputError(f"n, the planned number of examples, must be a positive integer; got {self.n!r}")

    def _check_share(self) -> None:
        if self.total_effect is None:
            if self.kind == "causal":
                raise InputError("a causal claim needs total_effect (clean minus corrupted, measured on discovery)")
            return
        total = number(self.total_effect, "total_effect")
        object.__setattr__(self, "total_effect", total)
        if self.delta < SMALLEST_SHARE * abs(total) * (1 - 1e-12):
            raise InputError(
                f"delta {self.delta:g} is {self.delta / abs(total):.1%} of the total effect {total:g}; effects under "
                f"{SMALLEST_SHARE:.0%} are not worth claiming: use at least {SMALLEST_SHARE * abs(total):g}"
            )

    @property
    def control_margin(self) -> float:
        """delta_c, filled in."""
        assert self.delta_c is not None
        return self.delta_c

    @cached_property
    def id(self) -> str:
        """Content hash of the claim."""
        return content_hash(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists; `Claim.from_json` gives an equal claim back."""
        return mapping({f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, "claim")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Claim:
        """Raises UnknownNameError for an unknown key, InputError for a missing one."""
        return build(cls, data)


@dataclass(frozen=True)
class Family:
    """All claims of a study, sealed together: m is how many tests are corrected for.

    `exploratory` says that data of the study had been opened before the family was sealed; it is what happened, not
    what was claimed, and therefore no part of the `id`.
    """

    claims: tuple[Claim, ...]
    study: str = ""
    exploratory: bool = False
    m: int = 0

    def __post_init__(self) -> None:
        claims = tuple(c if isinstance(c, Claim) else Claim.from_json(c) for c in self.claims)
        object.__setattr__(self, "claims", claims)
        if not claims:
            raise InputError("a family needs at least one claim; got none")
        if len({claim.id for claim in claims}) < len(claims):
            raise InputError("the same claim is listed twice; every claim of a family is counted once")
        if self.m not in (0, len(claims)):
            raise InputError(f"m is {self.m} but the family holds {len(claims)} claims")
        object.__setattr__(self, "m", len(claims))

    @cached_property
    def id(self) -> str:
        """Content hash of the claims and the study."""
        return content_hash({"claims": [claim.id for claim in self.claims], "m": self.m, "study": self.study})

    def to_json(self) -> dict[str, Any]:
        claims = [claim.to_json() for claim in self.claims]
        return {"claims": claims, "m": self.m, "study": self.study, "exploratory": self.exploratory}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Family:
        """Raises UnknownNameError for an unknown key, InputError for a missing one."""
        return build(cls, data)


def _null(pair: Any) -> tuple[str, float]:
    try:
        name, margin = pair
    except (TypeError, ValueError) as error:
        raise InputError(f"each of nulls must be (name, margin); got {plain(pair, 'null')!r}") from error
    return str(name), number(margin, f"margin of null {name!r}")


def _known(kind: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise UnknownNameError(kind, given, known)
