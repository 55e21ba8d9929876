"""Duplicate-token head: a repeated token attends to its first mention (Wang et al. 2022, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

from vesalius.describe.context import Context, RoleFit, is_head
from vesalius.describe.ingredients import looks, matters, role_fit
from vesalius.describe.places import present
from vesalius.site import Site


@dataclass(frozen=True)
class DuplicateToken:
    name: str = "duplicate-token"

    def applies(self, component: Site) -> bool:
        return is_head(component)

    def fit(self, context: Context, component: Site) -> RoleFit | None:
        if not present(context.bench, "distractor_last", "distractor_first", "answer"):
            return None
        seen = looks(context, component, "distractor_last", "distractor_first", "answer")
        return role_fit(context, component, self.name, [seen, matters(context, component)])
