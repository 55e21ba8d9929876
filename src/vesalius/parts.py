"""Parts of a network: what can be read and edited at a Site.

Unit        a whole tensor, or one head, neuron or dimension of it
Direction   the coordinate along a unit vector
Subspace    the coordinates in an orthonormal basis
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from vesalius.errors import InputError, NotFiniteError
from vesalius.site import INDEX_AXIS, Site


@runtime_checkable
class Part(Protocol):
    """Something that can be read and edited at a Site."""

    @property
    def site(self) -> Site: ...

    def read(self, whole: Tensor) -> Tensor:
        """This part's value from the whole tensor at the site."""
        ...

    def write(self, whole: Tensor, value: Tensor) -> Tensor:
        """A copy of the whole tensor in which this part has the value."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Reference to the part."""
        ...


@dataclass(frozen=True)
class Unit:
    """A whole tensor (`layers.5.mlp_out`), one head (`layers.5.z[3]`), neuron (`layers.5.mlp_post[7]`) or dimension.

    read and write raise InputError for an index past the end.
    """

    site: Site

    def read(self, whole: Tensor) -> Tensor:
        if self.site.index is None:
            return whole
        self._check(whole)
        return whole.select(INDEX_AXIS[self.site.kind], self.site.index)

    def write(self, whole: Tensor, value: Tensor) -> Tensor:
        if self.site.index is None:
            return value.to(whole).expand_as(whole)
        self._check(whole)
        axis = INDEX_AXIS[self.site.kind]
        row = torch.zeros(whole.shape[axis], dtype=torch.bool, device=whole.device)
        row[self.site.index] = True
        shape = [1] * whole.ndim
        shape[axis] = -1
        return torch.where(row.view(shape), value.to(whole).unsqueeze(axis), whole)

    def _check(self, whole: Tensor) -> None:
        size = whole.shape[INDEX_AXIS[self.site.kind]]
        if self.site.index is not None and self.site.index >= size:
            raise InputError(f"{self.site}: the tensor there has {size} of these, numbered from 0")

    def to_json(self) -> dict[str, Any]:
        return {"kind": "unit", "site": str(self.site)}

    def __str__(self) -> str:
        return str(self.site)


def head(layer: int, index: int) -> Unit:
    """Query head `index` of layer `layer`: its weighted values before the output projection."""
    return Unit(Site("z", layer, index))


def neuron(layer: int, index: int) -> Unit:
    """Neuron `index` of layer `layer`: what the down projection reads."""
    return Unit(Site("mlp_post", layer, index))


def as_part(what: Part | Site | str) -> Part:
    """A Part from a Part, a Site or a site's name."""
    return Unit(Site.parse(what)) if isinstance(what, str | Site) else what


def _digest(tensor: Tensor) -> str:
    # As bytes: NumPy has no bfloat16.
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _named(site: Site, label: str) -> str:
    return f"{label!r} at {site}" if label else str(site)


@dataclass(frozen=True, eq=False, repr=False)
class Direction:
    """The coordinate along a direction at a site. vector: [width of the site]; normalised here.

    Raises NotFiniteError for NaN or infinity, InputError for a zero vector or a wrong shape.
    """

    site: Site
    vector: Tensor
    label: str = ""

    def __post_init__(self) -> None:
        if not bool(torch.isfinite(self.vector).all()):
            raise NotFiniteError(f"the direction at {self.site} holds NaN or infinity")
        if self.vector.ndim != 1 or float(self.vector.detach().norm()) == 0.0:
            raise InputError(f"a direction is one non-zero vector; got shape {tuple(self.vector.shape)} at {self.site}")
        object.__setattr__(self, "vector", self.vector / self.vector.norm())

    def read(self, whole: Tensor) -> Tensor:
        """[batch, pos] coordinate."""
        return Unit(self.site).read(whole) @ self.vector.to(whole)

    def write(self, whole: Tensor, value: Tensor) -> Tensor:
        unit = Unit(self.site)
        vector = self.vector.to(whole)
        inside = unit.read(whole)
        return unit.write(whole, inside + (value - inside @ vector).unsqueeze(-1) * vector)

    def angle(self, other: Direction) -> float:
        """Cosine with another direction. Raises InputError for directions at different sites."""
        if other.site != self.site:
            raise InputError(f"directions at {self.site} and {other.site} cannot be compared: different spaces")
        return float(self.vector @ other.vector)

    def __repr__(self) -> str:
        return f"Direction({_named(self.site, self.label)}, width {len(self.vector)})"

    def to_json(self) -> dict[str, Any]:
        return {"kind": "direction", "site": str(self.site), "label": self.label, "sha256": _digest(self.vector)}


@dataclass(frozen=True, eq=False, repr=False)
class Subspace:
    """Coordinates in an orthonormal basis at a site. basis: [rank, width of the site]; orthonormalised here.

    Raises InputError when the rows are linearly dependent.
    """

    site: Site
    basis: Tensor
    label: str = ""

    def __post_init__(self) -> None:
        if self.basis.ndim != 2 or self.basis.shape[0] > self.basis.shape[1]:
            raise InputError(f"a basis is [rank, width] with rank <= width; got {tuple(self.basis.shape)}")
        if not bool(torch.isfinite(self.basis).all()):
            raise NotFiniteError(f"the basis at {self.site} holds NaN or infinity")
        q, r = torch.linalg.qr(self.basis.T.to(torch.float64))
        sizes = r.detach().diagonal().abs()
        if float(sizes.min()) < 1e-8 * float(sizes.max()):
            raise InputError(f"the basis at {self.site} is linearly dependent")
        object.__setattr__(self, "basis", q.T.to(self.basis.dtype).contiguous())

    def read(self, whole: Tensor) -> Tensor:
        """[batch, pos, rank] coordinates."""
        return Unit(self.site).read(whole) @ self.basis.T.to(whole)

    def write(self, whole: Tensor, value: Tensor) -> Tensor:
        unit = Unit(self.site)
        basis = self.basis.to(whole)
        inside = unit.read(whole)
        return unit.write(whole, inside + (value - inside @ basis.T) @ basis)

    def __repr__(self) -> str:
        return f"Subspace({_named(self.site, self.label)}, rank {len(self.basis)}, width {self.basis.shape[1]})"

    def to_json(self) -> dict[str, Any]:
        return {"kind": "subspace", "site": str(self.site), "label": self.label, "sha256": _digest(self.basis)}
