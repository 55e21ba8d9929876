"""The values of many parts on rows of activations: parts of one kind share a product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.activations import Activations
from vesalius.coder import Coder
from vesalius.directions import Direction
from vesalius.errors import InputError
from vesalius.parts import Part, Unit
from vesalius.site import Site

Rows = dict[Site, Float[Tensor, "row width"]]
Read = Callable[[Rows], Float[Tensor, "row part"]]


@runtime_checkable
class Encoded(Protocol):
    """A latent, as far as reading many of them at once needs it: its coder, and its number there."""

    @property
    def coder(self) -> Coder: ...

    @property
    def index(self) -> int: ...


@dataclass(frozen=True, eq=False)
class PartValues:
    """Reads many parts at once.

    sites: what has to be captured, whole. sparse: [part] which are latents, zero where inactive. Raises InputError for
    no parts, the same part twice, and parts without one number at each position.
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if not self.parts:
            raise InputError("no parts: give at least one, such as vs.neuron(5, 3)")
        if len(set(self.parts)) < len(self.parts):
            twice = next(part for number, part in enumerate(self.parts) if part in self.parts[:number])
            raise InputError(f"{twice} is among the parts twice")
        for part in self.parts:
            if isinstance(part, Unit) and (part.site.index is None or len(part.site.axes) > 2):
                raise InputError(
                    f"{part} has many numbers at each position, and no one activation; give one of them, such as "
                    "vs.neuron(5, 3), or a Direction there"
                )

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(dict.fromkeys(site for part in self.parts for site in _read(part)))

    @property
    def sparse(self) -> tuple[bool, ...]:
        return tuple(isinstance(part, Encoded) for part in self.parts)

    def __call__(self, rows: Rows) -> Float[Tensor, "row part"]:
        """rows: by site, the same rows of each."""
        some = next(iter(rows.values()))
        values = torch.empty(len(some), len(self.parts), dtype=torch.float32, device=some.device)
        for numbers, read in self._groups():
            if numbers == list(range(len(self.parts))):
                return read(rows).float()
            values[:, numbers] = read(rows).float()
        return values

    def at(self, activations: Activations) -> Float[Tensor, "example pos part"]:
        """The same of whole tensors [example, pos, ...]."""
        rows = {site: Unit(site).read(activations[site.whole]).flatten(2).flatten(0, 1) for site in self.sites}
        return self(rows).unflatten(0, activations[self.sites[0].whole].shape[:2])

    def _groups(self) -> list[tuple[list[int], Read]]:
        """Numbers of the parts that are read together, and how."""
        found: dict[object, list[int]] = {}
        for number, part in enumerate(self.parts):
            if isinstance(part, Encoded):
                key: object = ("latents", id(part.coder))
            elif isinstance(part, Unit | Direction):
                key = (type(part), _read(part))
            else:
                key = number
            found.setdefault(key, []).append(number)
        return [(numbers, _reader([self.parts[number] for number in numbers])) for numbers in found.values()]


def _reader(parts: Sequence[Part]) -> Read:
    """How parts of one kind, at one place, are read."""
    first = parts[0]
    if isinstance(first, Encoded):
        return _of_latents(first.coder, parts[0].reads, [cast(Encoded, part).index for part in parts])
    if isinstance(first, Unit):
        return _of_units([cast(Unit, part) for part in parts])
    if isinstance(first, Direction):
        site, vectors = first.site, torch.stack([cast(Direction, part).vector for part in parts], 1)
        return lambda rows: rows[site] @ vectors.to(rows[site])
    return lambda rows: torch.stack([_alone(part, rows) for part in parts], 1)


def _read(part: Part) -> tuple[Site, ...]:
    """What a part is read from: a unit from the whole tensor, others from just the head, say, that they name."""
    return (part.site.whole,) if isinstance(part, Unit) else tuple(part.reads)


def _of_units(units: list[Unit]) -> Read:
    columns, whole = [unit.site.index for unit in units], units[0].site.whole

    def read(rows: Rows) -> Tensor:
        at = rows[whole]
        for unit in units:
            if unit.site.index is not None and unit.site.index >= at.shape[1]:
                raise InputError(f"{unit}: the tensor there has {at.shape[1]} of these, numbered from 0")
        return at[:, columns]

    return read


def _of_latents(coder: Coder, reads: Sequence[Site], numbers: list[int]) -> Read:
    everything = numbers == list(range(coder.n_latents))

    def read(rows: Rows) -> Tensor:
        x = [rows[site] for site in reads]
        return coder.encode(x[0] if len(x) == 1 else x, latents=None if everything else numbers)

    return read


def _alone(part: Part, rows: Rows) -> Tensor:
    """[row] of a part of a kind that is not known here, to which the rows are one long text."""
    value = part.value({site: tensor[None] for site, tensor in rows.items()})
    check_one_number(part, value)
    return value[0]


def check_one_number(part: Part, value: Tensor) -> None:
    """Raises InputError for a value [example, pos, ...] of more than one number at each position."""
    if value.ndim != 2:
        raise InputError(f"{part} has {value.shape[-1]} numbers at each position, and no one activation")
