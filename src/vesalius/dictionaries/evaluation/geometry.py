"""How close decoder directions lie to each other, and how many two dictionaries share, against random directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from vesalius.dictionaries.dictionary import Dictionary
from vesalius.errors import InputError
from vesalius.seeds import generator_for

MOST = 4096
"""Latents that are matched, or whose nearest neighbour is looked for, at most; drawn at random when there are more."""
SHARED = 0.7
"""Least cosine, of decoder rows and of encoder rows, at which matched latents count as shared (Paulo and Belrose 2025,
arXiv:2501.16615)."""
_SLICE = 1024
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Geometry:
    """Cosine of each decoder row to the nearest other one, and the same of as many random directions.

    nearest: [n] of the latents that were looked at. null: [n] of random directions in the same dimension.
    """

    nearest: Floats
    null: Floats

    def to_json(self) -> dict[str, Any]:
        """Quartiles of both, and histograms over the same edges."""
        return {"nearest": _summary(self.nearest), "null": _summary(self.null), "histogram": _histogram(self)}


@dataclass(frozen=True, eq=False)
class Shared:
    """What one dictionary has of another's latents, matched one to one by their decoder rows.

    decoder, encoder: [n] cosines of matched pairs. null: [n] of the decoder rows matched to as many random directions.
    latents: [n] pairs of numbers.
    """

    decoder: Floats
    encoder: Floats
    null: Floats
    latents: NDArray[np.intp]

    @property
    def share(self) -> float:
        """Share of the latents whose decoder and encoder rows both have a cosine of at least `SHARED`."""
        return float(((self.decoder >= SHARED) & (self.encoder >= SHARED)).mean())

    @property
    def null_share(self) -> float:
        """Share whose decoder row has such a cosine to the random direction it is matched with."""
        return float((self.null >= SHARED).mean())

    def to_json(self) -> dict[str, Any]:
        """Shares, mean cosines, and a histogram of decoder cosines."""
        means = {name: float(getattr(self, name).mean()) for name in ("decoder", "encoder", "null")}
        edges = np.linspace(-1, 1, 81)
        counts = {"matched": self.decoder, "null": self.null}
        histogram = {name: np.histogram(values, edges)[0].tolist() for name, values in counts.items()}
        return {
            "n": len(self.decoder),
            "share": self.share,
            "null_share": self.null_share,
            "cosine": means,
            "histogram": {"edges": edges.tolist(), **histogram},
        }


@torch.no_grad()
def geometry(coder: Dictionary, alive: Sequence[bool] | None = None, *, seed: int = 0) -> Geometry:
    """Nearest decoder rows, of the latents that are alive (default: all) and write anything.

    Raises InputError when there are fewer than 2.
    """
    rows, _ = _directions(torch.cat([coder.decoder_rows(site) for site in coder.out_sites], 1), alive)
    if len(rows) < 2:
        raise InputError(f"{len(rows)} latents write anything, so none has a neighbour")
    return Geometry(nearest_cosines(rows, seed), nearest_cosines(random_unit(len(rows), rows.shape[1], seed), seed))


def nearest_cosines(rows: Float[Tensor, "latent d"], seed: int = 0) -> Floats:
    """Largest cosine of each unit row to another row; of `MOST` of them at random when there are more."""
    some = _some(len(rows), seed)
    found = []
    for part in some.split(_SLICE):
        cosines = rows[part] @ rows.T
        # A row is no neighbour of itself.
        cosines[torch.arange(len(part)), part] = -2.0
        found.append(cosines.amax(1))
    return torch.cat(found).double().clamp(-1, 1).cpu().numpy()


@torch.no_grad()
def shared(
    a: Dictionary,
    b: Dictionary,
    alive_a: Sequence[bool] | None = None,
    alive_b: Sequence[bool] | None = None,
    *,
    seed: int = 0,
) -> Shared:
    """How many latents of one dictionary another has, as two training seeds do.

    Decoder rows are matched one to one with the largest sum of cosines (SciPy's linear_sum_assignment). The nearest row
    for each, where one row may serve many, would overstate what is shared. alive_a, alive_b: latents that
    take part; default all that write anything. With more than `MOST` in a, that many of them at random are matched to
    all of b. The null is the same matching to as many random directions as b has.

    Raises InputError for dictionaries of other sites, or with fewer latents in b than are matched.
    """
    if (a.in_widths, a.out_widths) != (b.in_widths, b.out_widths):
        raise InputError(f"{a!r} and {b!r} differ in width, so their latents cannot be matched")
    rows, numbers = _directions(torch.cat(a.decoders, 1), alive_a)
    others, other_numbers = _directions(torch.cat(b.decoders, 1), alive_b)
    some = _some(len(rows), seed)
    # The matching takes time with the cube of the latents, so that a sample has to do.
    rows, numbers = rows[some], numbers[some]
    if not 0 < len(rows) <= len(others):
        raise InputError(f"{len(rows)} latents cannot be matched one to one to {len(others)}; exchange the two")
    cosines, mate = matching(rows, others)
    encoders = [torch.nn.functional.normalize(torch.cat(c.encoders, 0).T, dim=1).cpu() for c in (a, b)]
    pairs = torch.stack([numbers, other_numbers[torch.from_numpy(mate)]], 1)
    encoder = (encoders[0][pairs[:, 0]] * encoders[1][pairs[:, 1]]).sum(1).double().cpu().numpy()
    null, _ = matching(rows, random_unit(len(others), others.shape[1], seed + 1))
    return Shared(cosines, encoder, null, pairs.cpu().numpy())


def matching(rows: Float[Tensor, "n d"], others: Float[Tensor, "m d"]) -> tuple[Floats, NDArray[np.intp]]:
    """Cosine [n] of each unit row to the one of `others` it is matched with, one to one, and that one's number [n]."""
    # Late: importing scipy.optimize takes half a second, and only this needs it.
    from scipy.optimize import linear_sum_assignment

    cosines = (rows @ others.T.to(rows)).double().cpu().numpy()
    first, mate = linear_sum_assignment(cosines, maximize=True)
    return cosines[first, mate], mate


def random_unit(n: int, width: int, seed: int) -> Float[Tensor, "n width"]:
    """n directions, uniform on the sphere."""
    rows = torch.randn(n, width, generator=generator_for("random unit rows", seed))
    return rows / rows.norm(dim=1, keepdim=True)


def _directions(
    decoder: Float[Tensor, "latent d"], alive: Sequence[bool] | None
) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
    """Unit rows of the latents that are alive and write anything, and their numbers."""
    norms = decoder.float().norm(dim=1)
    kept = norms > 0
    if alive is not None:
        kept &= torch.as_tensor(alive, dtype=torch.bool, device=kept.device)
    return decoder.float()[kept] / norms[kept, None], kept.nonzero()[:, 0].cpu()


def _some(n: int, seed: int) -> Tensor:
    if n <= MOST:
        return torch.arange(n)
    return torch.randperm(n, generator=generator_for("latents", seed))[:MOST].sort().values


def _summary(values: Floats) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"mean": float(values.mean()), "q25": float(low), "median": float(middle), "q75": float(high)}


def _histogram(found: Geometry) -> dict[str, list[float]]:
    edges = np.linspace(min(0.0, float(found.nearest.min())), 1, 61)
    sides = {"nearest": found.nearest, "null": found.null}
    return {"edges": edges.tolist()} | {name: np.histogram(side, edges)[0].tolist() for name, side in sides.items()}
