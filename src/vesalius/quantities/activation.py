"""Activation: the value of a part on texts, or on the clean prompts of a contrast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
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
    """Every part's value at every token, on the CPU, kept with the runs."""
    kept: dict[Part, Tensor] = runs.once("token values", dict)
    missing = [part for part in dict.fromkeys(parts) if part not in kept]
    found = [[value.cpu() for value in values] for _, values in _read(runs, missing)]
    kept |= {part: torch.cat(listed) for part, listed in zip(missing, zip(*found, strict=True), strict=bool(found))}
    return [kept[part] for part in parts]


def _read(runs: Runs, parts: Sequence[Part]) -> Iterator[tuple[Int[Tensor, " example"], list[Tensor]]]:
    """A few texts after the other, and every part's value [example, pos] there: one pass up to the last of the sites.

    Raises InputError for a part of several numbers.
    """
    tokens = tokens_of(runs)
    for rows in torch.arange(len(tokens)).split(_TOGETHER) if parts else ():
        at = captured(runs.model, tokens.take(rows), places(parts))
        values = [part.value(at) for part in parts]
        for part, value in zip(parts, values, strict=True):
            check_one_number(part, value)
        yield rows, values


def check_one_number(part: Part, value: Tensor) -> None:
    """Raises InputError for a value [example, pos, ...] of more than one number at each position."""
    if value.ndim != 2:
        raise InputError(f"{part} has {value.shape[-1]} numbers at each position, and no one activation")


def _values(runs: Runs, parts: Sequence[Part], at: str) -> list[PerExample]:
    if at not in POOLED and isinstance(runs.data, Corpus):
        raise UnknownNameError("place to read an activation at", at, POOLED, "Texts have no named places.")
    where, real = None if at in POOLED else positions(runs, at), tokens_of(runs).real
    found = [
        [
            _pooled(value, real[rows].to(value.device), at) if where is None else _at(value, where[rows])
            for value in some
        ]
        for rows, some in _read(runs, parts)
    ]
    return [torch.cat(listed).cpu() for listed in zip(*found, strict=True)]


def _pooled(value: Float[Tensor, "example pos"], real: Tensor, at: str) -> PerExample:
    if at == "max":
        return value.masked_fill(~real, float("-inf")).amax(1)
    return (value * real).sum(1) / real.sum(1)


def _at(value: Float[Tensor, "example pos"], where: Tensor) -> PerExample:
    return value[torch.arange(len(value)), where]
