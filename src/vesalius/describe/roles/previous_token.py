"""Previous-token head: every position attends to the one before it (Olsson et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from vesalius.describe.context import Context, RoleFit, is_head
from vesalius.describe.ingredients import looks, matters, role_fit
from vesalius.describe.measures import FIRST_QUERY
from vesalius.site import Site

# Averaged over positions, any head that looks near itself reaches .2: a previous-token head does twice that.
MOSTLY = 0.4


@dataclass(frozen=True)
class PreviousToken:
    name: str = "previous-token"

    def applies(self, component: Site) -> bool:
        return is_head(component)

    def fit(self, context: Context, component: Site) -> RoleFit | None:
        if bool((context.bench.named_positions["end"] < FIRST_QUERY).any()):
            return None
        seen = looks(context, component, "every", "previous", "two back", at_least=MOSTLY)
        return role_fit(context, component, self.name, [seen, matters(context, component)])
