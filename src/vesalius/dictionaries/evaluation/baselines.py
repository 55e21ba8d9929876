"""What a dictionary is compared with: other ways to rebuild a row from as many numbers as its latents per row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vesalius.data import TensorSource
from vesalius.dictionaries.coder import Coder
from vesalius.dictionaries.config import TrainConfig
from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.evaluation.sample import Rows
from vesalius.dictionaries.evaluation.sums import Coded, OfCoder, Rebuilder
from vesalius.dictionaries.training.finish import fitted
from vesalius.dictionaries.training.fitter import make_fitter
from vesalius.dictionaries.training.ranks import Ranks
from vesalius.dictionaries.training.wiring import wire
from vesalius.errors import InputError
from vesalius.jobs.workers import Workers
from vesalius.protocol.canonical import build
from vesalius.seeds import generator_for

WORDS = {
    "pca": "the first principal components",
    "linear": "the best linear map of this rank",
    "random": "as many random directions in place of the decoder's, the strongest kept, scaled by one fitted factor",
    "untrained": "the dictionary as it was before its first step of training, by the same configuration",
    "neurons": "the site's own coordinates: those farthest from their mean kept, the others set to it",
}


@dataclass(frozen=True, eq=False)
class Linear:
    """y = mean_y + (x - mean_x) W, through `rank` numbers."""

    name: str
    weight: Tensor
    mean_in: Tensor
    mean_out: Tensor
    rank: int

    def code(self, ins: Sequence[Tensor]) -> Coded:
        rows = ins[0].to(self.weight)
        out = (rows - self.mean_in) @ self.weight + self.mean_out
        return Coded((out,), torch.full((len(rows),), self.rank))


@dataclass(frozen=True, eq=False)
class Neurons:
    """The k coordinates of a row that are farthest from their mean; the mean for all others."""

    mean: Tensor
    k: int
    name: str = "neurons"

    def code(self, ins: Sequence[Tensor]) -> Coded:
        away = ins[0].to(self.mean) - self.mean
        kept = away.abs().topk(self.k, dim=1).indices
        out = torch.zeros_like(away).scatter_(1, kept, away.gather(1, kept)) + self.mean
        return Coded((out,), torch.full((len(away),), self.k))


def baselines(coder: Coder, fit: tuple[Rows, Rows], l0: float, seed: int) -> list[Rebuilder]:
    """The baselines that this dictionary can be compared with, in the order of `WORDS`.

    fit: rows of inputs and outputs that are not measured on. l0: numbers per row. A dictionary of several sites has no
    baseline; a transcoder has the linear map and, if its configuration is known, its own bos.
    """
    if len(fit[0]) != 1 or len(fit[1]) != 1:
        return []
    x, y = fit[0][0].double(), fit[1][0].double()
    k, own = max(1, min(round(l0), coder.n_latents)), coder.in_sites == coder.out_sites
    made: dict[str, Callable[[], Rebuilder | None]] = {
        "linear": lambda: reduced_rank(x, y, min(k, x.shape[1], y.shape[1])),
        "random": lambda: OfCoder(random_directions(coder, x, k, seed), "random") if own else None,
        "untrained": lambda: _untrained(coder, fit),
        "neurons": lambda: Neurons(x.mean(0).float(), min(k, x.shape[1])) if own else None,
    }
    return [found for make in made.values() if (found := make()) is not None]


def reduced_rank(x: Tensor, y: Tensor, rank: int) -> Linear:
    """Least-squares map of this rank (Izenman 1975): regression, then the principal components of what it predicts.

    x: [n, d_in], y: [n, d_out]. When y is x this is the projection on the first principal components.
    """
    mean_in, mean_out = x.mean(0), y.mean(0)
    centred, target = x - mean_in, y - mean_out
    if torch.equal(x, y):
        weight, predicted = torch.eye(x.shape[1], dtype=x.dtype), centred
    else:
        ridge = 1e-6 * centred.square().sum() / x.shape[1]
        gram = centred.T @ centred + ridge * torch.eye(x.shape[1], dtype=x.dtype)
        weight = torch.linalg.solve(gram, centred.T @ target)
        predicted = centred @ weight
    top = torch.linalg.eigh(predicted.T @ predicted).eigenvectors[:, -rank:]
    return Linear(
        "pca" if torch.equal(x, y) else "linear",
        (weight @ top @ top.T).float(),
        mean_in.float(),
        mean_out.float(),
        rank,
    )


def random_directions(coder: Coder, x: Tensor, k: int, seed: int) -> Dictionary:
    """A TopK dictionary of random unit directions around the mean, its codes scaled by the factor that fits x best."""
    site, width = coder.in_sites[0], x.shape[1]
    rows = torch.randn(coder.n_latents, width, generator=generator_for("random directions", seed))
    rows = rows / rows.norm(dim=1, keepdim=True)
    mean = x.mean(0).float()
    plain = Dictionary(
        "topk", (site,), (site,), (rows.T.contiguous(),), (rows,), torch.zeros(coder.n_latents), (mean,), k=k,
        apply_b_dec_to_input=True,
    )  # fmt: skip
    some = x[:4096].float()
    guess, away = plain.reconstruct(some) - mean, some - mean  # type: ignore[operator]
    factor = float((guess * away).sum() / guess.square().sum().clamp(min=1e-30))
    return replace(plain, decoders=(rows * factor,))


def _untrained(coder: Coder, fit: tuple[Rows, Rows]) -> Rebuilder | None:
    about: Mapping[str, Any] = getattr(coder, "about", {})
    if not isinstance(coder, Dictionary) or "config" not in about:
        return None
    try:
        config = build(TrainConfig, about["config"])
    except InputError:  # written by another version
        return None
    return OfCoder(untrained(coder, config, fit), "untrained")


def untrained(coder: Dictionary, config: TrainConfig, fit: tuple[Rows, Rows]) -> Coder:
    """The dictionary that training would begin with. Kinds that choose by count choose the k largest of each row."""
    ins, outs = tuple(map(str, coder.in_sites)), tuple(map(str, coder.out_sites))
    kind = "topk" if config.sparse_by_count else config.kind
    config = replace(config, kind=kind, groups=(), in_sites=ins, out_sites=outs)
    own = coder.in_sites == coder.out_sites
    source = TensorSource(*fit[0], *(() if own else fit[1]), sites=[*coder.in_sites, *(() if own else coder.out_sites)])
    with Workers(device=torch.device("cpu")) as workers:
        fitter = make_fitter(source, config, wire(source, config), workers, Ranks.current(), torch.device("cpu"))
        return fitted(fitter, {})
