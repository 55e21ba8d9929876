"""Negative mover: works against the answer, whatever it looks at (Wang et al. 2022, section 3.4).

The role is given by the sign of the effect; where the head looks is told, but decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from vesalius.describe.context import Context, RoleFit, is_head
from vesalius.describe.ingredients import matters, mean_of, role_fit, writes
from vesalius.describe.places import in_words, present
from vesalius.site import Site

LOOKED_AT = ("answer", "distractor_first", "distractor_last", "end", "first")


@dataclass(frozen=True)
class NegativeMover:
    name: str = "negative mover"

    def applies(self, component: Site) -> bool:
        return is_head(component)

    def fit(self, context: Context, component: Site) -> RoleFit | None:
        ingredients = [writes(context, component, -1), matters(context, component, -1)]
        return role_fit(context, component, self.name, ingredients, _where(context, component))


def _where(context: Context, component: Site) -> str:
    places = [place for place in LOOKED_AT if present(context.bench, place)]
    seen = {place: mean_of(context.bench, "attends", component, query="end", key=place)[1] for place in places}
    most = max(seen, key=lambda place: seen[place])
    return f"; from the last position it looks most at {in_words(most)} ({seen[most]:.2f})"
