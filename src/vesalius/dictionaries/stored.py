"""Tensors that stay on disk: rows are read when they are used, and checked when they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vesalius.errors import FileFormatError


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file."""

    path: Path
    name: str
    latent_first: bool = True
    """Whether its first axis counts latents; else its last does."""

    def whole(self, like: Tensor) -> Tensor:
        """All of it, with dtype and device of `like`, latents on the axis they are stored on.

        Raises FileFormatError naming a file that is gone, truncated, or holds NaN or infinity.
        """
        return self._read(lambda part: part[:], like)

    def of_latents(self, latents: Sequence[int], like: Tensor) -> Tensor:
        """The part of these latents, which are numbered without repetition. Raises as `whole`."""
        wanted = list(latents)
        return self._read(lambda part: part[wanted] if self.latent_first else part[:, wanted], like)

    def _read(self, cut: Callable[[Any], Tensor], like: Tensor) -> Tensor:
        try:
            with safe_open(self.path, framework="pt") as stored:
                found = cut(stored.get_slice(self.name)).to(like)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise FileFormatError(
                f"{self.path} can no longer be read ({error}): its weights are read when they are used"
            ) from error
        if not bool(torch.isfinite(found).all()):
            raise FileFormatError(f"{self.path}: {self.name} holds NaN or infinity. Download or copy it again.")
        return found
