"""The sites that a family's models have, and how far their numbers go."""

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


def limit_of(kind: str, layout: Layout) -> tuple[int | None, str]:
    """How far an index in brackets may go, and what it counts. Neurons are checked against the tensor itself."""
    kind = kind.removeprefix("cross_")
    if kind in ("k", "v"):
        return layout.n_kv_heads, "key-value heads per layer"
    if kind in ("q", "z", "result", "pattern", "scores"):
        return layout.n_heads, "heads per layer"
    if kind in ("router", "expert_out"):
        return layout.n_experts, "experts per layer"
    return (None, "neurons") if kind == "mlp_post" else (layout.d_model, "dimensions")
