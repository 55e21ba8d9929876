"""Moves attention: how far patching a part turns later heads' attention from the distractor to the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.errors import InputError
from vesalius.parts import Part, as_part
from vesalius.patching.targets import Variant
from vesalius.quantities.base import Parameters, PerExample, Quantity, condition, control_parts, head, unnatural
from vesalius.quantities.matching import Matched, matched_controls
from vesalius.quantities.places import positions, present
from vesalius.quantities.runs import Runs
from vesalius.site import Site

Shifts = dict[tuple[Part, Part, str, str], PerExample]


class MovesAttention(Quantity):
    """Change in the `movers`' attention, at the end, to the answer minus the distractor, when the part is patched.

    Mean over the movers; positive: the part's clean value turns them towards the answer. movers: names of heads in
    later layers; others cannot change: InputError.
    """

    name = "moves_attention"
    scale = "total effect on the movers' attention"
    condition = MappingProxyType({"direction": "noising", "effect": "total"})

    def unit(self, runs: Runs) -> str:
        return "attention"

    def phrase(self, parameters: Parameters) -> str:
        return f"moves the attention of {', '.join(map(str, parameters['movers']))}"

    def refuses(self, runs: Runs, part: Part) -> str:
        return runs.run("clean").reason

    def measure(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample:
        movers, here = _movers(parameters), condition(runs, parameters)
        kept = _measured(runs, [part], movers, *here)
        return torch.stack([kept[part, mover, *here] for mover in movers]).mean(0)

    def prepare(self, runs: Runs, wanted: Sequence[tuple[Part, Parameters]]) -> None:
        """Parts that are said to move the same heads in one sweep."""
        together: dict[tuple[tuple[Part, ...], str, str], list[Part]] = {}
        for part, parameters in wanted:
            key = (_movers(parameters), *condition(runs, parameters))
            together.setdefault(key, []).extend([part, *control_parts(parameters.get("control", {}), part)])
        for (movers, corruption, direction), parts in together.items():
            _measured(runs, parts, movers, corruption, direction)

    def scale_values(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample | None:
        """What the whole corruption does to the movers' attention: R in this quantity's own unit."""
        movers, (corruption, _) = _movers(parameters), condition(runs, parameters)
        return torch.stack([lean(runs, mover) - lean(runs, mover, corruption) for mover in movers]).mean(0)

    def matched(self, runs: Runs, part: Part, members: Sequence[Part], parameters: Parameters) -> Matched:
        """Only parts under the first mover's layer can do what this one is said to do."""
        first = min(int(mover.writes[0].layer or 0) for mover in _movers(parameters))
        return matched_controls(runs, part, members, before=first)

    def diagnostics(self, runs: Runs, part: Part, parameters: Parameters) -> Mapping[str, Any]:
        return unnatural(runs, part, parameters)


def _movers(parameters: Parameters) -> tuple[Part, ...]:
    return tuple(map(as_part, parameters["movers"]))


def later(part: Part, movers: Sequence[Part]) -> list[Part]:
    """Those of the movers that the part can reach: heads of later layers."""
    return [mover for mover in movers if (head(mover).layer or 0) > (part.writes[0].layer or 0)]


def _measured(runs: Runs, parts: Sequence[Part], movers: Sequence[Part], corruption: str, direction: str) -> Shifts:
    """How patching each part moves each mover's `lean`, in one sweep for those that are not yet known."""
    kept: Shifts = runs.once("moves_attention", dict)
    blocked = [(part, mover) for part in parts for mover in movers if mover not in later(part, movers)]
    if blocked or not movers:
        part, mover = blocked[0] if blocked else (parts[0], "(none)")
        raise InputError(f"{part} cannot move the attention of {mover}: give movers in later layers")
    wanted = [
        part
        for part in dict.fromkeys(parts)
        if any((part, mover, corruption, direction) not in kept for mover in movers)
    ]
    if not wanted:
        return kept
    base, source = runs.source(corruption, direction, wanted)
    layers = sorted({int(head(mover).layer or 0) for mover in movers})
    variants, watch = [Variant((part,)) for part in wanted], [Site("pattern", layer) for layer in layers]
    seen = runs.evaluate(variants, base, source, f"watch {len(movers)} heads", watch).watched
    which = "clean" if direction == "noising" else corruption
    for mover in movers:
        site = head(mover)
        edited = seen[Site("pattern", site.layer)][:, :, site.index]
        moved = (lean(runs, mover, which) - _lean(runs, edited)) * (1 if direction == "noising" else -1)
        kept |= {(part, mover, corruption, direction): values for part, values in zip(wanted, moved, strict=True)}
    return kept


def lean(runs: Runs, mover: Part, which: str = "clean") -> PerExample:
    """A head's attention at the end to the answer minus that to the distractor (all its mentions)."""
    return _lean(runs, runs.pattern(mover, which)[torch.arange(runs.n), runs.named_positions["end"]])


def _lean(runs: Runs, attention: Float[Tensor, "*variant example key_pos"]) -> Float[Tensor, "*variant example"]:
    def mass(place: str) -> Tensor:
        index = positions(runs, place).expand(attention.shape[:-1])[..., None]
        return attention.gather(-1, index)[..., 0]

    mentions = [place for place in ("distractor_first", "distractor_last") if present(runs, place)]
    return mass("answer") - sum((mass(place) for place in mentions), torch.zeros_like(attention[..., 0]))
