"""Interventions: values that say which Part to change, where, and how. Applied in the order they are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vesalius.activations import Activations
from vesalius.errors import InputError, InterventionError, UnknownNameError
from vesalius.inputs import Tokens
from vesalius.parts import Direction, Part, Unit, as_part
from vesalius.site import Site

Positions = int | Sequence[int] | Tensor | None
Source = Activations | Tensor


@runtime_checkable
class Intervention(Protocol):
    """Something that changes one tensor of a run."""

    @property
    def part(self) -> Part: ...

    @property
    def positions(self) -> Positions: ...

    def value(self, whole: Tensor, real: Bool[Tensor, "batch pos"]) -> Tensor:
        """The part's new value, broadcastable to its present one."""
        ...

    def to_json(self) -> dict[str, Any]: ...


def apply(intervention: Intervention, whole: Tensor, real: Bool[Tensor, "batch pos"]) -> Tensor:
    """The whole tensor after one intervention; positions outside the choice keep their value bit for bit."""
    part = intervention.part
    present = part.read(whole)
    new = intervention.value(whole, real)
    try:
        new = new.to(present).expand_as(present)
    except RuntimeError:
        raise InterventionError(
            f"{type(intervention).__name__} at {part.site}: the new value has shape {tuple(new.shape)}, "
            f"the present one {tuple(present.shape)}"
        ) from None
    edited = part.write(whole, new)
    chosen = mask_of(intervention.positions, real)
    return edited if chosen is None else torch.where(_spread(chosen, whole, part.site), edited, whole)


def mask_of(positions: Positions, real: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"] | None:
    """Positions as a mask: None all, int or list the same everywhere, [batch] one each, bool [batch, pos] a mask.

    Raises InputError for a position outside the prompts, and for a negative one that is padding in some prompt.
    """
    if positions is None:
        return None
    batch, width = real.shape
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        if positions.shape != real.shape:
            raise InputError(f"a position mask must be {tuple(real.shape)}; got {tuple(positions.shape)}")
        return positions.to(real.device)
    chosen = torch.zeros(batch, width, dtype=torch.bool, device=real.device)
    if isinstance(positions, Tensor):
        if positions.shape != (batch,):
            raise InputError(f"per-example positions must be [{batch}]; got {tuple(positions.shape)}")
        _check_positions(positions.tolist(), real)
        chosen[torch.arange(batch, device=real.device), positions.to(real.device)] = True
        return chosen
    listed = [positions] if isinstance(positions, int) else list(positions)
    _check_positions(listed, real)
    chosen[:, listed] = True
    return chosen


def _check_positions(positions: Sequence[int], real: Bool[Tensor, "batch pos"]) -> None:
    width = real.shape[1]
    for position in positions:
        if not -width <= position < width:
            raise InputError(f"position {position} is outside the prompts' {width} tokens")
        if position < 0 and not bool(real[:, position].all()):
            raise InputError(
                f"position {position} counts from the padded end, which is padding in some prompts; "
                "give one position per example: a tensor [batch], such as tokens.lengths - 1"
            )


def _spread(chosen: Bool[Tensor, "batch pos"], whole: Tensor, site: Site) -> Tensor:
    """The mask broadcast to a whole tensor: positions are axis 1, or the query positions (axis 2) of attention."""
    if site.kind in ("pattern", "scores"):
        return chosen[:, None, :, None]
    return chosen.view(*chosen.shape, *[1] * (whole.ndim - 2))


def _from(source: Source, part: Part) -> Tensor:
    return part.read(source[part.site.whole]) if isinstance(source, Activations) else source


def _source_json(source: Source | None) -> str:
    if source is None:
        return "none"
    if isinstance(source, Activations):
        return f"activations of {source.tokens.content_hash if source.tokens else 'unknown tokens'}"
    return f"tensor {list(source.shape)}"


@dataclass(frozen=True, eq=False)
class _At:
    """Where: a Part, Site or site name, and the positions (default all)."""

    at: Part | Site | str
    part: Part = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "part", as_part(self.at))


@dataclass(frozen=True, eq=False)
class Patch(_At):
    """Give a part the value it had in another run (Activations that captured the site) or a tensor."""

    source: Source = field(kw_only=True)
    positions: Positions = None

    def value(self, whole: Tensor, _real: Tensor) -> Tensor:
        return _from(self.source, self.part).to(whole)

    def to_json(self) -> dict[str, Any]:
        return {
            "edit": "patch",
            "part": self.part.to_json(),
            "source": _source_json(self.source),
            "positions": str(self.positions),
        }


@dataclass(frozen=True, eq=False)
class Ablate(_At):
    """Remove a part's information.

    mode "zero": zeros. "mean": the mean over the real positions of a reference (Activations), or a tensor given.
    "resample": the value of another example of the reference, drawn without fixed points by `seed`.
    """

    mode: Literal["zero", "mean", "resample"] = "zero"
    reference: Source | None = None
    positions: Positions = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "part", as_part(self.at))
        if self.mode not in ("zero", "mean", "resample"):
            raise UnknownNameError("ablation mode", self.mode, ["zero", "mean", "resample"])
        if self.mode != "zero" and self.reference is None:
            raise InputError(
                f"{self.mode} ablation of {self.part.site} needs reference= (activations of other prompts)"
            )

    def value(self, whole: Tensor, _real: Tensor) -> Tensor:
        present = self.part.read(whole)
        if self.mode == "zero":
            return torch.zeros_like(present)
        assert self.reference is not None
        values = _from(self.reference, self.part).to(whole)
        if self.mode == "resample":
            return values[derangement(len(values), self.seed).to(values.device)]
        return values if isinstance(self.reference, Tensor) else _mean(values, self.reference.tokens)

    def to_json(self) -> dict[str, Any]:
        return {
            "edit": "ablate",
            "mode": self.mode,
            "part": self.part.to_json(),
            "reference": _source_json(self.reference),
            "positions": str(self.positions),
            "seed": self.seed,
        }


def _mean(values: Tensor, tokens: Tokens | None) -> Tensor:
    if tokens is None:
        return values.mean((0, 1))
    return values[tokens.real.to(values.device)].mean(0)


def derangement(n: int, seed: int, lengths: Int[Tensor, " n"] | None = None) -> Int[Tensor, " n"]:
    """A permutation of n without fixed points: each gets the one before it in a random order, the first gets the last.

    lengths: order by length first and at random within a length, so that partners have (nearly) equal lengths.
    Raises InputError for n < 2.
    """
    if n < 2:
        raise InputError("resample ablation needs at least 2 reference examples")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    if lengths is not None:
        order = order[lengths.cpu()[order].argsort(stable=True)]
    result = torch.empty_like(order)
    result[order] = order.roll(1)
    return result


@dataclass(frozen=True, eq=False)
class Steer(_At):
    """Add `scale` times a vector at a residual-stream-like site: a Direction's own unit vector, or `vector`."""

    scale: float = field(kw_only=True)
    vector: Tensor | None = None
    positions: Positions = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "part", as_part(self.at))
        if self.vector is None:
            if not isinstance(self.part, Direction):
                raise InputError(f"Steer at {self.part.site} needs vector=, or a Direction as its first argument")
            object.__setattr__(self, "vector", self.part.vector)
        object.__setattr__(self, "part", Unit(self.part.site))

    def value(self, whole: Tensor, _real: Tensor) -> Tensor:
        assert self.vector is not None
        return self.part.read(whole) + self.scale * self.vector.to(whole)

    def to_json(self) -> dict[str, Any]:
        return {"edit": "steer", "part": self.part.to_json(), "scale": self.scale, "positions": str(self.positions)}


def off_distribution(before: Tensor, after: Tensor, real: Bool[Tensor, "batch pos"], site: Site) -> dict[str, float]:
    """How unnatural an edit is, against the same tensor's natural values in the same run.

    norm_ratio: mean norm of the edited vectors over the mean norm of the natural ones. z_rms: root mean square of the
    edited values' per-dimension z-scores (1 for natural values; large means low density).
    """
    if site.kind in ("pattern", "scores"):
        return {}
    unit = Unit(site)
    natural = unit.read(before).detach()[real]
    natural, edited = natural.reshape(len(natural), -1), unit.read(after).detach()[real].reshape(len(natural), -1)
    changed = (natural != edited).any(1)
    if not bool(changed.any()):
        return {"norm_ratio": 1.0, "z_rms": 1.0}
    spread = natural.std(0).clamp_min(1e-6) if len(natural) > 1 else torch.ones_like(natural[0])
    z = (edited[changed] - natural.mean(0)) / spread
    ratio = edited[changed].norm(dim=1).mean() / natural.norm(dim=1).mean().clamp_min(1e-12)
    return {"norm_ratio": float(ratio), "z_rms": float(z.pow(2).mean().sqrt())}
