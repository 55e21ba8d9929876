"""S-inhibition head: reads the repeated name and turns the movers from it (Wang et al. 2022, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

from vesalius.describe.context import FITS, Context, RoleFit, is_head
from vesalius.describe.ingredients import Ingredient, looks, matters, role_fit, turns
from vesalius.describe.measures import later
from vesalius.describe.places import present
from vesalius.site import Site


@dataclass(frozen=True)
class SInhibition:
    name: str = "S-inhibition"

    def applies(self, component: Site) -> bool:
        return is_head(component)

    def fit(self, context: Context, component: Site) -> RoleFit | None:
        if not later(component, context.movers) or not _speakable(context):
            return None
        ingredients = _cheap(context, component)
        # The sweep that watches the movers is dear: only for heads that pass the rest.
        shift = turns(context, component) if _hold(ingredients) else None
        return role_fit(context, component, self.name, [*ingredients, *([shift] if shift else [])])


def promising(context: Context, component: Site) -> bool:
    """Whether a head passes all thresholds of S-inhibition but the last, the movers' attention."""
    return _speakable(context) and _hold(_cheap(context, component))


def _speakable(context: Context) -> bool:
    return present(context.bench, "distractor_first", "distractor_last", "answer")


def _cheap(context: Context, component: Site) -> list[Ingredient]:
    return [looks(context, component, "end", "distractor_last", "answer"), matters(context, component, 1)]


def _hold(ingredients: list[Ingredient]) -> bool:
    return min(ingredient.strength for ingredient in ingredients) >= FITS
