"""How latents share the units of a site: neurons that serve many latents, latents that use many neurons, interference.

More latents than dimensions cannot all be orthogonal (Elhage et al. 2022, "Toy Models of Superposition"). What a
dictionary shows of that is a property of the dictionary and of the model; the same numbers for random directions, and
for a dictionary of a re-initialised model, say how much of it anything would show.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from vesalius.data import as_source
from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.evaluation.geometry import random_unit
from vesalius.dictionaries.evaluation.sample import draw
from vesalius.dictionaries.held_out import evaluation_rows
from vesalius.dictionaries.rows import CHUNK
from vesalius.errors import InputError

Floats = NDArray[np.float64]
SUPERPOSED: Mapping[str, str] = MappingProxyType(
    {
        "latents_per_neuron": "latents that write a neuron's activations, as an effective number",
        "neurons_per_latent": "neurons that a latent writes to, as an effective number",
        "dimensionality": "share of a dimension that a latent has to itself: 1 alone, 1/2 in an opposite pair",
        "interference": "what other latents write along a latent's direction while it is active, over what it writes",
    }
)
"""What each measure is. Effective numbers are (sum of squares)² over the sum of fourth powers: n when n share alike."""


@dataclass(frozen=True, eq=False)
class Superposition:
    """values: by the names of `SUPERPOSED`, one per neuron or per latent that fired. null: the same with as many random
    directions in place of the decoder's, which fire as the latents do.
    """

    values: Mapping[str, Floats]
    null: Mapping[str, Floats]
    rows: int

    def to_json(self) -> dict[str, Any]:
        """Quartiles of each measure, and of each under random directions."""
        both = {"values": self.values, "null": self.null}
        quartiles = {key: {name: _quartiles(found) for name, found in side.items()} for key, side in both.items()}
        return {**quartiles, "rows": self.rows}

    def __repr__(self) -> str:
        words = (
            f"{name} {np.median(found):.3g} (random {np.median(self.null[name]):.3g})"
            for name, found in self.values.items()
        )
        return f"Superposition(medians: {', '.join(words)}; {self.rows:,} rows)"

    def _repr_html_(self) -> str:
        """Medians and quartiles, for a notebook."""
        lines = "".join(
            f'<tr><th title="{SUPERPOSED[name]}">{name}</th><td>{_cell(found)}</td>'
            f"<td>{_cell(self.null[name])}</td></tr>"
            for name, found in self.values.items()
        )
        return f"<table><tr><th></th><th>dictionary</th><th>random directions</th></tr>{lines}</table>"


@torch.no_grad()
def superposition(coder: Dictionary, data: Any, *, n: int = 8192, seed: int = 0) -> Superposition:
    """How the latents of a dictionary lie on the units of its site, best one with units of its own such as `mlp_post`.

    data: as for `quality`, of which n rows that were not trained on are looked at, where that can be told. A latent's
    share of a neuron is its squared decoder entry times its mean squared value. Interference is a ratio of mean squares
    over the rows where the latent is active; neither the error of the reconstruction counts nor the bias.

    Raises InputError for a dictionary of several sites, and when fewer than two latents fire.
    """
    if len(coder.out_sites) != 1:
        raise InputError(f"superposition is of one site's units; {coder!r} writes {len(coder.out_sites)}")
    source = as_source(data)
    sample = draw(coder, evaluation_rows(source, coder.metadata), source, n, seed).test
    rows = [[tensor[at : at + CHUNK] for tensor in sample.inputs] for at in range(0, len(sample), CHUNK)]
    encoded = [coder.encode(part[0] if len(part) == 1 else part).cpu() for part in rows]
    alive = torch.stack([(latents > 0).any(0) for latents in encoded]).any(0)
    if int(alive.sum()) < 2:
        raise InputError(f"{int(alive.sum())} latents fire in {len(sample):,} rows, so none shares anything")
    kept = [latents[:, alive] for latents in encoded]
    written = coder.decoder_rows().cpu().float()[alive]
    # As long as the decoder's rows, so that only their directions differ.
    directions = random_unit(len(written), written.shape[1], seed) * written.norm(dim=1, keepdim=True)
    return Superposition(_measured(written, kept), _measured(directions, kept), len(sample))


def _measured(written: Float[Tensor, "latent width"], encoded: list[Tensor]) -> dict[str, Floats]:
    """Every measure of latents that write these rows."""
    strength = torch.stack([latents.double().square().sum(0) for latents in encoded]).sum(0)
    shares = written.double().square() * strength[:, None]
    used = shares.sum(0) > 0
    found = {
        "latents_per_neuron": _effective(shares[:, used].T),
        "neurons_per_latent": _effective(written.double().square()),
        "dimensionality": dimensionality(written),
        "interference": _interference(written, encoded),
    }
    return {name: values.numpy() for name, values in found.items()}


def dimensionality(directions: Float[Tensor, "latent width"]) -> Float[Tensor, " latent"]:
    """|W_i|² / sum over j of (Ŵ_i·W_j)², float64: the share of a dimension each direction has (Elhage et al. 2022).

    Only W_i is normalised. Directions of zero get 0.
    """
    rows = directions.double()
    squares = rows.square().sum(1)
    total = torch.zeros_like(squares)
    for part in rows.split(CHUNK):
        total += (part @ rows.T).square().sum(0)
    return torch.where(squares > 0, squares.square() / total.clamp(min=1e-300), 0.0)


def _effective(shares: Float[Tensor, "row column"]) -> Float[Tensor, " row"]:
    """(sum)² over the sum of squares, of each row of shares."""
    return shares.sum(1).square() / shares.square().sum(1).clamp(min=1e-300)


def _interference(written: Float[Tensor, "latent width"], encoded: list[Tensor]) -> Float[Tensor, " latent"]:
    norms = written.norm(dim=1)
    unit = written / norms.clamp(min=1e-12)[:, None]
    other, own = (torch.zeros(len(written), dtype=torch.float64) for _ in range(2))
    for latents in encoded:
        alone = latents * norms
        along = (latents @ written) @ unit.T - alone
        active = latents > 0
        other += (along.double().square() * active).sum(0)
        own += alone.double().square().sum(0)
    return other / own.clamp(min=1e-300)


def _quartiles(values: Floats) -> dict[str, float]:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {"mean": float(values.mean()), "q25": low, "median": middle, "q75": high}


def _cell(values: Floats) -> str:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"
