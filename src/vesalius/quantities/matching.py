"""Matched controls: parts like the one a claim is about, but outside the circuit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from vesalius.activations import Activations
from vesalius.data.forward import captured
from vesalius.directions import Direction
from vesalius.inputs import Corpus
from vesalius.parts import OfDictionary, Part, Unit
from vesalius.patching.record import Recording
from vesalius.quantities.runs import Runs
from vesalius.quantities.values import PartValues
from vesalius.seeds import generator_for
from vesalius.site import Site

WINDOW, MOST, LEAST = 4, 8, 2
"""Controls stand within 4 layers; up to 8 are taken, and with fewer than 2 the window is widened."""
RANDOM = "random directions"
DRAWN = 64
"""Of parts that there are thousands of (neurons, latents), so many are looked at."""
TEXTS = 64
"""Of a corpus, so many texts are read to see how active they are."""
_WHOLE = ("z", "mlp_out")
# Values of all latents of a dictionary that are looked at together.
_ROWS_AT_ONCE = 2**24


@dataclass(frozen=True)
class Matched:
    """Control parts and, in words, how they were chosen.

    made: how parts that have no name of their own are made again (of random directions, how many).
    """

    rule: str
    parts: tuple[Part, ...]
    made: Mapping[str, int] = field(default_factory=dict)


def matched_controls(runs: Runs, part: Part, members: Sequence[Part], *, before: int | None = None) -> Matched:
    """Up to 8 parts of the same kind that are not members, chosen on these runs (use discovery); the same every time.

    Heads and MLPs: within 4 layers; heads nearest in attention entropy at the end (or, where attention is not recorded,
    in the nearest layers), MLPs in the nearest layers. before: only layers under this one (a control must be able to do
    what it is compared at). When fewer than 2 are left the window grows a layer at a time, and the rule says so.
    Neurons and latents: of 64 drawn from the same layer or dictionary, those nearest in mean activity on the prompts or
    texts. Directions: random ones at the same site. Other parts have none.
    """
    site = part.writes[0]
    if isinstance(part, Unit) and site.layer is not None and site.kind in _WHOLE:
        return _among_components(runs, part, members, before)
    if isinstance(part, Unit) and site.kind == "mlp_post" and site.index is not None:
        width = int(_recorded(runs, part)[0][site.whole].shape[-1])
        return _like_it(runs, part, members, lambda index: Unit(site.whole[index]), width, site.index)
    if isinstance(part, Direction):
        found = random_directions(part, MOST)
        return Matched(f"{MOST} random directions at {part.site}", found, {RANDOM: MOST})
    if isinstance(part, OfDictionary):
        dictionary, own = part.dictionary, part.number
        return _like_it(runs, part, members, dictionary.latent, dictionary.n_latents, own)
    return Matched("there are no parts like it to compare with", ())


def entropy(runs: Runs, part: Part) -> float:
    """Mean attention entropy (nats) of a head at the end of the clean prompts."""

    def compute() -> float:
        seen = runs.pattern(part)[torch.arange(runs.n), runs.named_positions["end"]]
        return float(torch.special.entr(seen).sum(-1).mean())

    return runs.once(("entropy", part), compute)


def _among_components(runs: Runs, part: Unit, members: Sequence[Part], before: int | None) -> Matched:
    taken = {*members, part}
    pool = [
        other
        for other in runs.components
        if _alike(other, part) and other not in taken and (before is None or _layer(other) < before)
    ]
    window, found = WINDOW, _within(pool, part, WINDOW)
    while len(found) < min(LEAST, len(pool)):
        window += 1
        found = _within(pool, part, window)
    by_entropy = part.site.kind == "z" and not runs.run("clean").reason
    chosen = sorted(found, key=lambda other: _distance(runs, part, other, by_entropy))[:MOST]
    ordered = tuple(sorted(chosen, key=lambda other: other.writes[0].order))
    return Matched(_rule(part.site, window, len(chosen), before, by_entropy), ordered)


def _alike(other: Part, part: Part) -> bool:
    one, two = other.writes[0], part.writes[0]
    return isinstance(other, Unit) and one.kind == two.kind and one.layer is not None


def _within(pool: Sequence[Part], part: Part, window: int) -> list[Part]:
    return [other for other in pool if abs(_layer(other) - _layer(part)) <= window]


def _layer(part: Part) -> int:
    layer = part.writes[0].layer
    assert layer is not None
    return layer


def _distance(runs: Runs, part: Part, other: Part, by_entropy: bool) -> tuple[float, int, tuple[int, ...]]:
    """Nearest first: in entropy for heads, then in layers; ties go to the earlier part."""
    apart = abs(entropy(runs, other) - entropy(runs, part)) if by_entropy else 0.0
    return apart, abs(_layer(other) - _layer(part)), other.writes[0].order


def _rule(site: Site, window: int, count: int, before: int | None, by_entropy: bool) -> str:
    kind = f"heads{' nearest in attention entropy at the end' if by_entropy else ''}" if site.kind == "z" else "MLPs"
    widened = f" (widened from {WINDOW}: fewer than {LEAST} were left)" if window > WINDOW else ""
    under = f", before layer {before}" if before is not None else ""
    return f"{count} {kind} outside the circuit, within {window} layers{widened}{under}"


def _like_it(runs: Runs, part: Part, members: Sequence[Part], other: Any, count: int, own: int) -> Matched:
    """Of some drawn neurons or latents, those nearest in mean activity."""
    order = torch.randperm(count, generator=generator_for("matched controls", own)).tolist()
    taken = {*members, part}
    drawn = list(islice((one for index in order if index != own and (one := other(index)) not in taken), DRAWN))
    active = _activities(runs, part, other, count)
    nearest = sorted(drawn, key=lambda one: abs(active[_own_number(one)] - active[own]))[:MOST]
    name = "neurons of the same layer" if isinstance(part, Unit) else "latents of the same dictionary"
    return Matched(f"{len(nearest)} {name}, of {len(drawn)} drawn those nearest in mean activity", tuple(nearest))


def _own_number(part: Part) -> int:
    number = part.number if isinstance(part, OfDictionary) else part.writes[0].index
    assert number is not None
    return number


def _activities(runs: Runs, part: Part, other: Callable[[int], Part], count: int) -> list[float]:
    """Mean size of every neuron of the layer, or latent of the dictionary, on the clean prompts up to the read position
    or on texts; found once for all of them."""

    def compute() -> list[float]:
        run, rows = _recorded(runs, part)
        if isinstance(part, Unit):
            return run[part.site.whole][: runs.n][rows].abs().double().mean(0).tolist()
        values = PartValues(tuple(map(other, range(count))))
        inside = {site: Unit(site).read(run[site.whole])[: runs.n].flatten(2)[rows] for site in values.sites}
        total = torch.zeros(count, dtype=torch.float64)
        for some in torch.arange(int(rows.sum())).split(max(1, _ROWS_AT_ONCE // count)):
            total += values({site: at[some] for site, at in inside.items()}).abs().double().sum(0).cpu()
        return (total / rows.sum()).tolist()

    whose = part.site.whole if isinstance(part, Unit) else part.dictionary.content_hash  # type: ignore[attr-defined]
    return runs.once(("activities", whose), compute)


def _recorded(runs: Runs, part: Part) -> tuple[Recording | Activations, Bool[Tensor, "example pos"]]:
    """What a part is read from, and which positions count; of texts, the first ones."""
    if isinstance(runs.data, Corpus):
        tokens = runs.data.tokens.take(torch.arange(min(len(runs.data), TEXTS)))
        sites = sorted({site.whole for site in part.reads}, key=lambda site: site.order)
        found = runs.once(("matched controls", *sites), lambda: captured(runs.model, tokens, sites))
        return found, tokens.real & (torch.arange(tokens.ids.shape[1]) > 0)
    run = runs.run("clean", [part])
    return run, torch.arange(run.tokens.ids.shape[1])[None] <= runs.pairs.at[:, None]


def random_directions(part: Direction, count: int) -> tuple[Direction, ...]:
    """Random directions at the same site, the same ones every time."""
    drawn = [torch.randn(part.vector.shape, generator=generator_for("random direction", n)) for n in range(count)]
    return tuple(replace(part, vector=v.to(part.vector), label=f"random {n}") for n, v in enumerate(drawn))
