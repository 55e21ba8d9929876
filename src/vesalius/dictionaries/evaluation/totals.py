"""Totals over rows of what the figures are made of: squared errors, squared norms, products, how often latents fire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from vesalius.dictionaries.coder import SparseCoder
from vesalius.dictionaries.evaluation.sample import Sample
from vesalius.dictionaries.rows import CHUNK

COLUMNS = ("error", "deviation", "target", "reconstruction", "product", "cosine", "ratio", "nonzero")
"""Per row and site, for a target y, its reconstruction ŷ and the mean m of all targets: |y - ŷ|², |y - m|², |y|², |ŷ|²,
y·ŷ, their cosine, |ŷ|/|y|, and 1 where y is not zero (else cosine and ratio count as 0)."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Reconstructed:
    """Reconstructed rows, per site. active: numbers stored per row. latents: None where there are none."""

    outputs: Sequence[Float[Tensor, "row _"]]
    active: Int[Tensor, " row"]
    latents: Float[Tensor, "row latent"] | None = None


class Reconstructor(Protocol):
    """Anything that reconstructs activations from few numbers: a dictionary, or what it is compared with."""

    @property
    def name(self) -> str: ...

    def reconstruct(self, inputs: Sequence[Tensor]) -> Reconstructed:
        """From rows [row, width] per input site."""
        ...


@dataclass(frozen=True, eq=False)
class CoderReconstructor:
    """A dictionary as a Reconstructor."""

    coder: SparseCoder
    name: str = "dictionary"

    def reconstruct(self, inputs: Sequence[Tensor]) -> Reconstructed:
        """As `Reconstructor.reconstruct`, with the latents."""
        latents = self.coder.encode(inputs[0] if len(inputs) == 1 else list(inputs))
        # Decoded from the latents that are counted, so that encoding is done once, where that is the reconstruction.
        found = self.coder.decode(latents) if self.coder.decodes_alone else self.coder.reconstruct(inputs)
        outputs = (found,) if isinstance(found, Tensor) else found
        return Reconstructed(outputs, (latents > 0).sum(-1), latents)


@dataclass(frozen=True, eq=False)
class Totals:
    """sites: [site, group, column]. rows, active: [group] rows, and numbers active in them. fired: [group, latent]."""

    sites: Floats
    rows: Floats
    active: Floats
    fired: NDArray[np.float32] | None

    @property
    def n_rows(self) -> int:
        """Rows of all groups."""
        return round(float(self.rows.sum()))

    @property
    def l0(self) -> float:
        """Numbers active per row."""
        return float(self.active.sum() / self.rows.sum())

    @property
    def density(self) -> Floats:
        """[latent] share of the rows in which each is active."""
        assert self.fired is not None
        found: Floats = self.fired.sum(0, dtype=np.float64) / self.n_rows
        return found

    def of_site(self, number: int) -> Totals:
        """Of one site alone, without the latents, which are of all sites."""
        return Totals(self.sites[number : number + 1], self.rows, self.active, None)

    def joined(self) -> Floats:
        """[group, column]: the columns of all sites one after the other, then `rows` and `active`."""
        flat: Any = self.sites.transpose(1, 0, 2).reshape(len(self.rows), -1)
        return np.concatenate([flat, self.rows[:, None], self.active[:, None]], 1)


@torch.no_grad()
def totals_of(reconstructor: Reconstructor, sample: Sample) -> Totals:
    """Totals over the rows of a sample, in float64."""
    n = sample.n_groups
    groups = torch.from_numpy(np.ascontiguousarray(sample.groups))
    # Of all rows that are measured: the variance is around their own mean, not the training rows'.
    means = [rows.double().mean(0) for rows in sample.outputs]
    sites = torch.zeros(len(sample.outputs), n, len(COLUMNS), dtype=torch.float64)
    active, fired = torch.zeros(n, dtype=torch.float64), None
    for at in range(0, len(sample), CHUNK):
        here = slice(at, at + CHUNK)
        found = reconstructor.reconstruct([rows[here] for rows in sample.inputs])
        for number, (rows, mean) in enumerate(zip(sample.outputs, means, strict=True)):
            sites[number].index_add_(0, groups[here], _columns(rows[here], found.outputs[number].to(rows), mean))
        active.index_add_(0, groups[here], found.active.to("cpu", torch.float64))
        if found.latents is not None:
            fired = torch.zeros(n, found.latents.shape[-1]) if fired is None else fired
            fired.index_add_(0, groups[here], (found.latents > 0).to("cpu", torch.float32))
    counts = np.bincount(sample.groups, minlength=n).astype(np.float64)
    return Totals(sites.numpy(), counts, active.numpy(), None if fired is None else fired.numpy())


def _columns(
    target: Float[Tensor, "row d"], reconstruction: Float[Tensor, "row d"], mean: Float[Tensor, " d"]
) -> Float[Tensor, "row column"]:
    """Of one site, in the order of COLUMNS."""
    y, guess = target.double(), reconstruction.double()
    squared = lambda rows: rows.square().sum(1)  # noqa: E731
    ys, guesses, product = squared(y), squared(guess), (y * guess).sum(1)
    norms = (ys * guesses).sqrt()
    cosine = torch.where(norms > 0, product / norms.clamp(min=1e-300), 0.0)
    ratio = torch.where(ys > 0, (guesses / ys.clamp(min=1e-300)).sqrt(), 0.0)
    return torch.stack(
        [squared(y - guess), squared(y - mean), ys, guesses, product, cosine, ratio, (ys > 0).double()], 1
    )
