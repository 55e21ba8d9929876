"""Name mover: attends to the answer, copies it, and so raises its logit (Wang et al. 2022, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

from vesalius.describe.context import Context, RoleFit, is_head
from vesalius.describe.ingredients import copies, looks, role_fit, writes
from vesalius.describe.places import present
from vesalius.site import Site


@dataclass(frozen=True)
class NameMover:
    name: str = "name mover"

    def applies(self, component: Site) -> bool:
        return is_head(component)

    def fit(self, context: Context, component: Site) -> RoleFit | None:
        if not present(context.bench, "answer", "distractor_first"):
            return None
        seen = looks(context, component, "end", "answer", "distractor_first")
        written = [copies(context, component, "answer", 1), writes(context, component, 1)]
        return role_fit(context, component, self.name, [seen, *written])
