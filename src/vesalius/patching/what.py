"""What a sweep edits, and where the edit is written: sites (perhaps one head or neuron of them) and Parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vesalius.errors import InputError
from vesalius.parts import Part, Unit
from vesalius.site import ATTENTION, RESULTS, Site

What = Site | Part
_UNSWEPT = (*ATTENTION, *RESULTS, "resid_mid", "resid_mid_cross")


def what_of(given: What) -> What:
    """A Unit is its site; every other Part reads and writes for itself."""
    return given.site if isinstance(given, Unit) else given


def place_of(what: What) -> tuple[Site, int]:
    """The whole site an edit is written at, and the index there (-1: all of it, or a Part's own business)."""
    if isinstance(what, Site):
        return normal(what)
    site = normal(what.site)[0]
    if site.kind == "module":
        raise InputError(f"{what} cannot be swept: a Part of a module's tensor has no known axes; sweep the module")
    return site, -1


def name_of(what: What) -> str:
    """A name for people: the site, and the label that a Part has."""
    if isinstance(what, Site):
        return str(what)
    told = what.to_json()
    detail = str(told.get("label") or told.get("index", "") or str(told.get("sha256", ""))[:8])
    return f"{what.site} {told.get('kind', type(what).__name__.lower())} {detail}".strip()


def reference_of(what: What) -> str | Mapping[str, Any]:
    """What tells it from every other: a site's name, or a Part's reference."""
    return str(what) if isinstance(what, Site) else what.to_json()


def normal(part: Site) -> tuple[Site, int]:
    """The site an edit is written at and the index there: a layer's output is the next layer's input.

    `embed` is the first layer's input: with learned positions it holds token and position embedding.
    """
    index = -1 if part.index is None else part.index
    whole = part.whole
    if whole.kind in _UNSWEPT or (whole.layer is None and whole.kind not in ("embed", "module")):
        raise InputError(
            f"{part} cannot be swept; sweep embed, resid_pre, resid_post, attn_out, mlp_out, mlp_post, router, "
            "expert_out, q, k, v, z (and cross_q, cross_k, cross_v, cross_z, cross_attn_out) or module:<path>|in, |out"
        )
    if whole.kind == "resid_post" and whole.layer is not None and not whole.stack:
        return Site("resid_pre", whole.layer + 1), index
    if whole.kind == "embed" and not whole.stack:
        return Site("resid_pre", 0), index
    return whole, index
