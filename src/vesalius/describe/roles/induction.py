"""Induction head: a repeated token attends to what came after it the last time (Elhage et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from vesalius.describe.context import Context, RoleFit, is_head
from vesalius.describe.ingredients import looks, matters, role_fit
from vesalius.describe.places import present
from vesalius.site import Site

# Query, key and the repeated token itself: the repeated distractor, or a last token that the prompt has seen before.
REPETITIONS = (
    ("distractor_last", "distractor_first+1", "distractor_first"),
    ("end", "earlier_end+1", "earlier_end"),
)


@dataclass(frozen=True)
class Induction:
    name: str = "induction"

    def applies(self, component: Site) -> bool:
        return is_head(component)

    def fit(self, context: Context, component: Site) -> RoleFit | None:
        places = [found for found in REPETITIONS if present(context.bench, *found)]
        if not places:
            return None
        seen = max((looks(context, component, *found) for found in places), key=lambda look: look.strength)
        return role_fit(context, component, self.name, [seen, matters(context, component, 1)])
