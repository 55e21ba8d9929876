"""S-suppressor: attends to the repeated name and lowers that name's logit, which helps the answer."""

from __future__ import annotations

from dataclasses import dataclass

from vesalius.describe.context import Context, RoleFit, is_head
from vesalius.describe.ingredients import copies, looks, role_fit, writes
from vesalius.describe.places import present
from vesalius.site import Site


@dataclass(frozen=True)
class SSuppressor:
    name: str = "S-suppressor"

    def applies(self, component: Site) -> bool:
        return is_head(component)

    def fit(self, context: Context, component: Site) -> RoleFit | None:
        mentions = ("distractor_first", "distractor_last")
        if not present(context.bench, *mentions, "answer"):
            return None
        views = {place: looks(context, component, "end", place, "answer") for place in mentions}
        key = max(views, key=lambda place: views[place].mean)
        written = [copies(context, component, key, -1), writes(context, component, 1)]
        return role_fit(context, component, self.name, [views[key], *written])
