"""What a dictionary is compared with: other ways to reconstruct a row from as many numbers as its latents per row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.data import TensorSource
from vesalius.dictionaries.coder import SparseCoder
from vesalius.dictionaries.config import TrainConfig
from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.evaluation.sample import Rows
from vesalius.dictionaries.evaluation.totals import CoderReconstructor, Reconstructed, Reconstructor
from vesalius.dictionaries.training.fitter import make_fitter
from vesalius.dictionaries.training.layout import layout_of
from vesalius.dictionaries.training.run import Processes
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
    weight: Float[Tensor, "d_in d_out"]
    mean_in: Float[Tensor, " d_in"]
    mean_out: Float[Tensor, " d_out"]
    rank: int

    def reconstruct(self, inputs: Sequence[Tensor]) -> Reconstructed:
        """As `Reconstructor.reconstruct`."""
        rows = inputs[0].to(self.weight)
        out = (rows - self.mean_in) @ self.weight + self.mean_out
        return Reconstructed((out,), torch.full((len(rows),), self.rank))


@dataclass(frozen=True, eq=False)
class Neurons:
    """The k coordinates of a row that are farthest from their mean; the mean for all others."""

    mean: Float[Tensor, " d"]
    k: int
    name: str = "neurons"

    def reconstruct(self, inputs: Sequence[Tensor]) -> Reconstructed:
        """As `Reconstructor.reconstruct`."""
        away = inputs[0].to(self.mean) - self.mean
        kept = away.abs().topk(self.k, dim=1).indices
        out = torch.zeros_like(away).scatter_(1, kept, away.gather(1, kept)) + self.mean
        return Reconstructed((out,), torch.full((len(away),), self.k))


def baselines(coder: SparseCoder, fit: tuple[Rows, Rows], l0: float, seed: int) -> list[Reconstructor]:
    """The baselines that this dictionary can be compared with, in the order of `WORDS`.

    fit: rows of inputs and outputs that are not measured on. l0: numbers per row. A dictionary of several sites has no
    baseline; a transcoder has the linear map and, if its configuration is known, its own step 0.
    """
    if len(fit[0]) != 1 or len(fit[1]) != 1:
        return []
    x, y = fit[0][0].double(), fit[1][0].double()
    k, autoencodes = max(1, min(round(l0), coder.n_latents)), coder.in_sites == coder.out_sites
    found: list[Reconstructor] = [reduced_rank(x, y, min(k, x.shape[1], y.shape[1]))]
    if autoencodes:
        found.append(CoderReconstructor(random_directions(coder, x, k, seed), "random"))
    config = _config(coder)
    if isinstance(coder, Dictionary) and config is not None:
        found.append(CoderReconstructor(untrained(coder, config, fit), "untrained"))
    if autoencodes:
        found.append(Neurons(x.mean(0).float(), min(k, x.shape[1])))
    return found


def reduced_rank(x: Float[Tensor, "n d_in"], y: Float[Tensor, "n d_out"], rank: int) -> Linear:
    """Least-squares map of this rank (Izenman 1975): regression, then the principal components of what it predicts.

    When y is x this is the projection on the first principal components.
    """
    mean_in, mean_out = x.mean(0), y.mean(0)
    centred, target = x - mean_in, y - mean_out
    same = torch.equal(x, y)
    if same:
        weight, predicted = torch.eye(x.shape[1], dtype=x.dtype, device=x.device), centred
    else:
        # A trace of ridge, so that coordinates that hardly vary don't make the system singular.
        ridge = 1e-6 * centred.square().sum() / x.shape[1]
        gram = centred.T @ centred + ridge * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        weight = torch.linalg.solve(gram, centred.T @ target)
        predicted = centred @ weight
    top = torch.linalg.eigh(predicted.T @ predicted).eigenvectors[:, -rank:]
    projected = (weight @ top @ top.T).float()
    return Linear("pca" if same else "linear", projected, mean_in.float(), mean_out.float(), rank)


def random_directions(coder: SparseCoder, x: Float[Tensor, "n d"], k: int, seed: int) -> Dictionary:
    """A TopK dictionary of random unit directions around the mean, its codes scaled by the factor that fits x best."""
    site, width = coder.in_sites[0], x.shape[1]
    rows = torch.randn(coder.n_latents, width, generator=generator_for("random directions", seed))
    rows = rows / rows.norm(dim=1, keepdim=True)
    mean = x.mean(0).float()
    unscaled = Dictionary(
        "topk",
        (site,),
        (site,),
        encoders=(rows.T.contiguous(),),
        decoders=(rows,),
        b_enc=torch.zeros(coder.n_latents),
        b_dec=(mean,),
        k=k,
        apply_b_dec_to_input=True,
    )
    some = x[:4096].float()
    guess, away = unscaled.reconstruct(some) - mean, some - mean  # type: ignore[operator]
    # Random directions overlap, so that their sum is too long or too short; one factor is fitted for all.
    factor = float((guess * away).sum() / guess.square().sum().clamp(min=1e-30))
    return replace(unscaled, decoders=(rows * factor,))


def _config(coder: SparseCoder) -> TrainConfig | None:
    """What it was trained with, where that is known."""
    metadata: Mapping[str, Any] = getattr(coder, "metadata", {})
    if "config" not in metadata:
        return None
    try:
        return build(TrainConfig, metadata["config"])
    except InputError:  # written by another version, or by another library
        return None


def untrained(coder: Dictionary, config: TrainConfig, fit: tuple[Rows, Rows]) -> SparseCoder:
    """The dictionary that training would begin with. Kinds that choose by count choose the k largest of each row."""
    ins, outs = tuple(map(str, coder.in_sites)), tuple(map(str, coder.out_sites))
    # A batchtopk dictionary at step 0 has no threshold yet; the k largest of each row are what it would choose.
    kind = "topk" if config.sparse_by_count else config.kind
    config = replace(config, kind=kind, groups=(), in_sites=ins, out_sites=outs)
    autoencodes = coder.in_sites == coder.out_sites
    sites = [*coder.in_sites, *(() if autoencodes else coder.out_sites)]
    source = TensorSource(*fit[0], *(() if autoencodes else fit[1]), sites=sites)
    device = torch.device("cpu")
    with Workers(device=device) as workers:
        fitter = make_fitter(source, config, layout_of(source, config), workers, Processes.current(), device)
        return fitter.fitted({})
