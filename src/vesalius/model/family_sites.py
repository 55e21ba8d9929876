"""The sites that a family's models have."""

from __future__ import annotations

from vesalius.adapters import Adapter, Layout, Stack
from vesalius.site import ATTENTION, GLOBAL_KINDS, LAYER_KINDS, RESULTS, Site


def sites_of(adapter: Adapter, layout: Layout) -> list[Site]:
    """Whole sites of a model of this family and size, in forward order."""
    found = [Site(kind) for kind in GLOBAL_KINDS if kind in adapter.outside]
    for name in adapter.stack_names:
        stack = adapter.stack(name)
        kinds = [kind for kind in LAYER_KINDS if kind in stack.sites or _derives(stack, kind)]
        found += [Site(kind, n, stack=name) for n in range(layout.layers_of(name)) for kind in kinds]
        found += [Site(kind, stack=name) for kind in GLOBAL_KINDS if name and kind in stack.outside]
    return sorted(found, key=lambda site: site.order)


def _derives(stack: Stack, kind: str) -> bool:
    """Sites that no module has and that are made on the way."""
    if kind in ATTENTION:
        return bool(stack.cross_attention if kind.startswith("cross") else stack.attention)
    z, projection = ("z", stack.o_proj) if kind == "result" else ("cross_z", stack.cross_o_proj)
    return kind in RESULTS and z in stack.sites and bool(projection)
