"""Parameters: everything that is trained, how it begins, and how one step of Adam changes it.

Encoders are kept [latent, d], like decoders, so that a latent's weights, gradients and moments lie together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adam import adam

from vesalius.dictionaries.config import TrainConfig
from vesalius.dictionaries.kinds import TRAINABLE
from vesalius.dictionaries.training.layout import BlockLayout, Layout
from vesalius.dictionaries.training.run import LATENTS, Run
from vesalius.seeds import generator_for

MATRICES = ("W_enc", "W_dec")
EPSILON = 1e-8
"""Of Adam."""


@dataclass
class Parameters:
    """Tensors by name: `0.W_enc` [latent, d_in], `0.W_dec` [latent, d_out], `0.b_enc`, ... per block; `b_dec` [d_out]
    of all outputs, `W_skip` [d_out, d_in]. means, squares: Adam's moments.
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
        return _of_block(self.values, number)

    def block_gradients(self, number: int) -> dict[str, Tensor]:
        """Their gradients."""
        return _of_block(self.gradients, number)

    def all(self) -> dict[str, Tensor]:
        """Values and moments under one name each, for a checkpoint."""
        parts = {"value": self.values, "mean": self.means, "square": self.squares}
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """Copies from `all` of another time, in place: memory keeps its alignment, on which rounding may depend."""
        for name, tensor in self.all().items():
            tensor.copy_(stored[name])


def _of_block(tensors: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The tensors whose name begins with a block's number, without it."""
    prefix = f"{number}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# Step 0


def initial_parameters(
    layout: Layout,
    config: TrainConfig,
    inputs: Float[Tensor, "n d_in"],
    mean_out: Float[Tensor, " d_out"],
    device: torch.device,
) -> Parameters:
    """Parameters of step 0. inputs: scaled inputs of a sample, for kinds whose start depends on them. mean_out: mean of
    the scaled outputs, where the decoder's bias begins.

    Decoder rows are random unit vectors. Encoder rows are the same vectors where input and output are the same, else
    random ones of their own.
    """
    kind = TRAINABLE[config.kind]
    values: dict[str, Tensor] = {}
    for number, block in enumerate(layout.blocks):
        decoder = _directions(block.out_widths, config, "decoder", number)
        # An encoder that begins as the decoder's transpose leaves fewer latents dead (Gao et al. 2024, A.1).
        tied = layout.in_sites == layout.out_sites
        encoder = decoder.clone() if tied else _directions(block.in_widths, config, "encoder", number)
        read = inputs[:, block.reads] - (mean_out[block.reads] if layout.apply_b_dec_to_input else 0.0)
        vectors = {"b_enc": torch.zeros(config.n_latents), **kind.initial_vectors(config, read @ encoder.T)}
        values |= {f"{number}.{name}": t for name, t in {"W_enc": encoder, "W_dec": decoder, **vectors}.items()}
    values["b_dec"] = mean_out.clone()
    if config.skip:
        values["W_skip"] = torch.zeros(layout.d_out, layout.d_in)
    return Parameters({name: value.to(device, torch.float32, copy=True) for name, value in values.items()})


def _directions(widths: Sequence[int], config: TrainConfig, *name: object) -> Float[Tensor, "latent d"]:
    """Random unit rows."""
    rows = torch.randn(config.n_latents, sum(widths), generator=generator_for("dictionary", config.seed, *name))
    return rows / rows.norm(dim=1, keepdim=True)


def site_norms(decoder: Float[Tensor, "latent d"], widths: Sequence[int]) -> Float[Tensor, "latent site"]:
    """Norm of each latent's decoder row at each site."""
    return torch.stack([part.norm(dim=1) for part in decoder.split(list(widths), dim=1)], 1)


def weighs_norms(block: BlockLayout, config: TrainConfig) -> bool:
    """Whether the penalty has decoder norms that are not all 1."""
    return config.sparsity_coefficient > 0 and not (config.unit_decoder and len(block.out_widths) == 1)


# A step: projection, clipping, Adam, unit rows; chunk by chunk, each in cache


def update(run: Run, parameters: Parameters, step: int) -> float:
    """Change the parameters in place; returns the norm that the gradient had before clipping.

    A unit decoder row only turns: the gradient along it is removed before, and its norm set to 1 after.
    """
    cuts = run.cuts(run.config.n_latents, LATENTS)
    pieces = [
        (f"{number}.{name}", cut) for number in range(len(run.layout.blocks)) for name in MATRICES for cut in cuts
    ]
    squares = run.workers.map(lambda piece: _project(run, parameters, piece), pieces)
    small = [name for name in parameters.values if not name.endswith(MATRICES)]
    # The pieces' squares are added in the order of the pieces, however many threads there are.
    squares += run.workers.map(lambda name: squared_norm(parameters.gradients[name]), small)
    norm = float(torch.stack(squares).sum().sqrt())
    clip = 1.0 if run.config.clip_norm is None else min(1.0, run.config.clip_norm / (norm + 1e-6))
    run.workers.map(lambda piece: _adam(run, parameters, [piece], step, clip), pieces)
    _adam(run, parameters, [(name, slice(None)) for name in small], step, clip)
    return norm


def _is_unit(run: Run, name: str) -> bool:
    return run.config.unit_decoder and name.endswith("W_dec")


def _project(run: Run, parameters: Parameters, piece: tuple[str, slice]) -> Float[Tensor, ""]:
    """The squared norm of a piece of the gradient, after removing what lies along unit rows."""
    name, cut = piece
    gradient = parameters.gradients[name][cut]
    if _is_unit(run, name):
        rows = parameters.values[name][cut]
        gradient.addcmul_(torch.linalg.vecdot(gradient, rows)[:, None], rows, value=-1.0)
    return squared_norm(gradient)


def _adam(run: Run, parameters: Parameters, pieces: Sequence[tuple[str, slice]], step: int, clip: float) -> None:
    values, gradients, means, squares = (
        [tensors[name][cut] for name, cut in pieces]
        for tensors in (parameters.values, parameters.gradients, parameters.means, parameters.squares)
    )
    # In place and by piece: the whole gradient is never read once more just to be scaled.
    if clip < 1.0:
        for gradient in gradients:
            gradient.mul_(clip)
    beta1, beta2 = run.config.betas
    # The function and not the optimiser: it takes views, so that each thread updates its own latents.
    adam(
        values,
        gradients,
        means,
        squares,
        [],
        [torch.tensor(float(step), device=run.device) for _ in pieces],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=run.config.lr_at(step),
        weight_decay=0.0,
        eps=EPSILON,
        maximize=False,
    )
    for (name, _), rows in zip(pieces, values, strict=True):
        if _is_unit(run, name):
            rows.div_(rows.norm(dim=1, keepdim=True))


def squared_norm(tensor: Tensor) -> Float[Tensor, ""]:
    """Sum of squares, as float64."""
    flat = tensor.reshape(-1)
    return flat.dot(flat).double()
