"""Effect at a place: what giving a part its corrupted value at one named place of each prompt does to the metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.parts import Part
from vesalius.patching.targets import Variant
from vesalius.quantities.base import Parameters, PerExample, Quantity, condition, control_parts, unnatural
from vesalius.quantities.places import in_words, positions
from vesalius.quantities.runs import BLOCK, Runs, name_of

_Key = tuple[Part, str, str, str]


class EffectAt(Quantity):
    """Effect of patching a part alone and only at the place `place`, by `corruption` and `direction`.

    Where an effect arises tells what a part is for: a fact is looked up at the subject and read off at the end (Meng et
    al. 2022, section 2; Geva et al. 2023). Null `elsewhere`: what patching the part at every place does beyond that.
    """

    name = "effect_at"
    condition = MappingProxyType({"direction": "noising", "effect": "total"})

    def phrase(self, parameters: Parameters) -> str:
        return f"acts at {in_words(str(parameters['place']))}"

    def measure(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample:
        place, here = str(parameters["place"]), condition(runs, parameters)
        return _measured(runs, [part], place, *here)[part, place, *here]

    def prepare(self, runs: Runs, wanted: Sequence[tuple[Part, Parameters]]) -> None:
        """Parts that are patched at the same place in one sweep."""
        together: dict[tuple[str, str, str], list[Part]] = {}
        for part, parameters in wanted:
            key = (str(parameters["place"]), *condition(runs, parameters))
            together.setdefault(key, []).extend([part, *control_parts(parameters.get("control", {}), part)])
        for (place, corruption, direction), parts in together.items():
            _measured(runs, parts, place, corruption, direction)
            runs.effects(list(dict.fromkeys(parts)), corruption, direction)

    def nulls(self, runs: Runs, part: Part, parameters: Parameters) -> Mapping[str, PerExample]:
        whole = runs.effects([part], *condition(runs, parameters))[0]
        return {"elsewhere": whole - self.measure(runs, part, parameters)}

    def diagnostics(self, runs: Runs, part: Part, parameters: Parameters) -> Mapping[str, Any]:
        return unnatural(runs, part, parameters)


def _measured(runs: Runs, parts: Sequence[Part], place: str, corruption: str, direction: str) -> dict[_Key, PerExample]:
    kept: dict[_Key, PerExample] = runs.once("effect_at", dict)
    missing = [part for part in dict.fromkeys(parts) if (part, place, corruption, direction) not in kept]
    for first in range(0, len(missing), BLOCK):
        some = missing[first : first + BLOCK]
        key = f"effects at {place} {corruption} {direction} {' '.join(map(name_of, some))}"
        found = runs.stored(key, lambda some=some: {"effect": _patched(runs, some, place, corruption, direction)})  # type: ignore[misc]
        for part, values in zip(some, torch.from_numpy(found["effect"]), strict=True):
            kept[part, place, corruption, direction] = values
    return kept


def _patched(runs: Runs, parts: Sequence[Part], place: str, corruption: str, direction: str) -> Any:
    """[part, example], oriented as `Runs.effects`. A sweep edits one position in all prompts, so each prompt is taken
    from the edit at its own."""
    base, source = runs.source(corruption, direction, parts)
    at = positions(runs, place)
    places, which = at.unique(return_inverse=True)
    variants = [Variant((part,), int(position)) for part in parts for position in places]
    outcome = runs.evaluate(variants, base, source, f"patch {len(parts)} parts at {place}, {corruption}, {direction}")
    edited: Float[Tensor, "part place example"] = outcome.values.reshape(len(parts), len(places), -1)
    own = edited.gather(1, which.expand(len(parts), 1, -1))[:, 0]
    return ((outcome.base - own) * (1.0 if direction == "noising" else -1.0)).numpy()
