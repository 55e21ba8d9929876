"""Sums over rows of what the figures are made of: squared errors, squared norms, products, how often latents fire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.dictionaries.coder import CHUNK, Coder
from vesalius.dictionaries.evaluation.sample import Sample

COLUMNS = ("error", "deviation", "target", "rebuilt", "product", "cosine", "ratio", "nonzero")
"""Per row and site, for a target y, its rebuilt ŷ and the mean m of all targets: |y - ŷ|², |y - m|², |y|², |ŷ|², y·ŷ,
their cosine, |ŷ|/|y|, and 1 where y is not zero (else cosine and ratio count as 0)."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Coded:
    """What came of some rows. outs: rebuilt, per site. active: [row] numbers stored per row. latents: [row, latent]."""

    outs: Sequence[Tensor]
    active: Tensor
    latents: Tensor | None = None


class Rebuilder(Protocol):
    """Anything that rebuilds activations from few numbers: a dictionary, or what it is compared with."""

    @property
    def name(self) -> str: ...

    def code(self, ins: Sequence[Tensor]) -> Coded:
        """Rows [row, width] per input site to what they are rebuilt as."""
        ...


@dataclass(frozen=True, eq=False)
class OfCoder:
    """A dictionary as a Rebuilder."""

    coder: Coder
    name: str = "dictionary"

    def code(self, ins: Sequence[Tensor]) -> Coded:
        latents = self.coder.encode(ins[0] if len(ins) == 1 else list(ins))
        rebuilt = self.coder.decode(latents) if self.coder.decodes_alone else self.coder.reconstruct(ins)
        outs = (rebuilt,) if isinstance(rebuilt, Tensor) else rebuilt
        return Coded(outs, (latents > 0).sum(-1), latents)


@dataclass(frozen=True, eq=False)
class Sums:
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


@torch.no_grad()
def sums_of(rebuilder: Rebuilder, sample: Sample) -> Sums:
    """The sums of a rebuilder over the rows of a sample, in float64."""
    n = sample.n_groups
    groups = torch.from_numpy(np.ascontiguousarray(sample.groups))
    means = [rows.double().mean(0) for rows in sample.outs]
    sites = torch.zeros(len(sample.outs), n, len(COLUMNS), dtype=torch.float64)
    active, fired = torch.zeros(n, dtype=torch.float64), None
    for at in range(0, len(sample), CHUNK):
        here = slice(at, at + CHUNK)
        coded = rebuilder.code([rows[here] for rows in sample.ins])
        for number, (rows, mean) in enumerate(zip(sample.outs, means, strict=True)):
            sites[number].index_add_(0, groups[here], _columns(rows[here], coded.outs[number].to(rows), mean))
        active.index_add_(0, groups[here], coded.active.to("cpu", torch.float64))
        if coded.latents is not None:
            fired = torch.zeros(n, coded.latents.shape[-1]) if fired is None else fired
            fired.index_add_(0, groups[here], (coded.latents > 0).to("cpu", torch.float32))
    counts = np.bincount(sample.groups, minlength=n).astype(np.float64)
    return Sums(sites.numpy(), counts, active.numpy(), None if fired is None else fired.numpy())


def _columns(target: Tensor, rebuilt: Tensor, mean: Tensor) -> Tensor:
    """[row, column] of one site."""
    y, guess = target.double(), rebuilt.double()
    squared = lambda rows: rows.square().sum(1)  # noqa: E731
    ys, guesses, product = squared(y), squared(guess), (y * guess).sum(1)
    norms = (ys * guesses).sqrt()
    cosine = torch.where(norms > 0, product / norms.clamp(min=1e-300), 0.0)
    ratio = torch.where(ys > 0, (guesses / ys.clamp(min=1e-300)).sqrt(), 0.0)
    return torch.stack(
        [squared(y - guess), squared(y - mean), ys, guesses, product, cosine, ratio, (ys > 0).double()], 1
    )


def joined(sums: Sums) -> Floats:
    """[group, column]: the columns of all sites one after the other, then `rows` and `active`."""
    flat: Any = sums.sites.transpose(1, 0, 2).reshape(len(sums.rows), -1)
    return np.concatenate([flat, sums.rows[:, None], sums.active[:, None]], 1)
