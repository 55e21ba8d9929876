"""From gradients to new parameters: projection, clipping, Adam, unit rows; piece by piece, each in cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam

from vesalius.dictionaries.training.microbatch import LATENTS, Run
from vesalius.dictionaries.training.parameters import MATRICES, Parameters

EPSILON = 1e-8
Place = tuple[str, slice]


def update(run: Run, parameters: Parameters, step: int) -> float:
    """Change the parameters in place; returns the norm that the gradient had before clipping.

    A unit decoder row only turns: the gradient along it is removed before, and its norm set to 1 after.
    """
    cuts = run.cuts(run.config.n_latents, LATENTS)
    places = [
        (f"{number}.{name}", cut) for number in range(len(run.wiring.blocks)) for name in MATRICES for cut in cuts
    ]
    squares = run.workers.map(lambda place: _project(run, parameters, place), places)
    small = [name for name in parameters.values if not name.endswith(MATRICES)]
    norm = float(torch.stack([*squares, *(_squared(parameters.gradients[name]) for name in small)]).sum().sqrt())
    clip = 1.0 if run.config.clip_norm is None else min(1.0, run.config.clip_norm / (norm + 1e-6))
    rate = run.config.rate(step)
    run.workers.map(lambda place: _step(run, parameters, [place], step, rate, clip), places)
    _step(run, parameters, [(name, slice(None)) for name in small], step, rate, clip)
    return norm


def _is_unit(run: Run, name: str) -> bool:
    return run.config.unit_decoder and name.endswith("W_dec")


def _project(run: Run, parameters: Parameters, place: Place) -> Tensor:
    """[]: the squared norm of a piece of the gradient, after removing what lies along unit rows."""
    name, cut = place
    gradient = parameters.gradients[name][cut]
    if _is_unit(run, name):
        rows = parameters.values[name][cut]
        gradient.addcmul_(torch.linalg.vecdot(gradient, rows)[:, None], rows, value=-1.0)
    return _squared(gradient)


def _step(run: Run, parameters: Parameters, places: Sequence[Place], step: int, rate: float, clip: float) -> None:
    values, gradients, means, squares = (
        [held[name][cut] for name, cut in places]
        for held in (parameters.values, parameters.gradients, parameters.means, parameters.squares)
    )
    if clip < 1.0:
        for gradient in gradients:
            gradient.mul_(clip)
    first, second = run.config.betas
    counts = [torch.tensor(float(step), device=run.device) for _ in places]
    adam(
        values, gradients, means, squares, [], counts, fused=True, amsgrad=False, beta1=first, beta2=second, lr=rate,
        weight_decay=0.0, eps=EPSILON, maximize=False,
    )  # fmt: skip
    for (name, _), rows in zip(places, values, strict=True):
        if _is_unit(run, name):
            rows.div_(rows.norm(dim=1, keepdim=True))


def _squared(gradient: Tensor) -> Tensor:
    flat = gradient.reshape(-1)
    return flat.dot(flat).double()
