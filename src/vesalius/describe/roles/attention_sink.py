"""Attention sink: rests on the first position and writes next to nothing (Xiao et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from vesalius.describe.context import Context, RoleFit, is_head
from vesalius.describe.ingredients import looks, matters, quiet, role_fit
from vesalius.site import Site

# More than half: at rest, whatever the rest of the attention does.
RESTS = 0.5


@dataclass(frozen=True)
class AttentionSink:
    name: str = "attention sink"

    def applies(self, component: Site) -> bool:
        return is_head(component)

    def fit(self, context: Context, component: Site) -> RoleFit | None:
        if bool((context.bench.named_positions["end"] < 1).any()):
            return None
        seen = looks(context, component, "end", "first", "others", at_least=RESTS)
        return role_fit(context, component, self.name, [seen, quiet(context, component), matters(context, component)])
