"""Describing a circuit: every role is tried on every member, and the best one that fits is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vesalius.describe.context import Context, Role, RoleFit, is_head
from vesalius.describe.measures import later, measure_shifts
from vesalius.describe.roles import BY_SIGN, MOVER, NEEDS_MOVERS, ROLES, promising
from vesalius.protocol import Claim
from vesalius.site import Site

NO_ROLE = "no role fits"


@dataclass(frozen=True)
class Descriptions:
    """fits: member -> its best fitting role, or None: no role fits. scores: member -> score of every role tried."""

    fits: Mapping[str, RoleFit | None]
    scores: Mapping[str, Mapping[str, float]]

    def __getitem__(self, component: Site | str) -> RoleFit | None:
        return self.fits[str(component)]

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The claims of all descriptions, member by member."""
        return tuple(claim for fit in self.fits.values() if fit is not None for claim in fit.claims)


def describe(context: Context, roles: Sequence[Role] = ROLES) -> Descriptions:
    """The best fitting role of every member, on discovery. The embeddings get none: they are the input.

    Two passes, because some roles speak about name movers, which must be found first (those in `context.movers` count
    from the start).
    """
    plain = [role for role in roles if role.name not in NEEDS_MOVERS]
    fits = {member: _tried(context, member, plain) for member in context.members}
    found = [member for member, tried in fits.items() if (best := best_of(tried)) and best.role == MOVER]
    aware = replace(context, movers=tuple(dict.fromkeys([*context.movers, *found])))
    _shifts_together(aware)
    second = [role for role in roles if role.name in NEEDS_MOVERS]
    fits = {member: (*tried, *_tried(aware, member, second)) for member, tried in fits.items()}
    return Descriptions(
        {str(member): best_of(tried) for member, tried in fits.items()},
        {str(member): {fit.role: fit.score for fit in tried} for member, tried in fits.items()},
    )


def best_of(fits: Sequence[RoleFit]) -> RoleFit | None:
    """The best-scoring fit whose thresholds hold, a negative mover before all others; ties go to the first."""
    return max((fit for fit in fits if fit.fits), key=lambda fit: (fit.role == BY_SIGN, fit.score), default=None)


def _tried(context: Context, member: Site, roles: Sequence[Role]) -> tuple[RoleFit, ...]:
    fits = (role.fit(context, member) for role in roles if role.applies(member))
    return tuple(fit for fit in fits if fit is not None)


def _shifts_together(context: Context) -> None:
    """Measures what S-inhibition asks of all heads that may have it, in as few sweeps as there are sets of movers."""
    together: dict[tuple[Site, ...], list[Site]] = {}
    for member in filter(is_head, context.members):
        movers = tuple(later(member, context.movers))
        if movers and promising(context, member):
            together.setdefault(movers, []).append(member)
    for movers, parts in together.items():
        measure_shifts(context.bench, parts, movers, context.bench.main, "noising")
