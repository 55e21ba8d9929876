"""Parameters: everything that is trained, with gradients and Adam's moments, by name.

Encoders are kept [latent, d], like decoders, so that a latent's weights, gradients and moments lie together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vesalius.dictionaries.config import TrainConfig
from vesalius.dictionaries.kinds import TRAINED
from vesalius.dictionaries.training.wiring import BlockWiring, Wiring
from vesalius.seeds import generator_for

MATRICES = ("W_enc", "W_dec")


@dataclass
class Parameters:
    """Tensors by name: `0.W_enc` [latent, d_in], `0.W_dec` [latent, d_out], `0.b_enc`, ... per block; `b_dec` [d_out]
    of all outputs, `W_skip` [d_out, d_in].
    """

    values: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(init=False)
    means: dict[str, Tensor] = field(init=False)
    squares: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        for name in ("gradients", "means", "squares"):
            setattr(self, name, {key: torch.zeros_like(value) for key, value in self.values.items()})

    def block(self, number: int) -> dict[str, Tensor]:
        """The tensors of a block by their own names."""
        return own(self.values, number)

    def block_gradients(self, number: int) -> dict[str, Tensor]:
        """Their gradients."""
        return own(self.gradients, number)

    def all(self) -> dict[str, Tensor]:
        """Values and moments under one name each, for a checkpoint."""
        parts = {"value": self.values, "mean": self.means, "square": self.squares}
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """Copies from `all` of another time, in place: memory keeps its alignment, on which rounding may depend."""
        for name, tensor in self.all().items():
            tensor.copy_(stored[name])


def own(tensors: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The tensors whose name begins with a block's number, without it."""
    prefix = f"{number}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def first_parameters(
    wiring: Wiring, config: TrainConfig, inputs: Tensor, mean_out: Tensor, device: torch.device
) -> Parameters:
    """Parameters of step 0. inputs: [n, d_in] scaled inputs of a sample, for kinds whose start depends on them.
    mean_out: [d_out] mean of the scaled outputs, where the decoder's bias begins.

    Decoder rows are random unit vectors. Encoder rows are the same vectors where input and output are the same, else
    random ones of their own.
    """
    kind = TRAINED[config.kind]
    values: dict[str, Tensor] = {}
    for number, block in enumerate(wiring.blocks):
        decoder = _directions(block.out_widths, config, "decoder", number)
        tied = wiring.in_sites == wiring.out_sites
        encoder = decoder.clone() if tied else _directions(block.in_widths, config, "encoder", number)
        read = inputs[:, block.reads] - (mean_out[block.reads] if wiring.centred else 0.0)
        vectors = {"b_enc": torch.zeros(config.n_latents), **kind.start(config, read @ encoder.T)}
        values |= {f"{number}.{name}": t for name, t in {"W_enc": encoder, "W_dec": decoder, **vectors}.items()}
    values["b_dec"] = mean_out.clone()
    if config.skip:
        values["W_skip"] = torch.zeros(wiring.writes, wiring.reads)
    return Parameters({name: value.to(device, torch.float32, copy=True) for name, value in values.items()})


def _directions(widths: Sequence[int], config: TrainConfig, *name: object) -> Tensor:
    """[latent, d] random unit rows."""
    rows = torch.randn(config.n_latents, sum(widths), generator=generator_for("dictionary", config.seed, *name))
    return rows / rows.norm(dim=1, keepdim=True)


def site_norms(decoder: Tensor, widths: Sequence[int]) -> Tensor:
    """[latent, site] norm of each latent's decoder row at each site."""
    return torch.stack([part.norm(dim=1) for part in decoder.split(list(widths), dim=1)], 1)


def weighs_norms(block: BlockWiring, config: TrainConfig) -> bool:
    """Whether the penalty has decoder norms that are not all 1."""
    return config.penalty_coefficient > 0 and not (config.unit_decoder and len(block.out_widths) == 1)
