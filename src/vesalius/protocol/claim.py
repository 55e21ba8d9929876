"""What is claimed, before it is tested."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any

from vesalius.errors import InputError, UnknownNameError
from vesalius.protocol.canonical import build, content_hash, mapping, number, plain

SCHEMA = 2
"""Claims of schema 1 (before quantities declared their scales) are still read, and keep their hashes."""
_SCHEMA_1 = {"quantity": "check", "scale": "total_effect"}
TOTAL_EFFECT = "total effect"
DIRECTIONS = ("noising", "denoising")
EFFECTS = ("total", "direct")
RESERVED_LEGS = ("effect", "control")
GIVEN_UP = "given_up"
ORIGINS = ("effect", "scale", GIVEN_UP)
MEASURED = ("estimate", "low", "high", "n", "data_hash")
DEFAULT_SHARE, SMALLEST_SHARE = 0.05, 0.02


def default_delta(total_effect: float) -> float:
    """The smallest effect worth claiming unless stated otherwise: 5 % of |R|, R the total effect on discovery."""
    if number(total_effect, "total_effect") == 0:
        raise InputError("the total effect is 0: clean and corrupted runs do not differ, so no effect can be claimed")
    return DEFAULT_SHARE * abs(float(total_effect))


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One testable statement about a Part or a circuit. Data only; its `id` is the hash of its content.

    statement      in words
    subject        reference to what it is about: the Part's `ref`, its name, the model's hash
    quantity       name of the quantity that is measured, with `parameters`. The rule itself reads `"test": "rank"`
                   (legs with enough null draws use ranks) and `"clusters": [..]` (kinds of group that p-values respect)
    sign           +1 or -1: the predicted sign of the effect
    delta          smallest |effect| worth claiming, > 0, in `unit`; never under 2 % of a total effect
    scale          what delta is measured against, on discovery, and `scale_name` what that is: a total effect R (clean
                   minus corrupted), a standard deviation, an accuracy; required for causal claims
    kind           free: "predictive", "causal", "circuit", ...
    control        how the matched control was chosen, and the chosen parts; empty: the claim has no control leg
    delta_c        margin over the control, default delta / 2
    nulls          (name, margin) of each further null hypothesis that must be beaten
    condition      what holds while it is measured, in the quantity's words: corruption, direction ("noising" or
                   "denoising"), effect ("total" or "direct"), prompts, ...
    n              planned number of examples
    parents        content hashes of the data it was made from
    origin         what was measured there: "effect", of the subject itself, and "scale", each with estimate, low, high,
                   n and data_hash. A ledger takes a claim without for exploratory: its threshold could be any number
    role           free label;  study: the study whose family it belongs to

    `check=` and `total_effect=` are taken for `quantity=` and `scale=`, and can be read. Raises InputError for
    impossible values, UnknownNameError for an unknown direction or effect.
    """

    statement: str
    subject: Mapping[str, Any]
    quantity: str = ""
    delta: float
    n: int
    kind: str = "causal"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    sign: int = 1
    scale: float | None = None
    scale_name: str = TOTAL_EFFECT
    unit: str = ""
    control: Mapping[str, Any] = field(default_factory=dict)
    delta_c: float | None = None
    nulls: tuple[tuple[str, float], ...] = ()
    condition: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    parents: tuple[str, ...] = ()
    role: str | None = None
    study: str = ""
    origin: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema not in (1, SCHEMA):
            raise InputError(f"claims of schema {self.schema} are not understood; this version writes {SCHEMA}")
        for name in ("subject", "parameters", "control", "condition", "origin"):
            object.__setattr__(self, name, mapping(getattr(self, name), name))
        object.__setattr__(self, "delta", number(self.delta, "delta"))
        margin = self.delta / 2 if self.delta_c is None else number(self.delta_c, "delta_c")
        object.__setattr__(self, "delta_c", margin)
        object.__setattr__(self, "nulls", tuple(_null(pair) for pair in self.nulls))
        object.__setattr__(self, "parents", tuple(map(str, self.parents)))
        self._check_words()
        self._check_numbers()
        self._check_share()
        self._check_origin()

    def _check_words(self) -> None:
        for name in ("statement", "quantity", "kind"):
            if not str(getattr(self, name)).strip():
                raise InputError(f"a claim needs a {name}; got {getattr(self, name)!r}")
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
        if self.scale is None:
            if self.kind == "causal":
                raise InputError("a causal claim needs scale=: the total effect, clean minus corrupted, on discovery")
            return
        scale = number(self.scale, "scale")
        object.__setattr__(self, "scale", scale)
        if self.scale_name == TOTAL_EFFECT and self.delta < SMALLEST_SHARE * abs(scale) * (1 - 1e-12):
            raise InputError(
                f"delta {self.delta:g} is {self.delta / abs(scale):.1%} of the total effect {scale:g}; effects under "
                f"{SMALLEST_SHARE:.0%} are not worth claiming: use at least {SMALLEST_SHARE * abs(scale):g}"
            )

    def _check_origin(self) -> None:
        for name, measured in self.origin.items():
            _known("origin", name, ORIGINS)
            if name == GIVEN_UP:
                if not isinstance(measured, list) or not all(isinstance(one, dict) for one in measured):
                    raise InputError(f"origin {name!r} lists what was said before, as objects; got {measured!r}")
                continue
            if not isinstance(measured, dict) or set(measured) != set(MEASURED):
                raise InputError(f"origin {name!r} must have {', '.join(MEASURED)}; got {measured!r}")
            number(measured["estimate"], f"origin.{name}.estimate")
        if "scale" in self.origin:
            stated = self.origin["scale"]["estimate"]
            if self.scale is None or not math.isclose(stated, self.scale, rel_tol=1e-9):
                raise InputError(f"scale is {self.scale}, but its origin measured {stated}")

    @property
    def has_fixed_scale(self) -> bool:
        """Whether delta is on a scale that needs no measuring, such as a probability."""
        return self.scale is None and self.scale_name != TOTAL_EFFECT

    @property
    def check(self) -> str:
        """The quantity, by its old name."""
        return self.quantity

    @property
    def total_effect(self) -> float | None:
        """The scale, by its old name."""
        return self.scale

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
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "origin" or self.origin}
        if self.schema == 1:
            plain = {_SCHEMA_1.get(name, name): plain[name] for name in plain if name not in ("schema", "scale_name")}
        return mapping(plain, "claim")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Claim:
        """Raises UnknownNameError for an unknown key, InputError for a missing one."""
        if not isinstance(data, Mapping) or "schema" in data:
            return build(cls, data)
        renamed = {old: new for new, old in _SCHEMA_1.items()}
        return build(cls, {**{renamed.get(name, name): value for name, value in data.items()}, "schema": 1})


def _taking_aliases(made: Callable[..., None]) -> Callable[..., None]:
    """Claim.__init__ that takes the old names as well.

    As InitVars of the dataclass they would be handed over by `dataclasses.replace`, and contradict what it changes.
    """

    @wraps(made)
    def init(self: Claim, **given: Any) -> None:
        for name, old in _SCHEMA_1.items():
            value = given.pop(old, None)
            if value is not None and given.get(name) not in ("", None, value):
                raise InputError(f"{name}={given[name]!r} and {old}={value!r} say different things")
            given |= {} if value is None else {name: value}
        made(self, **given)

    return init


Claim.__init__ = _taking_aliases(Claim.__init__)  # type: ignore[method-assign]


@dataclass(frozen=True)
class Family:
    """All claims of a study, sealed together; m is how many they are.

    exploratory: data of the study had been opened before the family was sealed, or what a claim was made from had not
    been opened and measured; it is what happened, not what was claimed, and therefore no part of the `id`.
    control_model: of a declared control, the hash of the model that all claims are tested on in place of the one that
    they are about.
    """

    claims: tuple[Claim, ...]
    study: str = ""
    exploratory: bool = False
    m: int = 0
    control_model: str = ""

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
        content = {"claims": [claim.id for claim in self.claims], "m": self.m, "study": self.study}
        return content_hash({**content, **self._control})

    @property
    def _control(self) -> dict[str, str]:
        """Nothing where there is none: families that were sealed before there were any keep their hash."""
        return {"control_model": self.control_model} if self.control_model else {}

    def to_json(self) -> dict[str, Any]:
        claims = [claim.to_json() for claim in self.claims]
        return {"claims": claims, "m": self.m, "study": self.study, "exploratory": self.exploratory, **self._control}

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
