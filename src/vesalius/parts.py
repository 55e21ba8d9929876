"""Parts of a network: what can be read and edited.

Unit       a whole tensor, or one head, neuron or dimension of it
Group      several heads, neurons or dimensions of one tensor
Channel    one channel of a convolution's map, over all rows and columns
Together   several parts as one

`vesalius.directions` has Direction and Subspace, the coordinates along vectors. The latents of a dictionary are Parts
as well (`latent`): those of a transcoder are read at one site and written at another, those of a crosscoder at several.
Interventions, sweeps, circuits, descriptions and claims take any Part.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from vesalius.errors import InputError
from vesalius.site import INDEX_AXIS, Site

Ref = dict[str, Any]


class At(Protocol):
    """Whole tensors [example, pos, ...] by whole site: `Activations`, a dict, a recorded run."""

    def __getitem__(self, site: Site, /) -> Tensor: ...


@runtime_checkable
class Part(Protocol):
    """Something that can be read and edited."""

    @property
    def reads(self) -> tuple[Site, ...]:
        """Sites that its value is computed from."""
        ...

    @property
    def writes(self) -> tuple[Site, ...]:
        """Sites that change when it is given a value, in the order of the forward pass."""
        ...

    def value(self, at: At) -> Tensor:
        """Its value [example, pos], or with more axes where it has several numbers. at: holds `reads`."""
        ...

    def written(self, at: At, value: Tensor) -> dict[Site, Tensor]:
        """Copies of the whole tensors at `writes` in which the part has the value. at: holds `reads` and `writes`."""
        ...

    @property
    def ref(self) -> Ref:
        """JSON that names the part; `resolve` gives the part back."""
        ...


class OneSite(ABC):
    """A part of a single tensor: it reads and writes the same site."""

    site: Site

    @abstractmethod
    def read(self, whole: Tensor) -> Tensor:
        """This part's value from the whole tensor at the site."""

    @abstractmethod
    def write(self, whole: Tensor, value: Tensor) -> Tensor:
        """A copy of the whole tensor in which this part has the value."""

    @property
    def reads(self) -> tuple[Site, ...]:
        """The site."""
        return (self.site,)

    @property
    def writes(self) -> tuple[Site, ...]:
        """The site."""
        return (self.site,)

    def value(self, at: At) -> Tensor:
        """As `read`, from tensors by site."""
        return self.read(at[self.site.whole])

    def written(self, at: At, value: Tensor) -> dict[Site, Tensor]:
        """As `write`, from tensors by site."""
        return {self.site.whole: self.write(at[self.site.whole], value)}


@dataclass(frozen=True)
class Unit(OneSite):
    """A whole tensor (`layers.5.mlp_out`), one head (`layers.5.z[3]`), neuron (`layers.5.mlp_post[7]`) or dimension.

    read and write raise InputError for an index past the end.
    """

    site: Site

    def read(self, whole: Tensor) -> Tensor:
        if self.site.index is None:
            return whole
        _check_index(self.site, whole, self.site.index)
        return whole.select(INDEX_AXIS[self.site.kind], self.site.index)

    def write(self, whole: Tensor, value: Tensor) -> Tensor:
        if self.site.index is None:
            return value.to(whole).expand_as(whole)
        _check_index(self.site, whole, self.site.index)
        axis = INDEX_AXIS[self.site.kind]
        row = torch.zeros(whole.shape[axis], dtype=torch.bool, device=whole.device)
        row[self.site.index] = True
        shape = [1] * whole.ndim
        shape[axis] = -1
        return torch.where(row.view(shape), value.to(whole).unsqueeze(axis), whole)

    @property
    def ref(self) -> Ref:
        return {"kind": "unit", "site": str(self.site)}

    def __str__(self) -> str:
        return str(self.site)


@dataclass(frozen=True)
class Group(OneSite):
    """Several heads, neurons or dimensions of one tensor, such as `Group("layers.5.mlp_post", [1, 7, 30])`.

    Its value keeps their axis, in the order given. Raises InputError for a site without numbered units, for none, and
    for one that is listed twice.
    """

    site: Site
    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "site", Site.parse(self.site))
        object.__setattr__(self, "indices", tuple(map(int, self.indices)))
        if self.site.index is not None or self.site.kind not in INDEX_AXIS:
            raise InputError(f"a group is of a whole site with numbered units, such as layers.5.z; got {self.site}")
        if not self.indices or len(set(self.indices)) < len(self.indices):
            raise InputError(f"a group at {self.site} needs units, each listed once; got {list(self.indices)}")

    def read(self, whole: Tensor) -> Tensor:
        _check_index(self.site, whole, max(self.indices))
        return whole.index_select(INDEX_AXIS[self.site.kind], torch.tensor(self.indices, device=whole.device))

    def write(self, whole: Tensor, value: Tensor) -> Tensor:
        index = torch.tensor(self.indices, device=whole.device)
        present = self.read(whole)
        return whole.index_copy(INDEX_AXIS[self.site.kind], index, value.to(whole).expand_as(present))

    @property
    def ref(self) -> Ref:
        return {"kind": "group", "site": str(self.site), "indices": list(self.indices)}

    def __str__(self) -> str:
        return f"{self.site}[{','.join(map(str, self.indices))}]"


@dataclass(frozen=True)
class Channel(OneSite):
    """One channel of a map, `Channel("module:features.3|out", 5)`: its value is [image, row, column].

    The tensor there is [image, channel, ...]. read and write raise InputError for a channel past the end.
    """

    site: Site
    index: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "site", Site.parse(self.site))
        if self.site.kind != "module" or self.index < 0:
            raise InputError(
                f"a channel is at a module's output, such as module:features.3|out, numbered from 0; got {self.site} "
                f"and {self.index}"
            )

    def read(self, whole: Tensor) -> Tensor:
        self._check(whole)
        return whole[:, self.index]

    def write(self, whole: Tensor, value: Tensor) -> Tensor:
        self._check(whole)
        changed = whole.clone()
        changed[:, self.index] = value.to(whole)
        return changed

    def _check(self, whole: Tensor) -> None:
        if whole.ndim < 2 or self.index >= whole.shape[1]:
            raise InputError(f"{self}: the tensor there is {list(whole.shape)}, [image, channel, ...]")

    @property
    def ref(self) -> Ref:
        return {"kind": "channel", "site": str(self.site), "index": self.index}

    def __str__(self) -> str:
        return f"channel {self.index} of {self.site.module}" + ("" if self.site.side == "out" else f"|{self.site.side}")


@dataclass(frozen=True)
class Together:
    """Several parts as one: the value of all is the list of theirs, side by side on the last axis.

    parts: parts of one number each, such as latents, neurons and directions; two of them must not write the same
    numbers. Raises InputError for none.
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if not self.parts:
            raise InputError("no parts to take together")

    @property
    def reads(self) -> tuple[Site, ...]:
        return tuple(dict.fromkeys(site for part in self.parts for site in part.reads))

    @property
    def writes(self) -> tuple[Site, ...]:
        found = dict.fromkeys(site for part in self.parts for site in part.writes)
        return tuple(sorted(found, key=lambda site: site.order))

    def value(self, at: At) -> Tensor:
        """[example, pos, part]."""
        return torch.stack([part.value(at) for part in self.parts], -1)

    def written(self, at: At, value: Tensor) -> dict[Site, Tensor]:
        """Every part's value, one after the other."""
        tensors = {site: at[site] for site in places(self.parts)}
        for number, part in enumerate(self.parts):
            tensors |= part.written(tensors, value[..., number])
        return {site: tensors[site] for site in {site.whole for site in self.writes}}

    @property
    def ref(self) -> Ref:
        return {"kind": "together", "parts": [part.ref for part in self.parts]}

    def __str__(self) -> str:
        first, count = str(self.parts[0]), len(self.parts) - 1
        return f"{first} and {count} more" if count else first


@dataclass(frozen=True)
class Edge:
    """From what one part writes to what another reads. target: several parts as one `Together`, or the logits."""

    source: Part
    target: Part

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"


@runtime_checkable
class HasLatents(Protocol):
    """A dictionary, as far as its latents as parts need it."""

    @property
    def n_latents(self) -> int: ...

    @property
    def content_hash(self) -> str: ...

    def latent(self, index: int) -> Part: ...


@runtime_checkable
class LeavesOver(Protocol):
    """A dictionary that leaves something unexplained, which is a part too."""

    @property
    def content_hash(self) -> str: ...

    @property
    def unexplained(self) -> Part: ...


@runtime_checkable
class OfDictionary(Protocol):
    """A latent: it knows the dictionary that counts it, and its number there."""

    @property
    def dictionary(self) -> HasLatents: ...

    @property
    def number(self) -> int: ...


def head(layer: int, index: int) -> Unit:
    """Query head `index` of layer `layer`: its weighted values before the output projection."""
    return Unit(Site("z", layer, index))


def neuron(layer: int, index: int) -> Unit:
    """Neuron `index` of layer `layer`: what the down projection reads."""
    return Unit(Site("mlp_post", layer, index))


def as_part(what: Part | Site | str) -> Part:
    """A Part from a Part, a Site or a site's name. Raises InputError for anything else."""
    if isinstance(what, str | Site):
        return Unit(Site.parse(what))
    if not isinstance(what, Part):
        raise InputError(f"a part is a site's name, a Site or a Part such as vs.Direction; got {type(what).__name__}")
    return what


# What refs of this process name by hash and is still alive, so that such a ref resolves without further ado.
ALIVE: WeakValueDictionary[str, Any] = WeakValueDictionary()


def remember(digest_of: str, what: Part | HasLatents) -> None:
    """Let `resolve` find a direction, subspace or dictionary by its hash for as long as it is alive."""
    # An equal one that is named as well must not take the place of the first, and leave with it.
    ALIVE.setdefault(digest_of, what)


def _check_index(site: Site, whole: Tensor, index: int) -> None:
    size = whole.shape[INDEX_AXIS[site.kind]]
    if index >= size:
        raise InputError(f"{site}: the tensor there has {size} of these, numbered from 0")


def places(parts: Sequence[Part]) -> list[Site]:
    """Whole sites that some parts read or write, each once, in the order of the forward pass."""
    found = {site.whole for part in parts for site in (*part.reads, *part.writes)}
    return sorted(found, key=lambda site: site.order)
