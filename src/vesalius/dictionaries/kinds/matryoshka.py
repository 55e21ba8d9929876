"""Matryoshka dictionaries: nested prefixes of the latents each rebuild the activations (Bussmann et al. 2025).

Active latents are chosen as in BatchTopK. The error is the mean over prefixes of the error of rebuilding with the
latents of that prefix alone, so that the first latents learn what is general. Fitted, it is a BatchTopK dictionary with
`groups`, the sizes of the prefixes.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vesalius.dictionaries.config import TrainConfig
from vesalius.dictionaries.kinds.base import Entries, Gradients, Vectors


class Matryoshka:
    """BatchTopK whose `TrainConfig.prefixes` are several."""

    name = "matryoshka"
    activation = "batchtopk"
    selection: Literal["row", "batch", "local"] = "batch"

    def start(self, _config: TrainConfig, _pre: Tensor, /) -> dict[str, Tensor]:
        """None."""
        return {}

    def floor(self, _vectors: Vectors, _config: TrainConfig, /) -> Tensor | None:
        """Zero."""
        return None

    def values(self, entries: Entries, /) -> Tensor:
        """The positive part."""
        return entries.pre.relu()

    def gate(self, _entries: Entries, /) -> Tensor | None:
        """None."""
        return None

    def gradients(self, entries: Entries, dvalues: Tensor, _dgate: Tensor | None, /) -> Gradients:
        """The error's, where the latent is positive. dvalues: of all prefixes the latent is in."""
        return Gradients(dvalues * (entries.pre > 0))

    def fitted(self, _vectors: Vectors, threshold: Tensor, /) -> dict[str, Tensor]:
        """The threshold."""
        return {"threshold": threshold}
