"""Activation: the value of a part on texts, or on the clean prompts of a contrast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.data.forward import captured
from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Corpus, Tokens
from vesalius.parts import Part, places
from vesalius.quantities.base import DEVIATION, Parameters, PerExample, Quantity, control_parts
from vesalius.quantities.places import positions
from vesalius.quantities.runs import Runs

POOLED = ("max", "mean")
# Texts run together.
_TOGETHER = 16
Kept = dict[tuple[Part, str], PerExample]


class Activation(Quantity):
    """A part's value on each text or clean prompt: `at` "max" or "mean" over its tokens, or a named place.

    Parts of several numbers (whole sites, subspaces, groups) have none. Raises PairsError where a prompt lacks the
    place.
    """

    name = "activation"
    kind = "predictive"
    scale = DEVIATION

    def unit(self, runs: Runs) -> str:
        return "activation"

    def measure(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample:
        return _measured(runs, [part], str(parameters.get("at", "max")))[part, str(parameters.get("at", "max"))]

    def prepare(self, runs: Runs, wanted: Sequence[tuple[Part, Parameters]]) -> None:
        """All parts in one pass over the texts."""
        by_place: dict[str, list[Part]] = {}
        for part, parameters in wanted:
            here = by_place.setdefault(str(parameters.get("at", "max")), [])
            here += [part, *control_parts(parameters.get("control", {}), part)]
        for at, parts in by_place.items():
            _measured(runs, parts, at)

    def scale_of(self, runs: Runs, part: Part, parameters: Parameters) -> float | None:
        """Standard deviation over examples."""
        return float(self.measure(runs, part, parameters).std())


def _measured(runs: Runs, parts: Sequence[Part], at: str) -> Kept:
    kept: Kept = runs.once("activation", dict)
    missing = [part for part in dict.fromkeys(parts) if (part, at) not in kept]
    if missing:
        kept |= {(part, at): values for part, values in zip(missing, _values(runs, missing, at), strict=True)}
    return kept


def tokens_of(runs: Runs) -> Tokens:
    """The texts, or the clean prompts."""
    return runs.data.tokens if isinstance(runs.data, Corpus) else runs.tokens("clean")


def token_values(runs: Runs, parts: Sequence[Part]) -> list[Float[Tensor, "example pos"]]:
    """Every part's value at every token, on the CPU: one pass over the texts, up to the last of the parts' sites."""
    kept: dict[Part, Tensor] = runs.once("token values", dict)
    missing = [part for part in dict.fromkeys(parts) if part not in kept]
    found: list[list[Tensor]] = [[] for _ in missing]
    tokens = tokens_of(runs)
    for rows in torch.arange(len(tokens)).split(_TOGETHER) if missing else ():
        at = captured(runs.model, tokens.take(rows), places(missing))
        for part, listed in zip(missing, found, strict=True):
            value = part.value(at)
            _check_one_number(part, value)
            listed.append(value.cpu())
    kept |= {part: torch.cat(listed) for part, listed in zip(missing, found, strict=True)}
    return [kept[part] for part in parts]


def _check_one_number(part: Part, value: Tensor) -> None:
    if value.ndim != 2:
        raise InputError(f"{part} has {value.shape[-1]} numbers at each position, and no one activation")


def _values(runs: Runs, parts: Sequence[Part], at: str) -> list[PerExample]:
    tokens = tokens_of(runs)
    if at not in POOLED and isinstance(runs.data, Corpus):
        raise UnknownNameError("place to read an activation at", at, POOLED, "Texts have no named places.")
    where = None if at in POOLED else positions(runs, at)
    found: list[list[Tensor]] = [[] for _ in parts]
    for rows in torch.arange(len(tokens)).split(_TOGETHER):
        run = runs.model.run(tokens.take(rows), capture=places(parts), last_logits=True)
        for part, listed in zip(parts, found, strict=True):
            value = part.value(run)
            _check_one_number(part, value)
            listed.append(
                _pooled(value, tokens.real[rows].to(value.device), at) if where is None else _at(value, where[rows])
            )
    return [torch.cat(listed).cpu() for listed in found]


def _pooled(value: Float[Tensor, "example pos"], real: Tensor, at: str) -> PerExample:
    if at == "max":
        return value.masked_fill(~real, float("-inf")).amax(1)
    return (value * real).sum(1) / real.sum(1)


def _at(value: Float[Tensor, "example pos"], where: Tensor) -> PerExample:
    return value[torch.arange(len(value)), where]
