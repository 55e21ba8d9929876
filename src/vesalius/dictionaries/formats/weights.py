"""Weights: the tensors of a file by name, asked for one by one, so that what is missing or left over is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vesalius.errors import FileFormatError


@dataclass(frozen=True)
class Weights:
    """Tensors of one file."""

    path: Path
    tensors: Mapping[str, Tensor]
    dtype: torch.dtype = torch.float32
    """What floating-point tensors are turned into."""

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str, *axes: str | int) -> Tensor:
        """The tensor with this name. axes: a size each, or a word for an axis of any size.

        Raises FileFormatError for a tensor that is missing or of another shape.
        """
        if name not in self.tensors:
            raise FileFormatError(
                f"{self.path} holds no tensor {name!r}; it holds {', '.join(sorted(self.tensors)) or 'none'}"
            )
        tensor = self.tensors[name]
        fits = tensor.ndim == len(axes) and all(
            isinstance(axis, str) or axis == size for axis, size in zip(axes, tensor.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join(map(str, axes))
            raise FileFormatError(
                f"{self.path}: {name} should have shape [{wanted}] beside the other tensors, it has "
                f"{tuple(tensor.shape)}"
            )
        return self._cast(tensor)

    def maybe(self, name: str, *axes: str | int) -> Tensor | None:
        """The tensor, or None where there is none."""
        return self.take(name, *axes) if name in self.tensors else None

    def refuse_others(self, kind: str, known: Iterable[str]) -> None:
        """Raises FileFormatError for tensors that a dictionary of this kind has no use for."""
        others = sorted(set(self.tensors) - set(known))
        if others:
            raise FileFormatError(
                f"{self.path} holds {', '.join(others)}, which {kind} has no use for: reading it would leave out "
                "something that it computes"
            )

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype).contiguous() if tensor.is_floating_point() else tensor
