"""Matched controls: components like the one a claim is about, but outside the circuit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vesalius.bench import Bench, components
from vesalius.errors import InputError
from vesalius.site import Site

WINDOW, MOST, LEAST = 4, 8, 2
"""Controls stand within 4 layers; up to 8 are taken, and with fewer than 2 the window is widened."""


@dataclass(frozen=True)
class Matched:
    """Control components and, in words, how they were chosen."""

    rule: str
    parts: tuple[Site, ...]


def entropy(bench: Bench, component: Site) -> float:
    """Mean attention entropy (nats) of a head at the end of the clean prompts."""
    if ("entropy", component) not in bench.memo:
        seen = bench.pattern(component)[torch.arange(bench.n), bench.named_positions["end"]]
        bench.memo["entropy", component] = float(torch.special.entr(seen).sum(-1).mean())
    return bench.memo["entropy", component]


def matched_controls(bench: Bench, component: Site, members: Sequence[Site], *, before: int | None = None) -> Matched:
    """Up to 8 components of the same kind that are not members, within 4 layers.

    Heads: those nearest in attention entropy at the end, on this bench (use discovery). MLPs: the nearest layers.
    before: only layers under this one (a control must be able to do what it is compared at). The same input gives the
    same controls. When fewer than 2 are left the window grows a layer at a time, and the rule says so. Raises
    InputError for a component that is neither head nor MLP.
    """
    if component.layer is None or component.kind not in ("z", "mlp_out"):
        raise InputError(f"{component} has no matched controls: only heads (layers.L.z[h]) and MLPs have")
    taken = {*members, component}
    pool = [
        part for part in components(bench.model)
        if part.kind == component.kind and part not in taken and (before is None or _layer(part) < before)
    ]  # fmt: skip
    window, found = WINDOW, _within(pool, component, WINDOW)
    while len(found) < min(LEAST, len(pool)):
        window += 1
        found = _within(pool, component, window)
    chosen = sorted(found, key=lambda part: _distance(bench, component, part))[:MOST]
    return Matched(_rule(component, window, len(chosen), before), tuple(sorted(chosen, key=lambda part: part.order)))


def _within(pool: Sequence[Site], component: Site, window: int) -> list[Site]:
    return [part for part in pool if abs(_layer(part) - _layer(component)) <= window]


def _layer(part: Site) -> int:
    assert part.layer is not None
    return part.layer


def _distance(bench: Bench, component: Site, part: Site) -> tuple[float, int, tuple[int, ...]]:
    """Nearest first: in entropy for heads, then in layers; ties go to the earlier part."""
    apart = abs(entropy(bench, part) - entropy(bench, component)) if component.kind == "z" else 0.0
    return apart, abs(_layer(part) - _layer(component)), part.order


def _rule(component: Site, window: int, count: int, before: int | None) -> str:
    kind = "heads nearest in attention entropy at the end" if component.kind == "z" else "MLPs"
    widened = f" (widened from {WINDOW}: fewer than {LEAST} were left)" if window > WINDOW else ""
    under = f", before layer {before}" if before is not None else ""
    return f"{count} {kind} outside the circuit, within {window} layers{widened}{under}"
