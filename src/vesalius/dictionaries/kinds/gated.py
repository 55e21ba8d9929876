"""Gated dictionaries: one half decides which latents are active, the other how strongly (Rajamanoharan et al. 2024).

Both halves share the encoder up to a factor per latent, exp(r_mag). The gate has no gradient of its own through the
step, so its positive part is penalised and has to reconstruct the activations as well, with the decoder held fixed
(their equation 8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vesalius.dictionaries.config import TrainConfig
from vesalius.dictionaries.kinds.base import Activation, Entries, Gradients, Kind, Vectors, positive_part


def _dense(pre: Tensor, vectors: Vectors, _k: int) -> Tensor:
    """Magnitude where the gate is open. b_enc is the gate's bias."""
    magnitude = vectors["r_mag"].exp() * (pre - vectors["b_enc"]) + vectors["b_mag"]
    return magnitude.relu() * (pre > 0)


def _initial(config: TrainConfig, _pre: Tensor) -> dict[str, Tensor]:
    """Both zero: at first the magnitude is the gate's pre-activation."""
    return {"r_mag": torch.zeros(config.n_latents), "b_mag": torch.zeros(config.n_latents)}


def _values(entries: Entries) -> Tensor:
    _, _, magnitude = _halves(entries)
    return magnitude.relu() * (entries.pre > 0)


def _gradients(entries: Entries, dvalues: Tensor, dgate: Tensor | None) -> Gradients:
    """The magnitude's error goes to magnitude and encoder, the gate's error and penalty to gate and encoder."""
    assert dgate is not None
    gain, shared, magnitude = _halves(entries)
    is_open = entries.pre > 0
    through = dvalues * (is_open & (magnitude > 0))
    gate = (dgate + entries.penalty_gradient) * is_open
    own = {"r_mag": through * gain * shared, "b_mag": through, "b_enc": gate}
    weighted = entries.sparsity * entries.pre.relu()
    return Gradients(through * gain + gate, own, norm=weighted, penalty=entries.times_norms(weighted).sum())


def _extras(vectors: Vectors, _threshold: Tensor) -> dict[str, Tensor]:
    return {"r_mag": vectors["r_mag"], "b_mag": vectors["b_mag"]}


def _halves(entries: Entries) -> tuple[Tensor, Tensor, Tensor]:
    """Factor, shared product of input and encoder, magnitude before its positive part."""
    gain = entries.per_entry(entries.vectors["r_mag"].exp())
    shared = entries.pre - entries.per_entry(entries.vectors["b_enc"])
    return gain, shared, gain * shared + entries.per_entry(entries.vectors["b_mag"])


GATED_ACTIVATION = Activation("gated", _dense, extras=("r_mag", "b_mag"))
GATED = Kind(
    "gated",
    "gated",
    "threshold",
    initial_vectors=_initial,
    values=_values,
    gate=positive_part,
    gradients=_gradients,
    fitted_extras=_extras,
)
