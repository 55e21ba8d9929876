"""Directions and subspaces: parts that are coordinates along vectors, known by the hash of their numbers."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.errors import InputError, NotFiniteError
from vesalius.parts import OneSite, Ref, Unit, remember
from vesalius.site import Site


class Labelled(OneSite):
    """A part made of numbers, with a label: equal to another with the same site, label and numbers."""

    label: str

    @property
    @abstractmethod
    def numbers(self) -> Tensor:
        """What makes it."""

    @cached_property
    def _sha256(self) -> str:
        return digest(self.numbers)

    @property
    def ref(self) -> Ref:
        """Reference by the hash of its numbers, which `resolve` finds as long as the part is alive."""
        remember(self._sha256, self)
        kind = type(self).__name__.lower()
        return {"kind": kind, "site": str(self.site), "label": self.label, "sha256": self._sha256}

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Labelled) and self.ref == other.ref)

    def __hash__(self) -> int:
        return hash((self.site, self.label))

    def __str__(self) -> str:
        return f"{self.site} {type(self).__name__.lower()} {self.label or self.ref['sha256'][:8]}"

    def __repr__(self) -> str:
        where = f"{self.label!r} at {self.site}" if self.label else str(self.site)
        rank = f"rank {len(self.numbers)}, " if self.numbers.ndim > 1 else ""
        return f"{type(self).__name__}({where}, {rank}width {self.numbers.shape[-1]})"


@dataclass(frozen=True, eq=False, repr=False)
class Direction(Labelled):
    """The coordinate along a direction at a site. vector: [width of the site]; normalised here.

    Raises NotFiniteError for NaN or infinity, InputError for a zero vector or a wrong shape.
    """

    site: Site
    vector: Tensor
    label: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "site", Site.parse(self.site))
        if not bool(torch.isfinite(self.vector).all()):
            raise NotFiniteError(f"the direction at {self.site} holds NaN or infinity")
        if self.vector.ndim != 1 or float(self.vector.detach().norm()) == 0.0:
            raise InputError(f"a direction is one non-zero vector; got shape {tuple(self.vector.shape)} at {self.site}")
        object.__setattr__(self, "vector", self.vector / self.vector.norm())

    @property
    def numbers(self) -> Float[Tensor, " width"]:
        """The unit vector."""
        return self.vector

    def read(self, whole: Tensor) -> Tensor:
        """[example, pos] coordinate."""
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


@dataclass(frozen=True, eq=False, repr=False)
class Subspace(Labelled):
    """Coordinates in an orthonormal basis at a site. basis: [rank, width of the site]; orthonormalised here.

    Raises InputError when the rows are linearly dependent.
    """

    site: Site
    basis: Tensor
    label: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "site", Site.parse(self.site))
        if self.basis.ndim != 2 or self.basis.shape[0] > self.basis.shape[1]:
            raise InputError(f"a basis is [rank, width] with rank <= width; got {tuple(self.basis.shape)}")
        if not bool(torch.isfinite(self.basis).all()):
            raise NotFiniteError(f"the basis at {self.site} holds NaN or infinity")
        q, r = torch.linalg.qr(self.basis.T.to(torch.float64))
        sizes = r.detach().diagonal().abs()
        if float(sizes.min()) < 1e-8 * float(sizes.max()):
            raise InputError(f"the basis at {self.site} is linearly dependent")
        object.__setattr__(self, "basis", q.T.to(self.basis.dtype).contiguous())

    @property
    def numbers(self) -> Float[Tensor, "rank width"]:
        """The basis."""
        return self.basis

    def read(self, whole: Tensor) -> Tensor:
        """[example, pos, rank] coordinates."""
        return Unit(self.site).read(whole) @ self.basis.T.to(whole)

    def write(self, whole: Tensor, value: Tensor) -> Tensor:
        unit = Unit(self.site)
        basis = self.basis.to(whole)
        inside = unit.read(whole)
        return unit.write(whole, inside + (value - inside @ basis.T) @ basis)


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes, whatever its dtype."""
    # As bytes: NumPy has no bfloat16.
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()
