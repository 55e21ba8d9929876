"""What a set of parts does alone, and what the rest does without it.

    faithfulness   the set kept, everything else ablated: what it does alone
    completeness   the set ablated, everything else kept: what is lost without it

Each depends on the ablation (zero, mean or resample; Miller et al. 2024). Both are compared with random sets of the
same size and composition, whose members lie outside the set where that is what the comparison is about.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from vesalius.errors import InputError, UnknownNameError
from vesalius.parts import Part, Together
from vesalius.patching.record import Recording
from vesalius.patching.sources import Source, mean_source, patch_source, zero_source
from vesalius.patching.targets import Variant
from vesalius.quantities.base import Parameters, PerExample, Quantity
from vesalius.quantities.contrast import EMBED
from vesalius.quantities.matching import Matched
from vesalius.quantities.runs import Runs

ABLATIONS = ("zero", "mean", "resample")
# Random sets evaluated per stored block.
SETS_TOGETHER = 11
PartSet = tuple[Part, ...]
Floats = NDArray[np.float64]


def ablation_source(runs: Runs, ablation: str) -> tuple[Recording, Source]:
    """Base run and values of an ablation.

    zero: zeros everywhere. mean: mean over the positions of the last corruption's prompts (the one that changes most).
    resample: the prompt's own values under the main corruption, position by position.
    """
    base = runs.run("clean")
    if ablation == "zero":
        return base, zero_source(base)
    if ablation == "mean":
        return base, mean_source(base, runs.run(list(runs.corruptions)[-1]))
    if ablation == "resample":
        return base, patch_source(base, runs.run(runs.main))
    raise UnknownNameError("ablation", ablation, ABLATIONS)


def metric_with_only(runs: Runs, sets: Sequence[Sequence[Part]], ablation: str) -> Floats:
    """The metric [set, example] with only the given parts kept and every other component ablated."""
    everything = set(runs.components)
    for members in sets:
        foreign = set(members) - everything
        if foreign:
            raise InputError(
                f"{min(map(str, foreign))} is no component; components are {_in_words(runs.components)}: "
                "Runs(..., components=) takes others"
            )
    inside = [set(members) for members in sets]
    rest = [tuple(part for part in runs.components if part not in kept) for kept in inside]
    return _ablated(runs, rest, ablation, f"keep {len(sets)} sets, {ablation}")


def metric_without(runs: Runs, sets: Sequence[Sequence[Part]], ablation: str) -> Floats:
    """The metric [set, example] with the given parts ablated and everything else kept."""
    return _ablated(runs, [tuple(members) for members in sets], ablation, f"remove {len(sets)} sets, {ablation}")


def _ablated(runs: Runs, sets: Sequence[PartSet], ablation: str, task: str) -> Floats:
    """The metric [set, example] with each set ablated; ablating nothing leaves the clean run as it is."""
    base, source = ablation_source(runs, ablation)
    values = np.tile(runs.metric("clean").double().numpy(), (len(sets), 1))
    edited = [number for number, parts in enumerate(sets) if parts]
    if edited:
        variants = [Variant(sets[number]) for number in edited]
        values[edited] = runs.evaluate(variants, base, source, task).values.double().numpy()
    return values


def stored(runs: Runs, which: str, sets: Sequence[PartSet], ablation: str) -> Floats:
    """`metric_with_only` ("with only") or `metric_without` ("without") of many sets, each measured once.

    They go in stored blocks, so that a killed study loses a few at most.
    """
    kept: dict[tuple[str, str, frozenset[Part]], Floats] = runs.once("circuit", dict)
    keys = [(which, ablation, frozenset(members)) for members in sets]
    missing = [number for number, key in enumerate(keys) if key not in kept and key not in keys[:number]]
    measure = metric_with_only if which == "with only" else metric_without
    for first in range(0, len(missing), SETS_TOGETHER):
        some = [sets[number] for number in missing[first : first + SETS_TOGETHER]]
        key = f"{which} {ablation} {[list(map(str, members)) for members in some]}"
        found = runs.stored(key, lambda some=some: {"values": measure(runs, some, ablation)})["values"]  # type: ignore[misc]
        kept |= dict(zip((keys[number] for number in missing[first : first + SETS_TOGETHER]), found, strict=True))
    return np.stack([kept[key] for key in keys])


def _in_words(components: Sequence[Part]) -> str:
    kinds = Counter(part.writes[0].kind for part in components)
    return ", ".join(f"{count} of {kind}" for kind, count in kinds.items())


def random_sets(runs: Runs, members: Sequence[Part], draws: int, seed: int, *, outside: bool = False) -> list[PartSet]:
    """Random sets of the same size and composition: as many of each kind, the embeddings iff the circuit has them.

    outside: draw from what is not in the circuit (a set that shares members with it is needed for their sake); [] when
    there is not enough outside of any kind.
    """
    generator = torch.Generator().manual_seed(seed)
    pools = [_pool(runs, members, kind, outside) for kind in _kinds(runs)]
    if outside and any(len(pool) < count for pool, count in pools):
        return []
    found = []
    for _ in range(draws):
        chosen: list[Part] = [EMBED] if EMBED in members else []
        for pool, count in pools:
            chosen += [pool[int(i)] for i in torch.randperm(len(pool), generator=generator)[:count]]
        found.append(tuple(chosen))
    return found


def _kinds(runs: Runs) -> list[str]:
    return list(dict.fromkeys(part.writes[0].kind for part in runs.components if part != EMBED))


def _pool(runs: Runs, members: Sequence[Part], kind: str, outside: bool) -> tuple[list[Part], int]:
    """Components of a kind to draw from, and how many of them."""
    everything = [part for part in runs.components if part.writes[0].kind == kind and part != EMBED]
    count = sum(part.writes[0].kind == kind for part in members if part != EMBED)
    taken = set(members)
    return ([part for part in everything if part not in taken] if outside else everything), count


class _OfCircuit(Quantity):
    """Of a set of parts, given as `Together`; parameters: the ablation."""

    kind = "circuit"
    condition = MappingProxyType({"direction": "noising", "effect": "total"})
    outside = False

    def scale_values(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample | None:
        """Effect of ablating everything."""
        empty = stored(runs, "with only", [()], str(parameters["ablation"]))[0]
        return torch.from_numpy(runs.metric("clean").double().numpy() - empty)

    def matched(self, runs: Runs, part: Part, members: Sequence[Part], parameters: Parameters) -> Matched:
        raise InputError("a circuit is compared with random sets: control={'draws': n}")

    def control(self, runs: Runs, part: Part, parameters: Parameters, control: Mapping[str, Any]) -> PerExample | None:
        """The mean over random sets of the same size and composition; None without any."""
        sets = random_sets(runs, members_of(part), int(control.get("draws", 0)), runs.seed, outside=self.outside)
        return self._of(runs, sets, parameters).mean(0) if sets else None

    def measure(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample:
        return self._of(runs, [members_of(part)], parameters)[0]

    @abstractmethod
    def _of(self, runs: Runs, sets: Sequence[PartSet], parameters: Parameters) -> Float[Tensor, "set example"]:
        """Of many sets, each measured once."""


class Faithfulness(_OfCircuit):
    """The metric with the set alone, every other component ablated, minus the metric with everything ablated."""

    name = "faithfulness"

    def _of(self, runs: Runs, sets: Sequence[PartSet], parameters: Parameters) -> Float[Tensor, "set example"]:
        values = stored(runs, "with only", [(), *sets], str(parameters["ablation"]))
        return torch.from_numpy(values[1:] - values[:1])


class Completeness(_OfCircuit):
    """The metric of the clean run minus the metric without the set; the embeddings are never among what is removed.

    Without them there is no prompt, and any set would do.
    """

    name = "completeness"
    outside = True

    def _of(self, runs: Runs, sets: Sequence[PartSet], parameters: Parameters) -> Float[Tensor, "set example"]:
        parts = [tuple(part for part in members if part != EMBED) for members in sets]
        values = stored(runs, "without", parts, str(parameters["ablation"]))
        return torch.from_numpy(runs.metric("clean").double().numpy() - values)


def members_of(part: Part) -> PartSet:
    """The members of a circuit that is given as one part."""
    return part.parts if isinstance(part, Together) else (part,)
