"""Roles: executable predictions about a member of a circuit, and what they are fitted in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vesalius.bench import Bench
from vesalius.describe.matching import Matched, matched_controls
from vesalius.protocol import Claim
from vesalius.protocol.claim import default_delta
from vesalius.site import Site

FITS = 0.5
"""A role fits from this score on: every one of its thresholds holds."""


@dataclass(frozen=True)
class Behaviour:
    """One measurable figure, by the name of a check and its parameters: measured alike on discovery and validation."""

    check: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Estimate:
    """The mean of a behaviour on discovery."""

    behaviour: Behaviour
    mean: float


@dataclass(frozen=True)
class RoleFit:
    """How well a role describes a component, on discovery.

    score: 0 to 1, of the weakest prediction (thresholds hold from .5 on). behaviours: measured means. description: a
    sentence with the estimates. claims: what is to be tested on fresh data; empty for a role that does not fit.
    """

    role: str
    score: float
    behaviours: tuple[Estimate, ...]
    description: str
    claims: tuple[Claim, ...] = ()

    @property
    def fits(self) -> bool:
        return self.score >= FITS


@dataclass(frozen=True, eq=False)
class Context:
    """What roles are fitted in. Build it with `Context.of`.

    bench: discovery. members: the circuit. movers: name movers found so far. total_effect: R, the mean total effect of
    the main corruption, in logits. delta: the smallest effect worth claiming. controls: component -> matched
    controls. parents: content hashes of the discovery data. n:
    examples planned for validation.
    """

    bench: Bench
    members: tuple[Site, ...]
    total_effect: float
    delta: float
    controls: Callable[[Site], Matched]
    movers: tuple[Site, ...] = ()
    study: str = ""
    parents: tuple[str, ...] = ()
    n: int = 1
    seed: int = 0
    model_hash: str = ""

    @classmethod
    def of(cls, bench: Bench, members: Sequence[Site], *, study: str = "", n: int | None = None) -> Context:
        """Context of a circuit's members on discovery; n defaults to as many examples as discovery has.

        Raises InputError when clean and corrupted runs do not differ.
        """
        total = float(bench.total(bench.main).mean())
        chosen = tuple(members)
        return cls(
            bench, chosen, total, default_delta(total),
            controls=lambda component: matched_controls(bench, component, chosen),
            study=study, parents=tuple(pairs.content_hash for pairs in bench.corruptions.values()),
            n=bench.n if n is None else n, seed=bench.seed, model_hash=bench.model.content_hash,
        )  # fmt: skip


class Role(Protocol):
    """One entry of the role library."""

    @property
    def name(self) -> str: ...

    def applies(self, component: Site) -> bool:
        """Whether this kind of component can have the role."""
        ...

    def fit(self, context: Context, component: Site) -> RoleFit | None:
        """How well the role describes it; None when the prompts lack what the role speaks about."""
        ...


def is_head(component: Site) -> bool:
    return component.kind == "z" and component.index is not None


def is_mlp(component: Site) -> bool:
    return component.kind == "mlp_out" and component.index is None


def short_name(component: Site) -> str:
    """ "head 17.3", "MLP 20"."""
    if is_head(component):
        return f"head {component.layer}.{component.index}"
    return f"MLP {component.layer}" if is_mlp(component) else str(component)
