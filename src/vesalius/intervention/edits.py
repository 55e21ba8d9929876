"""Project, Erase, Noise and Replace: edits whose new value is computed from the run itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Int
from torch import Tensor

from vesalius.activations import Activations
from vesalius.directions import Direction, Subspace
from vesalius.errors import InputError, InterventionError
from vesalius.intervention.basic import KEPT_OUT, Edit, mean_of
from vesalius.intervention.form import Recorded, Source, Write
from vesalius.intervention.place import Place, Positions, token_axis
from vesalius.parts import At, Part, Unit, as_part
from vesalius.site import ATTENTION, Site


@dataclass(frozen=True, eq=False, repr=False)
class Project(Edit):
    """Remove a Direction or Subspace from a site, or keep nothing else: x - P(x - c), or c + P(x - c).

    keep: keep the subspace instead of removing it. centre: c, a vector or Activations (their mean over real
    positions); default zero. With a centre, what is lost is replaced by its mean and not by zero.

    Raises InputError for a part that is not a Direction or Subspace.
    """

    keep: bool = False
    centre: Source | None = None
    positions: Positions = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.part, Direction | Subspace):
            raise InputError(f"Project at {self.place} needs a Direction or a Subspace; to remove all of it, Ablate")
        object.__setattr__(self, "part", Unit(self.place))

    def value(self, present: Tensor, _place: Place) -> Tensor:
        wide = present.to(torch.promote_types(present.dtype, torch.float32))
        centre = self._centre().to(wide)
        basis = _basis(self.target).to(wide)
        inside = (wide - centre) @ basis.T @ basis
        return centre + inside if self.keep else wide - inside

    def _centre(self) -> Tensor:
        if self.centre is None:
            return torch.zeros(())
        if isinstance(self.centre, Activations):
            return mean_of(self.part.value(self.centre), self.centre.tokens, self.place)
        return self.centre


def _basis(part: Part) -> Tensor:
    """Orthonormal rows [rank, width]."""
    assert isinstance(part, Direction | Subspace)
    return part.vector[None] if isinstance(part, Direction) else part.basis


@dataclass(frozen=True, eq=False, repr=False)
class Erase(Edit):
    """Take out what some directions read: x - ((x - centre) reads^T) writes, an oblique projection.

    reads, writes: [rank, width], with reads writes^T the identity where it is a projection. centre: [width], whose
    coordinates the result has; default zero. Erasers of concepts make it (`vs.concepts.fit_eraser`).

    Raises InputError for a part that is not a whole site or a head, and for shapes that do not fit each other.
    """

    reads: Tensor = field(kw_only=True)
    writes: Tensor = field(kw_only=True)
    centre: Tensor | None = None
    positions: Positions = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.part, Unit):
            raise InputError(f"Erase at {self.place} needs a site, or a head of it; got {type(self.part).__name__}")
        width = self.reads.shape[-1]
        if self.reads.ndim != 2 or self.reads.shape != self.writes.shape:
            raise InputError(
                f"Erase at {self.place}: reads and writes are [rank, width] alike; got {tuple(self.reads.shape)} and "
                f"{tuple(self.writes.shape)}"
            )
        if self.centre is not None and self.centre.shape != (width,):
            raise InputError(f"Erase at {self.place}: centre is [{width}]; got {tuple(self.centre.shape)}")

    def value(self, present: Tensor, _place: Place) -> Tensor:
        if present.shape[-1] != self.reads.shape[-1]:
            raise InterventionError(
                f"Erase of width {self.reads.shape[-1]} at {self.place}, whose width is {present.shape[-1]}: it was "
                "fitted at another site, or in another model"
            )
        wide = present.to(torch.promote_types(present.dtype, torch.float32))
        away = wide if self.centre is None else wide - self.centre.to(wide)
        return wide - away @ self.reads.T.to(wide) @ self.writes.to(wide)


@dataclass(frozen=True, eq=False, repr=False)
class Noise(Edit):
    """Add Gaussian noise: `scale` times `std` times a standard normal draw, independent for every example and token.

    std: what the scale is measured in: a number, or a tensor that broadcasts to the part's value, such as the standard
    deviation of the embeddings (Meng et al. 2022, section 2: 3 of them). seed: the draws depend on it, on the number of
    the example and on the token's, and on nothing else: not on batch size, order or padding. examples: [batch], the
    numbers of the examples of this run; default 0, 1, 2, ...

    Raises InputError for a negative scale or a std that is not finite.
    """

    scale: float = field(kw_only=True)
    std: float | Tensor = 1.0
    seed: int = 0
    examples: Int[Tensor, " batch"] | None = None
    positions: Positions = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale < 0 or not bool(torch.isfinite(torch.as_tensor(self.std)).all()):
            raise InputError(f"Noise at {self.place} needs scale >= 0 and a finite std; got {self.scale}")

    def value(self, present: Tensor, place: Place) -> Tensor:
        if place.ends is not None and self.place.kind in ATTENTION:
            raise InterventionError(f"Noise at {self.place} is not fixed token by token while a model generates")
        std = self.std.to(present) if isinstance(self.std, Tensor) else self.std
        return present + self.scale * std * self._draw(present, place).to(present)

    def _draw(self, present: Tensor, place: Place) -> Tensor:
        """Standard normal noise of the shape of `present`, in float32 on the CPU whatever the model runs in."""
        axis = token_axis(self.place)
        if present.ndim <= axis:
            raise InterventionError(f"Noise at {self.place} needs [batch, pos, ...]; got {tuple(present.shape)}")
        shape = list(present.movedim(axis, 1).shape)
        numbers = torch.arange(shape[0]) if self.examples is None else torch.as_tensor(self.examples)
        if len(numbers) != shape[0]:
            raise InterventionError(f"Noise at {self.place}: {len(numbers)} examples= for a run of {shape[0]}")
        index = torch.arange(shape[1]).expand(shape[0], -1) if place.index is None else place.numbers
        rows = [self._of_example(int(n), index[row], shape[2:]) for row, n in enumerate(numbers)]
        return torch.stack(rows).movedim(1, axis)

    def _of_example(self, number: int, index: Int[Tensor, " pos"], shape: list[int]) -> Tensor:
        """Drawn token after token, so that more tokens do not change the first ones."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
        drawn = [torch.randn(shape, generator=generator) for _ in range(int(index.max()) + 1)]
        return torch.stack(drawn)[index.clamp_max(len(drawn) - 1)]


@dataclass(frozen=True, eq=False, repr=False)
class Replace(Recorded):
    """Write fn(values read at sites) at the same or a later site of the same run: how a transcoder is spliced in.

    read, write: Parts, Sites or names; read may be a list of them. The values read are those after interventions there.
    fn: from the value of each part of `read`, one argument each, to the one at `write`, over the same tokens. ref: the
    name or hash of the function, which stands for it in JSON and in hashes; give it back with
    from_json(..., functions={ref: fn}).

    A run raises InterventionError when the pass makes a site of `read` only after `write`, or the result has another
    shape.
    """

    read: Part | Site | str | Sequence[Part | Site | str]
    write: Part | Site | str = field(metadata=KEPT_OUT)
    fn: Callable[..., Tensor] = field(metadata=KEPT_OUT)
    ref: str
    positions: Positions = None
    made: Tensor | None = field(default=None, metadata=KEPT_OUT)
    part: Part = field(init=False)
    inputs: tuple[Part, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "part", as_part(self.write))
        listed = [self.read] if isinstance(self.read, str | Site | Part) else list(self.read)
        object.__setattr__(self, "inputs", tuple(as_part(one) for one in listed))
        if not self.inputs:
            raise InputError(f"Replace at {self.place} reads nothing: give read=, a site or a list of sites")
        if not self.ref:
            raise InputError(f"Replace at {self.place} needs ref=, a name or hash that stands for its function")

    @property
    def place(self) -> Site:
        """Where it is written, first if at several sites."""
        return self.part.writes[0]

    @property
    def reads(self) -> tuple[Site, ...]:
        """The sites that its function is given."""
        return tuple(site for part in self.inputs for site in part.reads)

    def given(self, at: At) -> Replace:
        """The edit, now that the whole tensors at `reads` are known."""
        return replace(self, made=self.fn(*(part.value(at) for part in self.inputs)))

    def value(self, _present: Tensor, _place: Place) -> Tensor:
        if self.made is None:
            raise InterventionError(
                f"Replace at {self.place}: {', '.join(map(str, self.reads))} has not been read; use it in a run"
            )
        return self.made

    def written(self, write: Write) -> dict[str, object]:
        data = super().written(write)
        listed = [part.ref for part in self.inputs]
        return {**data, "read": listed[0] if len(listed) == 1 else listed}
