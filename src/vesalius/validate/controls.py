"""A model with the same statistics but no mechanism: the random-weights control."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from vesalius.model import Model


def reinitialised(model: Model, seed: int) -> Model:
    """A copy of the model with random weights: every tensor keeps its own mean and standard deviation.

    Matrices and biases are redrawn from a normal distribution, brought to exactly the tensor's mean and spread; the
    gains of norms are permuted (Adebayo et al. 2018, "cascading randomization" taken to all layers). Buffers are kept,
    tied weights stay tied, the original is not touched. One seed gives one model.
    """
    module = copy.deepcopy(model.module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # A tied parameter is listed once, so it is drawn once.
        for name, parameter in module.named_parameters():
            parameter.copy_(_redrawn(name, parameter, generator))
    module.train(model.module.training)
    return Model(
        module,
        model.tokenizer,
        model.adapter,
        name=f"{model.name} with random weights (seed {seed})",
        note="re-initialised: every tensor keeps its mean and spread",
    )


def _redrawn(name: str, parameter: nn.Parameter, generator: torch.Generator) -> Tensor:
    values = parameter.detach().float().cpu()
    if values.numel() < 2:
        return parameter.detach()
    if values.ndim < 2 and not name.endswith("bias"):
        return values[torch.randperm(len(values), generator=generator)].to(parameter)
    drawn = torch.randn(values.shape, generator=generator)
    drawn = (drawn - drawn.mean()) / drawn.std()
    return (drawn * values.std() + values.mean()).to(parameter)
